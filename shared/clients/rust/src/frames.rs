//! The frames that the client sends, for serialization; `protocol::client_frame` parses them.
//!
//! Optional fields are omitted where they are absent or have the default of the protocol. The
//! client and the tests of the gateway use these types.

use serde::Serialize;
use serde_json::Value;

use skein_protocol::{
    ids::{MessageId, RoomId},
    position::{Epoch, Position, Seq},
    protocol::{FrameRef, MessageKind},
};

/// `join`
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename = "join")]
pub struct OutgoingJoin<'a> {
    /// The `ref` of the frame.
    #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room.
    pub room: &'a RoomId,
    /// The position of the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<&'a Position>,
    /// How many of the newest entries to send.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub history: Option<u32>,
    /// The room's password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<&'a str>,
}

/// `leave`
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename = "leave")]
pub struct OutgoingLeave<'a> {
    /// The `ref` of the frame.
    #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room.
    pub room: &'a RoomId,
}

/// `message`, or without `content` the header of a binary one.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename = "message")]
pub struct OutgoingMessage<'a> {
    /// The `ref` of the frame.
    #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room.
    pub room: &'a RoomId,
    /// The idempotency key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<MessageId>,
    /// The kind of message.
    #[serde(skip_serializing_if = "is_text")]
    pub kind: MessageKind,
    /// The content; absent in the header of a binary frame.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<&'a Value>,
    /// The message that this one replies to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<MessageId>,
    /// Metadata of the application, a JSON object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub meta: Option<&'a Value>,
    /// Whether the sending connection receives a copy.
    #[serde(skip_serializing_if = "is_true")]
    pub echo: bool,
}

/// `history`
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename = "history")]
pub struct OutgoingHistory<'a> {
    /// The `ref` of the frame.
    #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room.
    pub room: &'a RoomId,
    /// Only entries below this one, the newest of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<Seq>,
    /// Only entries above this one, the oldest of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<Seq>,
    /// Page size, 1 to 200.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// `ack`: acknowledges the inbox up to an entry.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename = "ack")]
pub struct OutgoingAck {
    /// The newest entry.
    pub seq: Seq,
    /// The epoch that `seq` counts in.
    pub epoch: Epoch,
}

/// `ping`
#[derive(Clone, Debug, Default, Serialize)]
#[serde(tag = "type", rename = "ping")]
pub struct OutgoingPing {
    /// The `ref` of the frame.
    #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The client's own time, a string or a number, echoed in the `pong`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<Value>,
}

/// `pong`: the reply to a `ping` frame, which the gateway sends to clients with `?ping=json`.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(tag = "type", rename = "pong")]
pub struct OutgoingPong {}

impl<'a> OutgoingJoin<'a> {
    /// A `join` with the room only.
    pub fn new(room: &'a RoomId) -> Self {
        Self { reference: None, room, since: None, history: None, password: None }
    }
}

impl<'a> OutgoingLeave<'a> {
    /// A `leave` of `room`.
    pub fn new(room: &'a RoomId) -> Self {
        Self { reference: None, room }
    }
}

impl<'a> OutgoingMessage<'a> {
    /// A text frame with `content`.
    pub fn text(room: &'a RoomId, content: &'a Value) -> Self {
        Self { content: Some(content), ..Self::header(room) }
    }

    /// The header of a binary frame.
    pub fn header(room: &'a RoomId) -> Self {
        Self {
            reference: None,
            room,
            id: None,
            kind: MessageKind::Text,
            content: None,
            reply_to: None,
            meta: None,
            echo: true,
        }
    }
}

impl<'a> OutgoingHistory<'a> {
    /// The newest page.
    pub fn new(room: &'a RoomId) -> Self {
        Self { reference: None, room, before: None, after: None, limit: None }
    }
}

/// Encodes a frame as JSON text.
///
/// # Panics
///
/// If `frame` cannot be JSON, such as a map whose keys are not strings.
pub fn encode_text(frame: &impl Serialize) -> String {
    serde_json::to_string(frame).expect("a frame can be JSON")
}

/// The JSON header of a binary frame does not fit into the 16 bits of its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the header of a binary frame is longer than 65,535 bytes")]
pub struct HeaderTooLong;

/// Encodes a binary frame: header length (big-endian `u16`), JSON header, payload.
///
/// # Errors
///
/// [`HeaderTooLong`]; the gateway's own limit is lower.
///
/// # Panics
///
/// As [`encode_text`].
pub fn encode_binary(header: &impl Serialize, payload: &[u8]) -> Result<Vec<u8>, HeaderTooLong> {
    let header = encode_text(header);
    let length = u16::try_from(header.len()).map_err(|_| HeaderTooLong)?;
    Ok([&length.to_be_bytes()[..], header.as_bytes(), payload].concat())
}

fn is_text(kind: &MessageKind) -> bool {
    *kind == MessageKind::Text
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_true(yes: &bool) -> bool {
    *yes
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use skein_protocol::protocol::client_frame::{ClientFrame, FrameBody, RawContent};

    fn room() -> RoomId {
        "lobby".parse().unwrap()
    }

    #[test]
    fn absent_and_default_fields_are_omitted() {
        let content = json!({"a": 1});
        assert_eq!(
            encode_text(&OutgoingMessage::text(&room(), &content)),
            r#"{"type":"message","room":"lobby","content":{"a":1}}"#
        );
        assert_eq!(encode_text(&OutgoingPing::default()), r#"{"type":"ping"}"#);
    }

    #[test]
    fn the_gateway_parses_every_frame() {
        let room = room();
        let since = Position::new("e".parse().unwrap(), 7);
        let reference = Some(FrameRef::number(9));
        let join = OutgoingJoin {
            reference: reference.clone(),
            since: Some(&since),
            ..OutgoingJoin::new(&room)
        };
        let join = encode_text(&join);
        let request = ClientFrame::from_text(&join).unwrap();
        assert_eq!(request.reference, reference);
        let FrameBody::Join(join) = request.body else { panic!("{join}") };
        assert_eq!((join.room, join.since), (room.clone(), Some(since)));

        let meta = json!({"k": "v"});
        let id = MessageId::random();
        let message = OutgoingMessage {
            id: Some(id),
            kind: MessageKind::Custom,
            reply_to: Some(id),
            meta: Some(&meta),
            echo: false,
            ..OutgoingMessage::header(&room)
        };
        let frame = encode_binary(&message, &[1, 2]).unwrap();
        let FrameBody::Message(read) = ClientFrame::from_binary(&frame).unwrap().body else {
            panic!()
        };
        assert_eq!((read.id, read.reply_to, read.kind), (Some(id), Some(id), MessageKind::Custom));
        assert!(!read.echo && read.meta.unwrap().get() == r#"{"k":"v"}"#);
        assert!(matches!(read.content, RawContent::Binary([1, 2])));

        let history = encode_text(&OutgoingHistory {
            after: Some(3),
            limit: Some(20),
            ..OutgoingHistory::new(&room)
        });
        let FrameBody::History(read) = ClientFrame::from_text(&history).unwrap().body else {
            panic!()
        };
        assert_eq!((read.before, read.after, read.limit), (None, Some(3), 20));

        let leave = encode_text(&OutgoingLeave::new(&room));
        assert!(matches!(ClientFrame::from_text(&leave).unwrap().body, FrameBody::Leave(_)));
        let ping =
            encode_text(&OutgoingPing { timestamp: Some(json!("now")), ..OutgoingPing::default() });
        assert!(matches!(ClientFrame::from_text(&ping).unwrap().body, FrameBody::Ping(_)));
        let pong = encode_text(&OutgoingPong {});
        assert!(matches!(ClientFrame::from_text(&pong).unwrap().body, FrameBody::Pong));
    }

    #[test]
    fn a_header_longer_than_its_length_field_is_rejected() {
        let room = room();
        let meta = json!({"x": "y".repeat(65_536)});
        let header = OutgoingMessage { meta: Some(&meta), ..OutgoingMessage::header(&room) };
        assert_eq!(encode_binary(&header, &[]), Err(HeaderTooLong));
    }
}
