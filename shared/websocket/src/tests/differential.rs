//! The decoder against tungstenite's: for any stream of frames both return the same events and fail
//! alike.
//!
//! Ours fails earlier by design: at an invalid byte or a length beyond the limit as soon as it has
//! arrived, where tungstenite waits for the end of the frame. So tungstenite also receives the rest
//! of such a frame, and must fail then.

use std::io::{self, Read, Write};

use proptest::prelude::*;
use tungstenite::{
    Error, Message,
    protocol::{Role, WebSocketConfig, WebSocketContext},
};

use super::{OwnedEvent, frame, to_owned_event};
use crate::{CodecError, Decoder};

/// How a stream failed, by close code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DecodeFailure {
    Protocol,
    InvalidUtf8,
    MessageTooBig,
}

/// The result of decoding a stream.
#[derive(Debug, PartialEq, Eq)]
struct DecodeOutcome {
    events: Vec<OwnedEvent>,
    failure: Option<DecodeFailure>,
}

/// A socket that has received these bytes and nothing more.
struct Socket<'a>(&'a [u8]);

impl Read for Socket<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer) {
            Ok(0) => Err(io::ErrorKind::WouldBlock.into()),
            other => other,
        }
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The payload length that a header states, the size of its length field, and the size of the
/// header. Missing bytes count as 0.
fn header_at(bytes: &[u8]) -> (u64, usize, usize) {
    let byte = |i: usize| u64::from(bytes.get(i).copied().unwrap_or(0));
    let (form, mask) = (byte(1) & 0x7F, if byte(1) & 0x80 == 0 { 0 } else { 4 });
    let size = match form {
        126 => 2,
        127 => 8,
        _ => return (form, 0, 2 + mask),
    };
    let length = (0..size).fold(0, |length, i| length << 8 | byte(2 + i));
    (length, size, 2 + size + mask)
}

/// The offset of the first frame whose length is not in its shortest form, and the number of bytes
/// that the last frame lacks.
fn scan_frames(bytes: &[u8]) -> (Option<usize>, u64) {
    let mut at = 0_u64;
    while at < bytes.len() as u64 {
        let rest = &bytes[at as usize..];
        let (length, size, header) = header_at(rest);
        let whole = rest.len() >= header;
        if whole && (size == 2 && length < 126 || size == 8 && length < 0x1_0000) {
            return (Some(at as usize), 0);
        }
        at = at.saturating_add(header as u64).saturating_add(length);
    }
    (None, at - bytes.len() as u64)
}

fn theirs(bytes: &[u8], max: usize) -> DecodeOutcome {
    let config = WebSocketConfig::default()
        .max_message_size(Some(max))
        .max_frame_size(Some(max.max(125)))
        .accept_unmasked_frames(false);
    let mut context = WebSocketContext::new(Role::Server, Some(config));
    // tungstenite accepts lengths in any form; RFC 6455, section 5.2, does not.
    let (long_form, _) = scan_frames(bytes);
    let mut socket = Socket(&bytes[..long_form.unwrap_or(bytes.len())]);
    let mut events = Vec::new();
    let mut failure = long_form.map(|_| DecodeFailure::Protocol);
    loop {
        match context.read(&mut socket) {
            Ok(Message::Text(text)) => events.push(OwnedEvent::Text(text.to_string())),
            Ok(Message::Binary(bytes)) => events.push(OwnedEvent::Binary(bytes.into())),
            Ok(Message::Ping(bytes)) => events.push(OwnedEvent::Ping(bytes.into())),
            Ok(Message::Pong(bytes)) => events.push(OwnedEvent::Pong(bytes.into())),
            // The answer of tungstenite to a code that must not be sent.
            Ok(Message::Close(Some(close))) if close.reason.as_str() == "Protocol violation" => {
                failure = Some(DecodeFailure::Protocol);
                break;
            }
            Ok(Message::Close(close)) => {
                let own = |close: tungstenite::protocol::CloseFrame| {
                    (close.code.into(), close.reason.to_string())
                };
                events.push(OwnedEvent::Close(close.map(own)));
                failure = None;
                break;
            }
            Ok(Message::Frame(_)) => unreachable!("no raw frames are read"),
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(Error::Utf8(_)) => {
                failure = Some(DecodeFailure::InvalidUtf8);
                break;
            }
            Err(Error::Capacity(_)) => {
                failure = Some(DecodeFailure::MessageTooBig);
                break;
            }
            Err(_) => {
                failure = Some(DecodeFailure::Protocol);
                break;
            }
        }
    }
    DecodeOutcome { events, failure }
}

fn ours(bytes: &[u8], max: usize, mut chunk_size: impl FnMut() -> usize) -> DecodeOutcome {
    let mut decoder = Decoder::new(max);
    let mut events = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (chunk, behind) = rest.split_at(chunk_size().clamp(1, rest.len()));
        rest = behind;
        let mut chunk = chunk.to_vec();
        let mut used = 0;
        while used < chunk.len() {
            match decoder.next(&mut chunk[used..]) {
                Ok((more, received)) => {
                    used += more;
                    events.extend(received.and_then(to_owned_event));
                }
                Err(error) => {
                    let failure = match error {
                        CodecError::Protocol(_) => DecodeFailure::Protocol,
                        CodecError::InvalidUtf8 | CodecError::InvalidDeflate => {
                            DecodeFailure::InvalidUtf8
                        }
                        CodecError::MessageTooBig => DecodeFailure::MessageTooBig,
                    };
                    return DecodeOutcome { events, failure: Some(failure) };
                }
            }
            if matches!(events.last(), Some(OwnedEvent::Close(_))) {
                return DecodeOutcome { events, failure: None };
            }
        }
        decoder.release();
    }
    DecodeOutcome { events, failure: None }
}

/// Compares the results of both decoders for `bytes`, which ours receives in chunks.
pub(super) fn compare(
    bytes: &[u8],
    max: usize,
    chunk_size: impl FnMut() -> usize,
) -> Result<(), String> {
    let ours = ours(bytes, max, chunk_size);
    // Registered later; tungstenite does not know it.
    if let Some(OwnedEvent::Close(Some((1014, _)))) = ours.events.last() {
        return Ok(());
    }
    let theirs = match ours.failure {
        None => theirs(bytes, max),
        Some(_) => {
            let missing = scan_frames(bytes).1.min(2 * max as u64 + 256);
            theirs(&[bytes, &vec![0; missing as usize]].concat(), max)
        }
    };
    let alike = match (ours.failure, theirs.failure) {
        // A frame can violate several rules, and ours checks its first two bytes first.
        (Some(DecodeFailure::Protocol), Some(_)) => true,
        (ours, theirs) => ours == theirs,
    };
    if ours.events == theirs.events && alike {
        return Ok(());
    }
    Err(format!("ours: {ours:?}\ntheirs: {theirs:?}\nof {bytes:02x?}"))
}

/// Frames as clients send them, and some that violate a rule.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let opcode = prop_oneof![8 => Just(0), 8 => Just(1), 4 => Just(2), 1 => 3..8_u8, 1 => Just(8),
        3 => Just(9), 2 => Just(10), 1 => 11..16_u8];
    let text = prop_oneof![
        ".{0,40}".prop_map(String::into_bytes),
        // Split anywhere, so that characters continue in the next fragment.
        (".{1,40}", 0..40_usize).prop_map(|(text, cut)| {
            let bytes = text.into_bytes();
            bytes[..cut.min(bytes.len())].to_vec()
        }),
        proptest::collection::vec(any::<u8>(), 0..30),
        proptest::collection::vec(Just(b'x'), 100..300),
    ];
    let close = (990..1020_u16, "[a-z]{0,5}")
        .prop_map(|(code, reason)| [&code.to_be_bytes()[..], reason.as_bytes()].concat());
    let rare = |n: u32| (0..n).prop_map(|roll| roll == 0);
    (opcode, text, close, rare(3), rare(40), rare(40)).prop_map(
        |(opcode, text, close, open, reserved, bare)| {
            let payload = if opcode == 8 { close } else { text };
            let mut bytes = frame(!open || opcode >= 8, opcode, &payload);
            if reserved {
                bytes[0] |= 0x20;
            }
            if bare {
                bytes[1] &= 0x7F;
            }
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Streams of frames that end with a frame or in the middle of one.
    #[test]
    fn both_decoders_agree(
        frames in proptest::collection::vec(frames(), 1..8),
        cut in 0..3_usize,
        sizes in proptest::collection::vec(1..60_usize, 1..8),
    ) {
        let mut bytes = frames.concat();
        bytes.truncate(bytes.len() - cut.min(bytes.len()));
        let mut sizes = sizes.iter().cycle();
        let chunk_size = || *sizes.next().unwrap();
        prop_assert_eq!(compare(&bytes, 250, chunk_size), Ok(()));
    }
}
