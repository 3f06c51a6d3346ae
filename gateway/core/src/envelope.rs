//! The envelope of an entry: the format in which logs keep it and gateways exchange it.
//!
//! The bytes hold all fields of a `message`, `direct` or `notification` frame but `epoch` and
//! `seq`, which the log assigns. A gateway builds the frame for its clients without parsing JSON:
//! it puts the two numbers in front of the stored fields. JSON is scanned once per entry that comes
//! from Redis ([`Envelope::parse_for_room`]), and in a direct up to the users whom it names
//! ([`Envelope::direct_users`]).
//!
//! ```text
//! byte 0        version, 2
//! byte 1        flags: bit 0 binary payload, bit 1 no copy for the sender,
//!               bits 2 and 3 the frame's type: 0 `message`, 1 `direct`, 2 `notification`
//! bytes 2..10   author: a hash of the sender's user id
//! bytes 10..26  message id; author and id together are the dedup key
//! bytes 26..42  connection id of the sender
//! bytes 42..46  length of the fields, big-endian
//! fields        JSON fields without braces: "room":"…","id":"…",…
//! payload       the content of a binary message
//! ```
//!
//! The envelope of a traced message has one more field, the last: `"traceparent":"…"`, the span of
//! its publish. It is part of no frame. Gateways that do not know it pass it to their clients, which
//! ignore it like every field that they do not know (docs/adr/0021).

use std::time::SystemTime;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{BufMut, Bytes, BytesMut};
use sha1::{Digest as _, Sha1};
use uuid::Uuid;

use skein_protocol::{
    ids::{ConnectionId, MessageId, RoomId, RoomKind, UserId},
    position::Position,
};
use skein_websocket::Opcode;

use crate::telemetry::{metrics::EntryKind, traces::TraceContext};

mod fields;

use fields::ExpectedFields;

const VERSION: u8 = 2;
const HEADER_BYTES: usize = 46;
const BINARY: u8 = 1;
const NO_ECHO: u8 = 1 << 1;
const FRAME_SHIFT: u8 = 2;
/// Maximum size of an envelope in bytes: the largest message that can be configured, and the fields
/// around its content.
pub const ENVELOPE_BYTES_MAX: usize = (16 << 20) + (64 << 10);
/// Maximum size in bytes of the fields beside a binary payload: the header length of a binary frame
/// has two bytes, and the prefix before the fields is under 160 bytes.
const BINARY_FIELDS_BYTES_MAX: usize = u16::MAX as usize - 160;

/// The text before the `traceparent` of a traced message.
const TRACE_FIELD: &[u8] = br#","traceparent":""#;
/// Length of a `traceparent` of version 00.
const TRACEPARENT_BYTES: usize = 55;

/// An entry without its position. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope(Bytes);

/// The author of a message: the first 8 bytes of the SHA-1 of the user id. It is the same on every
/// node, so a node that has only the envelope knows the dedup key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AuthorHash([u8; 8]);

impl AuthorHash {
    /// The bytes as they stand in an envelope.
    pub fn as_bytes(&self) -> &[u8; 8] {
        &self.0
    }

    /// The hash with these bytes, as they stand in an envelope.
    pub fn from_bytes(bytes: [u8; 8]) -> Self {
        Self(bytes)
    }

    /// The hash of `user`.
    pub fn of(user: &UserId) -> Self {
        let digest = Sha1::digest(user.as_str().as_bytes());
        let mut author = [0; 8];
        author.copy_from_slice(&digest[..8]);
        Self(author)
    }
}

/// The `type` of the frame that clients receive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FrameType {
    /// `message` of a room.
    #[default]
    Message,
    /// `direct` of an inbox.
    Direct,
    /// `notification` of an inbox.
    Notification,
}

impl FrameType {
    /// The kind of message in metrics.
    pub fn entry_kind(self) -> EntryKind {
        match self {
            Self::Message => EntryKind::Message,
            Self::Direct => EntryKind::Direct,
            Self::Notification => EntryKind::Notification,
        }
    }

    const ALL: [Self; 3] = [Self::Message, Self::Direct, Self::Notification];

    /// The value of `type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Message => "message",
            Self::Direct => "direct",
            Self::Notification => "notification",
        }
    }
}

/// The dedup key of a message: author and message id.
pub type DedupKey = [u8; 24];

/// The bytes are not an envelope of this version, or belong to another room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an envelope of version 2 for this room")]
pub struct InvalidEnvelope;

/// The parts of an envelope.
#[derive(Clone, Copy, Debug)]
pub struct EnvelopeParts<'a> {
    /// The `type` of the frame that clients receive.
    pub frame: FrameType,
    /// The author.
    pub author: AuthorHash,
    /// The message id.
    pub id: MessageId,
    /// The connection of the sender.
    pub sender: ConnectionId,
    /// Whether `sender` receives a copy.
    pub echo: bool,
    /// The JSON fields of the frame without braces, `type`, `epoch` and `seq`.
    pub fields: &'a str,
    /// The content of a binary message; `None` if the content is one of the fields.
    pub binary_payload: Option<&'a [u8]>,
}

impl Envelope {
    /// Packs `parts`.
    pub fn pack(parts: EnvelopeParts<'_>) -> Self {
        Self::pack_traced(parts, None)
    }

    /// Packs `parts` with the span that published them, if the message is traced.
    pub fn pack_traced(parts: EnvelopeParts<'_>, trace: Option<TraceContext>) -> Self {
        let payload = parts.binary_payload.unwrap_or_default();
        let traced = trace.map(|trace| [TRACE_FIELD, trace.to_string().as_bytes(), b"\""].concat());
        let traced = traced.as_deref().unwrap_or_default();
        let fields_len = parts.fields.len() + traced.len();
        let mut bytes = BytesMut::with_capacity(HEADER_BYTES + fields_len + payload.len());
        bytes.put_u8(VERSION);
        let binary = if parts.binary_payload.is_some() { BINARY } else { 0 };
        let echo = if parts.echo { 0 } else { NO_ECHO };
        bytes.put_u8(binary | echo | (parts.frame as u8) << FRAME_SHIFT);
        bytes.put_slice(&parts.author.0);
        bytes.put_slice(parts.id.0.as_bytes());
        bytes.put_slice(parts.sender.0.as_bytes());
        bytes.put_u32(fields_len as u32);
        bytes.put_slice(parts.fields.as_bytes());
        bytes.put_slice(traced);
        bytes.put_slice(payload);
        Self(bytes.freeze())
    }

    /// Parses bytes from a log or a subscription as an envelope of `room`, without copying them. It
    /// checks all that becomes part of a frame, so that bytes that no gateway wrote are rejected.
    ///
    /// # Errors
    ///
    /// [`InvalidEnvelope`] if these bytes cannot become a frame for the clients of `room`.
    pub fn parse_for_room(bytes: Bytes, room: &RoomId) -> Result<Self, InvalidEnvelope> {
        if bytes.len() > ENVELOPE_BYTES_MAX {
            return Err(InvalidEnvelope);
        }
        let envelope = Self::from_packed(bytes)?;
        let (frame, binary) = (envelope.frame_type(), envelope.is_binary());
        let room = match (room.kind(), frame) {
            (RoomKind::Room, FrameType::Message) => Some(room.as_str()),
            (RoomKind::Inbox, FrameType::Direct | FrameType::Notification) => None,
            _ => return Err(InvalidEnvelope),
        };
        let (fields, payload) = envelope.0[HEADER_BYTES..].split_at(envelope.fields_len());
        let fits =
            if binary { fields.len() <= BINARY_FIELDS_BYTES_MAX } else { payload.is_empty() };
        let expected = ExpectedFields { frame, id: envelope.id().0, room, binary };
        if fits && expected.matches(fields) { Ok(envelope) } else { Err(InvalidEnvelope) }
    }

    /// Parses bytes that a gateway has packed, without copying them. It does not check the fields;
    /// use [`Envelope::parse_for_room`] for bytes from outside the process.
    ///
    /// # Errors
    ///
    /// [`InvalidEnvelope`] if the header or the lengths are invalid.
    pub fn from_packed(bytes: Bytes) -> Result<Self, InvalidEnvelope> {
        let envelope = Self(bytes);
        let header = envelope.0.get(..HEADER_BYTES).ok_or(InvalidEnvelope)?;
        if header[0] != VERSION
            || usize::from(header[1] >> FRAME_SHIFT) >= FrameType::ALL.len()
            || envelope.0.len() < HEADER_BYTES + envelope.fields_len()
        {
            return Err(InvalidEnvelope);
        }
        Ok(envelope)
    }

    /// The `type` of the frame that clients receive.
    pub fn frame_type(&self) -> FrameType {
        FrameType::ALL[usize::from(self.0[1] >> FRAME_SHIFT)]
    }

    /// When a node accepted the message: the `timestamp` of its frame.
    pub fn accepted_at(&self) -> Option<SystemTime> {
        const KEY: &[u8] = b"\"timestamp\":\"";
        let fields = self.fields();
        // Fields of the client come before it, so that the last one of this name counts.
        let start = fields.windows(KEY.len()).rposition(|window| window == KEY)? + KEY.len();
        let end = start + fields[start..].iter().position(|byte| *byte == b'"')?;
        let text = std::str::from_utf8(&fields[start..end]).ok()?;
        skein_protocol::parse_timestamp(text)
    }

    /// The author.
    pub fn author(&self) -> AuthorHash {
        let mut author = [0; 8];
        author.copy_from_slice(&self.0[2..10]);
        AuthorHash(author)
    }

    /// The connection of the sender.
    pub fn connection(&self) -> ConnectionId {
        ConnectionId(self.uuid_at(26))
    }

    /// Whether the sender's connection receives a copy.
    pub fn echo(&self) -> bool {
        self.0[1] & NO_ECHO == 0
    }

    /// The content of a binary message; `None` if the content is one of the fields.
    pub fn binary_payload(&self) -> Option<&[u8]> {
        self.is_binary().then(|| self.fields_and_payload().1)
    }

    /// Whether `author` sent the message.
    pub fn is_from(&self, author: AuthorHash) -> bool {
        self.0[2..10] == author.0
    }

    /// The JSON fields of the frame without braces, `type`, `epoch` and `seq`.
    pub fn fields(&self) -> &[u8] {
        self.fields_and_payload().0
    }

    /// The sender and the recipient of a direct; `None` for other frames.
    pub fn direct_users(&self) -> Option<(UserId, UserId)> {
        if self.frame_type() != FrameType::Direct {
            return None;
        }
        let from = fields::value_of(self.fields(), "from")?;
        let from = from.strip_prefix(b"{")?.strip_suffix(b"}")?;
        let sender = fields::id_in(fields::value_of(from, "id")?)?;
        let recipient = fields::id_in(fields::value_of(self.fields(), "to")?)?;
        Some((sender, recipient))
    }

    /// The span that published the message, if the message is traced.
    pub fn trace(&self) -> Option<TraceContext> {
        let traceparent = self.split_fields().1?;
        std::str::from_utf8(traceparent).ok()?.parse().ok()
    }

    /// The packed bytes.
    pub fn as_bytes(&self) -> &Bytes {
        &self.0
    }

    /// The message id.
    pub fn id(&self) -> MessageId {
        MessageId(self.uuid_at(10))
    }

    /// The dedup key.
    pub fn dedup_key(&self) -> DedupKey {
        let mut key = [0; 24];
        key.copy_from_slice(&self.0[2..26]);
        key
    }

    /// The connection that receives an `ack` in place of a copy, if the sender requested no echo.
    pub fn sender_without_echo(&self) -> Option<ConnectionId> {
        (self.0[1] & NO_ECHO != 0).then(|| ConnectionId(self.uuid_at(26)))
    }

    /// The WebSocket frame of live delivery.
    pub fn live_frame(&self, position: &Position) -> Bytes {
        self.frame(position, "")
    }

    /// The WebSocket frame of a replay, with `"replay":true`.
    pub fn replay_frame(&self, position: &Position) -> Bytes {
        self.frame(position, REPLAY)
    }

    /// The JSON text of the entry in `history`: the whole frame, a binary payload in base64.
    pub fn to_json(&self, position: &Position) -> String {
        let mut json = String::new();
        self.write_json(position, true, &mut json);
        json
    }

    /// Appends the JSON text of the frame, a binary payload in base64.
    pub(crate) fn write_json(&self, position: &Position, is_replay: bool, json: &mut String) {
        let (fields, payload) = self.fields_and_payload();
        let prefix = self.json_prefix(position, if is_replay { REPLAY } else { "" });
        let payload_len = if self.is_binary() { payload.len().div_ceil(3) * 4 + 40 } else { 0 };
        json.reserve(prefix.len() + fields.len() + payload_len + 1);
        json.push_str(&prefix);
        json.push_str(&String::from_utf8_lossy(fields));
        if self.is_binary() {
            json.push_str(r#","encoding":"base64","content":""#);
            STANDARD.encode_string(payload, json);
            json.push('"');
        }
        json.push('}');
    }

    fn frame(&self, position: &Position, replay: &str) -> Bytes {
        let prefix = self.json_prefix(position, replay);
        let (fields, payload) = self.fields_and_payload();
        if !self.is_binary() {
            return skein_websocket::encode(Opcode::Text, &[prefix.as_bytes(), fields, b"}"]);
        }
        let header_len = (prefix.len() + fields.len() + 1) as u16;
        let header_len = header_len.to_be_bytes();
        let parts = [&header_len, prefix.as_bytes(), fields, b"}", payload];
        skein_websocket::encode(Opcode::Binary, &parts)
    }

    fn json_prefix(&self, position: &Position, replay: &str) -> String {
        let (Position { epoch, seq }, kind) = (position, self.frame_type().as_str());
        if epoch.is_none() {
            return format!(r#"{{"type":"{kind}","#);
        }
        format!(r#"{{"type":"{kind}","epoch":"{epoch}","seq":{seq},{replay}"#)
    }

    fn is_binary(&self) -> bool {
        self.0[1] & BINARY != 0
    }

    fn fields_and_payload(&self) -> (&[u8], &[u8]) {
        (self.split_fields().0, &self.0[HEADER_BYTES + self.fields_len()..])
    }

    /// The fields of the frame, and the `traceparent` behind them.
    fn split_fields(&self) -> (&[u8], Option<&[u8]>) {
        let fields = &self.0[HEADER_BYTES..HEADER_BYTES + self.fields_len()];
        let traced = fields.split_last_chunk::<{ TRACE_FIELD.len() + TRACEPARENT_BYTES + 1 }>();
        let Some((frame_fields, traced)) = traced else { return (fields, None) };
        let Some(value) = traced.strip_prefix(TRACE_FIELD) else { return (fields, None) };
        let (value, quote) = value.split_at(TRACEPARENT_BYTES);
        let is_traceparent = |byte: &u8| byte.is_ascii_hexdigit() || *byte == b'-';
        if quote != b"\"" || !value.iter().all(is_traceparent) {
            return (fields, None);
        }
        (frame_fields, Some(value))
    }

    fn fields_len(&self) -> usize {
        u32::from_be_bytes([self.0[42], self.0[43], self.0[44], self.0[45]]) as usize
    }

    fn uuid_at(&self, at: usize) -> Uuid {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.0[at..at + 16]);
        Uuid::from_bytes(bytes)
    }
}

const REPLAY: &str = r#""replay":true,"#;

/// Maximum size in bytes of a binary payload whose frame, in base64, fits into `frame_bytes_max`
/// beside a header of `fields_bytes`.
pub fn binary_payload_bytes_max(frame_bytes_max: usize, fields_bytes: usize) -> usize {
    // `to_json` adds under 160 bytes to fields and payload.
    frame_bytes_max.saturating_sub(fields_bytes + 160) / 4 * 3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position() -> Position {
        Position::new("e1".parse().unwrap(), 7)
    }

    fn pack(binary: Option<&[u8]>) -> Envelope {
        Envelope::pack(EnvelopeParts {
            frame: FrameType::Message,
            author: AuthorHash::of(&"ann".parse().unwrap()),
            id: MessageId(Uuid::from_u128(1)),
            sender: ConnectionId(Uuid::from_u128(2)),
            echo: false,
            fields: r#""room":"r","content":1"#,
            binary_payload: binary,
        })
    }

    #[test]
    fn a_text_entry_becomes_a_text_frame_with_its_position() {
        let envelope = pack(None);
        let frame = envelope.live_frame(&position());
        let json = br#"{"type":"message","epoch":"e1","seq":7,"room":"r","content":1}"#;
        assert_eq!(frame[0], 0x81);
        assert_eq!(&frame[2..], json);
        assert!(envelope.to_json(&position()).contains(r#""seq":7,"replay":true,"room""#));
    }

    #[test]
    fn a_binary_entry_is_a_binary_frame_and_base64_in_json() {
        let envelope = pack(Some(&[0xFF, 0]));
        let frame = envelope.live_frame(&position());
        assert_eq!(frame[0], 0x82);
        let length = usize::from(u16::from_be_bytes([frame[2], frame[3]]));
        let header: serde_json::Value = serde_json::from_slice(&frame[4..4 + length]).unwrap();
        assert_eq!(header["seq"], 7);
        assert_eq!(&frame[4 + length..], &[0xFF, 0]);
        let json: serde_json::Value = serde_json::from_str(&envelope.to_json(&position())).unwrap();
        assert_eq!((&json["encoding"], &json["content"]), (&"base64".into(), &"/wA=".into()));
    }

    #[test]
    fn a_room_without_a_log_has_no_position() {
        let frame =
            pack(None).live_frame(&Position::new(skein_protocol::position::Epoch::none(), 0));
        assert_eq!(&frame[2..], br#"{"type":"message","room":"r","content":1}"#);
    }

    #[test]
    fn an_entry_of_an_inbox_has_another_type() {
        let envelope = Envelope::pack(EnvelopeParts {
            frame: FrameType::Direct,
            author: AuthorHash::of(&"ann".parse().unwrap()),
            id: MessageId(Uuid::nil()),
            sender: ConnectionId(Uuid::nil()),
            echo: true,
            fields: r#""to":"bob""#,
            binary_payload: None,
        });
        let json = br#"{"type":"direct","epoch":"e1","seq":7,"to":"bob"}"#;
        assert_eq!(&envelope.live_frame(&position())[2..], json);
        assert!(envelope.is_from(AuthorHash::of(&"ann".parse().unwrap())));
        let mut unknown = envelope.as_bytes().to_vec();
        unknown[1] |= 3 << FRAME_SHIFT;
        assert!(Envelope::from_packed(unknown.into()).is_err());
    }

    #[test]
    fn an_envelope_round_trips() {
        let envelope = pack(None);
        let again = Envelope::from_packed(envelope.as_bytes().clone()).unwrap();
        assert_eq!(again.id(), MessageId(Uuid::from_u128(1)));
        assert_eq!(again.sender_without_echo(), Some(ConnectionId(Uuid::from_u128(2))));
        assert_eq!(again.dedup_key()[8..], *again.id().0.as_bytes());
        assert_eq!((again.connection(), again.echo()), (ConnectionId(Uuid::from_u128(2)), false));
        assert_eq!(again.author(), AuthorHash::of(&"ann".parse().unwrap()));
        assert_eq!(AuthorHash::from_bytes(*again.author().as_bytes()), again.author());
        assert_eq!(again.binary_payload(), None);
        assert_eq!(pack(Some(b"")).binary_payload(), Some(&[][..]));
        for cut in 0..envelope.as_bytes().len() {
            assert!(Envelope::from_packed(envelope.as_bytes().slice(..cut)).is_err());
        }
    }

    #[test]
    fn a_traced_entry_has_its_trace_beside_the_frame() {
        let trace: TraceContext =
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().unwrap();
        let fields = format!(
            r#""room":"r","id":"{}","from":{{"id":"ann","name":"A"}},"content":1,"timestamp":"t""#,
            Uuid::from_u128(1)
        );
        let room: RoomId = "r".parse().unwrap();
        for binary_payload in [None, Some(&b"\"}"[..])] {
            let binary_fields = fields.replace(r#""content":1,"#, "");
            let parts = EnvelopeParts {
                frame: FrameType::Message,
                author: AuthorHash::of(&"ann".parse().unwrap()),
                id: MessageId(Uuid::from_u128(1)),
                sender: ConnectionId(Uuid::nil()),
                echo: true,
                fields: if binary_payload.is_some() { &binary_fields } else { &fields },
                binary_payload,
            };
            let (untraced, traced) =
                (Envelope::pack(parts), Envelope::pack_traced(parts, Some(trace)));
            // Checked as a node does that does not know the field, which is JSON like all others.
            let bytes = traced.as_bytes().clone();
            let received = Envelope::parse_for_room(bytes, &room).unwrap();
            assert_eq!((received.trace(), untraced.trace()), (Some(trace), None));
            // No frame has it, and the bytes of an untraced entry are those that they were.
            assert_eq!(received.fields(), untraced.fields());
            assert_eq!(received.live_frame(&position()), untraced.live_frame(&position()));
            assert_eq!(received.replay_frame(&position()), untraced.replay_frame(&position()));
            assert_eq!(received.to_json(&position()), untraced.to_json(&position()));
            assert_eq!(received.dedup_key(), untraced.dedup_key());
            assert_eq!(traced.as_bytes().len(), untraced.as_bytes().len() + 72);
        }
        // A field that only looks like it stays in the frame.
        let other = format!(r#"{fields},"traceparent":"{}""#, "\\n".repeat(27) + "x");
        let parts = EnvelopeParts {
            frame: FrameType::Message,
            author: AuthorHash::of(&"ann".parse().unwrap()),
            id: MessageId(Uuid::from_u128(1)),
            sender: ConnectionId(Uuid::nil()),
            echo: true,
            fields: &other,
            binary_payload: None,
        };
        let envelope = Envelope::pack(parts);
        assert_eq!((envelope.fields(), envelope.trace()), (other.as_bytes(), None));
    }

    #[test]
    fn an_envelope_of_another_room_is_rejected() {
        let room: RoomId = "r".parse().unwrap();
        let fields = format!(
            r#""room":"r","id":"{}","from":{{"id":"ann","name":"A"}},"content":1,"timestamp":"t""#,
            Uuid::from_u128(1)
        );
        let pack = |fields: &str, binary: Option<&[u8]>, frame| {
            Envelope::pack(EnvelopeParts {
                frame,
                author: AuthorHash::of(&"ann".parse().unwrap()),
                id: MessageId(Uuid::from_u128(1)),
                sender: ConnectionId(Uuid::nil()),
                echo: true,
                fields,
                binary_payload: binary,
            })
            .as_bytes()
            .clone()
        };
        let good = pack(&fields, None, FrameType::Message);
        assert!(Envelope::parse_for_room(good.clone(), &room).is_ok());
        assert!(Envelope::parse_for_room(good.clone(), &"s".parse().unwrap()).is_err());
        let inbox = RoomId::inbox_of(&"ann".parse().unwrap());
        assert!(Envelope::parse_for_room(good.clone(), &inbox).is_err());
        let direct = pack(&fields, None, FrameType::Direct);
        assert!(Envelope::parse_for_room(direct, &room).is_err());
        let behind = [&good[..], b"x"].concat();
        assert!(Envelope::parse_for_room(behind.into(), &room).is_err());
        let fields = fields.replace(r#""content":1,"#, "");
        assert!(
            Envelope::parse_for_room(pack(&fields, Some(b"\0"), FrameType::Message), &room).is_ok()
        );
        // The header length of a binary frame has two bytes.
        let long = format!(r#"{fields},"meta":"{}""#, "x".repeat(usize::from(u16::MAX)));
        assert!(
            Envelope::parse_for_room(pack(&long, Some(b""), FrameType::Message), &room).is_err()
        );
        let mut large = good.to_vec();
        large.resize(ENVELOPE_BYTES_MAX + 1, b'x');
        assert!(Envelope::parse_for_room(large.into(), &room).is_err());
    }

    #[test]
    fn the_largest_binary_payload_fits_in_base64() {
        let fields = r#""room":"r""#;
        let size = binary_payload_bytes_max(1_000, fields.len());
        let payload = vec![0; size];
        let envelope = Envelope::pack(EnvelopeParts {
            frame: FrameType::Message,
            author: AuthorHash::of(&"ann".parse().unwrap()),
            id: MessageId(Uuid::nil()),
            sender: ConnectionId(Uuid::nil()),
            echo: true,
            fields,
            binary_payload: Some(&payload),
        });
        let epoch = "e".repeat(32).parse().unwrap();
        let json = envelope.to_json(&Position::new(epoch, skein_protocol::position::SEQ_MAX));
        assert!(json.len() <= 1_000, "{}", json.len());
    }
}
