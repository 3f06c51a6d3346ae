//! The decoder against tungstenite's: of any stream of frames both hand out the same, and fail
//! alike.
//!
//! Ours fails earlier, by design: on a bad byte or a length that is too much as soon as it has
//! arrived, where tungstenite waits for the end of the frame. So tungstenite is given the rest of
//! such a frame, and has to fail then.

use std::io::{self, Read, Write};

use proptest::prelude::*;
use tungstenite::{
    Error, Message,
    protocol::{Role, WebSocketConfig, WebSocketContext},
};

use super::{OwnedEvent, frame, to_owned_event};
use crate::{CodecError, Decoder};

/// How a stream failed, as its close code tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DecodeFailure {
    Protocol,
    InvalidUtf8,
    MessageTooBig,
}

/// What a stream came to.
#[derive(Debug, PartialEq, Eq)]
struct DecodeOutcome {
    got: Vec<OwnedEvent>,
    failure: Option<DecodeFailure>,
}

/// A socket that has received `input` and nothing more.
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

/// The length that a header states, in how many bytes it stands, and how long the header is; what
/// is missing of it counts as 0.
fn length_at(bytes: &[u8]) -> (u64, usize, usize) {
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

/// Where the first frame begins whose length is not in its shortest form, and how many bytes the
/// last frame lacks.
fn walk(bytes: &[u8]) -> (Option<usize>, u64) {
    let mut at = 0_u64;
    while at < bytes.len() as u64 {
        let rest = &bytes[at as usize..];
        let (length, size, header) = length_at(rest);
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
    // tungstenite takes lengths in any form; RFC 6455, section 5.2, does not.
    let (long_form, _) = walk(bytes);
    let mut socket = Socket(&bytes[..long_form.unwrap_or(bytes.len())]);
    let mut got = Vec::new();
    let mut failure = long_form.map(|_| DecodeFailure::Protocol);
    loop {
        match context.read(&mut socket) {
            Ok(Message::Text(text)) => got.push(OwnedEvent::Text(text.to_string())),
            Ok(Message::Binary(bytes)) => got.push(OwnedEvent::Binary(bytes.into())),
            Ok(Message::Ping(bytes)) => got.push(OwnedEvent::Ping(bytes.into())),
            Ok(Message::Pong(bytes)) => got.push(OwnedEvent::Pong(bytes.into())),
            // What it answers to a code that may not be sent.
            Ok(Message::Close(Some(close))) if close.reason.as_str() == "Protocol violation" => {
                failure = Some(DecodeFailure::Protocol);
                break;
            }
            Ok(Message::Close(close)) => {
                let own = |close: tungstenite::protocol::CloseFrame| {
                    (close.code.into(), close.reason.to_string())
                };
                got.push(OwnedEvent::Close(close.map(own)));
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
    DecodeOutcome { got, failure }
}

fn ours(bytes: &[u8], max: usize, mut piece: impl FnMut() -> usize) -> DecodeOutcome {
    let mut decoder = Decoder::new(max);
    let mut got = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at(piece().clamp(1, rest.len()));
        rest = behind;
        let mut piece = piece.to_vec();
        let mut used = 0;
        while used < piece.len() {
            match decoder.next(&mut piece[used..]) {
                Ok((more, received)) => {
                    used += more;
                    got.extend(received.and_then(to_owned_event));
                }
                Err(error) => {
                    let failure = match error {
                        CodecError::Protocol(_) => DecodeFailure::Protocol,
                        CodecError::InvalidUtf8 | CodecError::InvalidDeflate => {
                            DecodeFailure::InvalidUtf8
                        }
                        CodecError::MessageTooBig => DecodeFailure::MessageTooBig,
                    };
                    return DecodeOutcome { got, failure: Some(failure) };
                }
            }
            if matches!(got.last(), Some(OwnedEvent::Close(_))) {
                return DecodeOutcome { got, failure: None };
            }
        }
        decoder.release();
    }
    DecodeOutcome { got, failure: None }
}

/// Compares what both make of `bytes`, which ours gets in pieces.
pub(super) fn compare(
    bytes: &[u8],
    max: usize,
    piece: impl FnMut() -> usize,
) -> Result<(), String> {
    let ours = ours(bytes, max, piece);
    // Registered since; tungstenite does not know it.
    if let Some(OwnedEvent::Close(Some((1014, _)))) = ours.got.last() {
        return Ok(());
    }
    let theirs = match ours.failure {
        None => theirs(bytes, max),
        Some(_) => {
            let missing = walk(bytes).1.min(2 * max as u64 + 256);
            theirs(&[bytes, &vec![0; missing as usize]].concat(), max)
        }
    };
    let alike = match (ours.failure, theirs.failure) {
        // A frame may break several rules, and ours judges by its first two bytes first.
        (Some(DecodeFailure::Protocol), Some(_)) => true,
        (ours, theirs) => ours == theirs,
    };
    if ours.got == theirs.got && alike {
        return Ok(());
    }
    Err(format!("ours: {ours:?}\ntheirs: {theirs:?}\nof {bytes:02x?}"))
}

/// Frames as clients send them, and some that break a rule.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let opcode = prop_oneof![8 => Just(0), 8 => Just(1), 4 => Just(2), 1 => 3..8_u8, 1 => Just(8),
        3 => Just(9), 2 => Just(10), 1 => 11..16_u8];
    let text = prop_oneof![
        ".{0,40}".prop_map(String::into_bytes),
        // Cut anywhere, so that characters go on in the next fragment.
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

    /// On streams of frames, whole or ending in the middle of one.
    #[test]
    fn both_decode_alike(
        frames in proptest::collection::vec(frames(), 1..8),
        cut in 0..3_usize,
        pieces in proptest::collection::vec(1..60_usize, 1..8),
    ) {
        let mut bytes = frames.concat();
        bytes.truncate(bytes.len() - cut.min(bytes.len()));
        let mut pieces = pieces.iter().cycle();
        let piece = || *pieces.next().unwrap();
        prop_assert_eq!(compare(&bytes, 250, piece), Ok(()));
    }
}
