//! The encodings of server frames: one for each kind of transport, chosen by the outbox.
//!
//! A frame for many receivers is encoded once in each encoding that they use, and never for each of
//! them ([`SharedFrame`]).

use bytes::Bytes;
use serde_json::value::RawValue;
use skein_protocol::{
    ids::{RoomId, RoomKind},
    position::Position,
    protocol::server_frame::ServerFrame,
};
use skein_websocket::{
    Opcode,
    deflate::{compress_frame, frame_payload},
    extension::WindowBits,
};
use smallvec::SmallVec;

use crate::{delivery::Entry, telemetry::metrics::Metrics};

/// The form in which an outbox queues frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// WebSocket frames.
    WebSocket,
    /// WebSocket frames, messages compressed.
    Deflate(DeflateOptions),
    /// JSON text, after the position to which it moves its reader: [`JsonFrame`].
    Json,
}

impl Encoding {
    /// Encodes a frame for one receiver.
    pub(super) fn encode(self, frame: &ServerFrame<Box<RawValue>>, metrics: &Metrics) -> Bytes {
        let json = serde_json::to_vec(frame).expect("a frame is JSON");
        match self {
            Self::WebSocket => websocket_text(&json),
            Self::Deflate(options) => options.frame(&websocket_text(&json), metrics),
            Self::Json => FrameContent::Json(json.into()).json(None),
        }
    }
}

fn websocket_text(json: &[u8]) -> Bytes {
    skein_websocket::encode(Opcode::Text, &[json])
}

/// The compression of messages to one client. Clients with equal options share the compressed
/// frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeflateOptions {
    /// The window that the client negotiated.
    pub window: WindowBits,
    /// The least size of a compressed message, in bytes.
    pub bytes_min: usize,
}

impl DeflateOptions {
    /// Compresses a message. Small messages and messages that would not shrink are returned
    /// unchanged.
    pub(super) fn frame(self, frame: &Bytes, metrics: &Metrics) -> Bytes {
        if frame_payload(frame).len() < self.bytes_min {
            return frame.clone();
        }
        let Some(compressed) = compress_frame(frame, self.window) else { return frame.clone() };
        metrics.deflated_messages.inc();
        metrics.deflate_input_bytes.inc_by(frame.len() as u64);
        metrics.deflate_output_bytes.inc_by(compressed.len() as u64);
        compressed
    }
}

/// A frame for any number of receivers, encoded on first use in each encoding.
#[derive(Debug)]
pub struct SharedFrame<'a> {
    content: FrameContent<'a>,
    /// The log that the frame belongs to, and the position in it to which the frame moves its
    /// reader.
    position: Option<(&'a RoomId, &'a Position)>,
    is_compressed: bool,
    websocket: Option<Bytes>,
    deflated: SmallVec<[(DeflateOptions, Bytes); 1]>,
    json: Option<Bytes>,
}

#[derive(Debug)]
enum FrameContent<'a> {
    Json(Bytes),
    Entry { entry: &'a Entry, is_replay: bool },
}

impl<'a> SharedFrame<'a> {
    /// A frame that is not an entry.
    pub fn of(frame: &ServerFrame<Box<RawValue>>) -> Self {
        Self::of_json(serde_json::to_vec(frame).expect("a frame is JSON").into())
    }

    /// A frame that is not an entry, as JSON text.
    pub fn of_json(json: Bytes) -> Self {
        Self::new(FrameContent::Json(json), None)
    }

    /// The frame of an entry, as it is delivered live.
    pub(crate) fn live(room: &'a RoomId, entry: &'a Entry) -> Self {
        Self::entry(room, entry, false)
    }

    /// The frame of an entry that is delivered from the log.
    pub(crate) fn replay(room: &'a RoomId, entry: &'a Entry) -> Self {
        Self::entry(room, entry, true)
    }

    fn entry(room: &'a RoomId, entry: &'a Entry, is_replay: bool) -> Self {
        // An entry of a room without a log has no position.
        let position = Some((room, &entry.position)).filter(|(_, at)| !at.epoch.is_none());
        Self::new(FrameContent::Entry { entry, is_replay }, position)
    }

    fn new(content: FrameContent<'a>, position: Option<(&'a RoomId, &'a Position)>) -> Self {
        let deflated = SmallVec::new();
        Self { content, position, is_compressed: true, websocket: None, deflated, json: None }
    }

    /// Sets the position to which the frame moves its reader.
    pub(crate) fn moving_to(self, room: &'a RoomId, position: &'a Position) -> Self {
        Self { position: Some((room, position)), ..self }
    }

    /// As the frame, never compressed.
    pub(crate) fn uncompressed(self) -> Self {
        Self { is_compressed: false, ..self }
    }

    /// The frame in an encoding.
    pub(super) fn encoded(&mut self, encoding: Encoding, metrics: &Metrics) -> &Bytes {
        let Self { content, position, is_compressed, websocket, deflated, json } = self;
        if encoding == Encoding::Json {
            return json.get_or_insert_with(|| content.json(*position));
        }
        let plain = websocket.get_or_insert_with(|| content.websocket());
        let Encoding::Deflate(options) = encoding else { return plain };
        if !*is_compressed {
            return plain;
        }
        let index = deflated.iter().position(|(of, _)| *of == options).unwrap_or_else(|| {
            deflated.push((options, options.frame(plain, metrics)));
            deflated.len() - 1
        });
        &deflated[index].1
    }
}

impl FrameContent<'_> {
    fn websocket(&self) -> Bytes {
        match self {
            Self::Json(json) => websocket_text(json),
            Self::Entry { entry, is_replay: false } => entry.envelope.live_frame(&entry.position),
            Self::Entry { entry, is_replay: true } => entry.envelope.replay_frame(&entry.position),
        }
    }

    fn json(&self, position: Option<(&RoomId, &Position)>) -> Bytes {
        let mut frame = match position {
            None => "\n".to_owned(),
            Some((room, position)) => {
                let room = if room.kind() == RoomKind::Room { room.as_str() } else { "" };
                format!("{room}~{position}\n")
            }
        };
        match self {
            Self::Json(json) => frame.push_str(&String::from_utf8_lossy(json)),
            Self::Entry { entry, is_replay } => {
                entry.envelope.write_json(&entry.position, *is_replay, &mut frame);
            }
        }
        frame.into()
    }
}

/// A frame in the encoding [`Encoding::Json`]. Its bytes are one line with the position,
/// `[<room>]~<epoch>:<seq>` or empty, and then the JSON text: an outbox queues plain bytes in
/// every encoding, and the reader of these parses no JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonFrame<'a> {
    /// The room, `None` for the inbox, and the position in its log to which the frame moves its
    /// reader.
    pub position: Option<(Option<RoomId>, Position)>,
    /// The JSON text.
    pub text: &'a str,
}

impl<'a> JsonFrame<'a> {
    /// Parses a frame that an outbox has queued; `None` for bytes of another encoding.
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        let (position, text) = std::str::from_utf8(frame).ok()?.split_once('\n')?;
        let position = match position.split_once('~') {
            None => None,
            Some(("", position)) => Some((None, position.parse().ok()?)),
            Some((room, position)) => Some((Some(room.parse().ok()?), position.parse().ok()?)),
        };
        Some(Self { position, text })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use skein_protocol::{
        ids::{ConnectionId, MessageId, UserId},
        position::Epoch,
        protocol::server_frame::TypingFrame,
    };

    use super::*;
    use crate::{
        delivery::ServerId,
        envelope::{AuthorHash, Envelope, EnvelopeParts},
    };

    fn entry(epoch: Epoch, content: &str, binary_payload: Option<&[u8]>) -> Entry {
        let user: UserId = "ann".parse().unwrap();
        let envelope = Envelope::pack(EnvelopeParts {
            frame: Default::default(),
            author: AuthorHash::of(&user),
            id: MessageId::random(),
            sender: ConnectionId::random(),
            echo: true,
            fields: &format!(r#""room":"r"{content}"#),
            binary_payload,
        });
        Entry { position: Position::new(epoch, 7), origin: ServerId::default(), envelope }
    }

    fn epoch() -> Epoch {
        "1-e".parse().unwrap()
    }

    fn json_of(mut frame: SharedFrame<'_>) -> (Option<(Option<RoomId>, Position)>, String) {
        let bytes = frame.encoded(Encoding::Json, &Metrics::default()).clone();
        let JsonFrame { position, text } = JsonFrame::parse(&bytes).unwrap();
        (position, text.to_owned())
    }

    #[test]
    fn a_frame_is_encoded_once_in_each_encoding() {
        let (room, metrics) = ("r".parse().unwrap(), Metrics::default());
        let content = format!(r#","content":"{}""#, "x".repeat(1000));
        let entry = entry(epoch(), &content, None);
        let deflate =
            |bytes_min| Encoding::Deflate(DeflateOptions { window: WindowBits::MAX, bytes_min });
        let encodings = [Encoding::WebSocket, deflate(100), deflate(10_000), Encoding::Json];
        let mut frame = SharedFrame::live(&room, &entry);
        let all: Vec<Bytes> =
            encodings.iter().map(|of| frame.encoded(*of, &metrics).clone()).collect();
        assert!(all[1].len() < 100 && all[1] != all[0] && all[2] == all[0] && all[3] != all[0]);
        for (encoding, first) in encodings.iter().zip(&all) {
            let again = frame.encoded(*encoding, &metrics);
            assert_eq!(again.as_ptr(), first.as_ptr(), "{encoding:?} shares its bytes");
        }
        assert_eq!(metrics.deflated_messages.get(), 1);
        let mut plain = SharedFrame::replay(&room, &entry).uncompressed();
        let replay = entry.envelope.replay_frame(&entry.position);
        assert_eq!(plain.encoded(encodings[1], &metrics), &replay);
    }

    #[test]
    fn json_has_the_text_of_a_websocket_frame_and_the_position() {
        let (room, inbox): (RoomId, _) =
            ("a:b".parse().unwrap(), RoomId::inbox_of(&"ann".parse().unwrap()));
        let live = entry(
            epoch(),
            r#","content":[1,
2]"#,
            None,
        );
        let (position, text) = json_of(SharedFrame::live(&room, &live));
        assert_eq!(position, Some((Some(room.clone()), live.position.clone())));
        let websocket = live.envelope.live_frame(&live.position);
        assert_eq!(text.as_bytes(), frame_payload(&websocket));
        let (position, text) = json_of(SharedFrame::replay(&inbox, &live));
        assert_eq!(position, Some((None, live.position.clone())));
        assert_eq!(text, live.envelope.to_json(&live.position));
        let binary = entry(epoch(), "", Some(&[0, 255]));
        let (_, text) = json_of(SharedFrame::live(&room, &binary));
        let header = r#"{"type":"message","epoch":"1-e","seq":7,"room":"r""#;
        assert_eq!(text, format!(r#"{header},"encoding":"base64","content":"AP8="}}"#));
        let ephemeral = entry(Epoch::none(), r#","content":1"#, None);
        let (position, text) = json_of(SharedFrame::live(&room, &ephemeral));
        assert_eq!((position, &*text), (None, r#"{"type":"message","room":"r","content":1}"#));
    }

    #[test]
    fn a_frame_that_is_no_entry_may_have_a_position() {
        let room: RoomId = "r".parse().unwrap();
        let typing =
            TypingFrame { room: room.clone(), user: "u".parse().unwrap(), is_typing: true };
        let frame = ServerFrame::Typing(typing);
        let (position, text) = json_of(SharedFrame::of(&frame));
        assert_eq!((position, text), (None, serde_json::to_string(&frame).unwrap()));
        let at = Position::new(epoch(), 0);
        let (position, _) = json_of(SharedFrame::of(&frame).moving_to(&room, &at));
        assert_eq!(position, Some((Some(room), at)));
        let json = json!({"a": 1}).to_string();
        assert_eq!(json_of(SharedFrame::of_json(json.clone().into())).1, json);
        assert_eq!(JsonFrame::parse(b"\x81\x02{}"), None);
    }
}
