use flate2::FlushCompress;
use proptest::prelude::*;

use super::*;

mod differential;
mod fuzz;

/// An owned copy of a decoder event, to compare.
#[derive(Clone, Debug, PartialEq, Eq)]
enum OwnedEvent {
    Text(String),
    Binary(Vec<u8>),
    Ping(Vec<u8>),
    Pong(Vec<u8>),
    Close(Option<(u16, String)>),
}

/// Copies an event; `None` for a fragment, whose message follows.
fn to_owned_event(received: DecoderEvent<'_>) -> Option<OwnedEvent> {
    Some(match received {
        DecoderEvent::Text(text) => OwnedEvent::Text(text.into()),
        DecoderEvent::Binary(bytes) => OwnedEvent::Binary(bytes.into()),
        DecoderEvent::Ping(bytes) => OwnedEvent::Ping(bytes.into()),
        DecoderEvent::Pong(bytes) => OwnedEvent::Pong(bytes.into()),
        DecoderEvent::Close(close) => {
            OwnedEvent::Close(close.map(|(code, reason)| (code, reason.into())))
        }
        DecoderEvent::Fragment(_) => return None,
    })
}

/// A masked frame of a client.
pub(super) fn frame(fin: bool, opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x37, 0xFA, 0x21, 0x3D];
    let mut frame = vec![if fin { 0x80 } else { 0 } | opcode];
    match payload.len() {
        length @ 0..=125 => frame.push(0x80 | length as u8),
        length @ 126..=0xFFFF => {
            frame.push(0x80 | 126);
            frame.extend((length as u16).to_be_bytes());
        }
        length => {
            frame.push(0x80 | 127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend(mask);
    frame.extend(payload.iter().enumerate().map(|(i, byte)| byte ^ mask[i % 4]));
    frame
}

/// Decodes `bytes` in chunks of `chunk_size` and returns all events, or the first error.
fn decode(bytes: &[u8], chunk_size: usize, max: usize) -> Result<Vec<OwnedEvent>, CodecError> {
    let mut decoder = Decoder::new(max);
    let mut got = Vec::new();
    for chunk in bytes.chunks(chunk_size) {
        let mut chunk = chunk.to_vec();
        let mut used = 0;
        while used < chunk.len() {
            let (more, received) = decoder.next(&mut chunk[used..])?;
            used += more;
            got.extend(received.and_then(to_owned_event));
        }
    }
    Ok(got)
}

#[track_caller]
fn check(frames: &[Vec<u8>], expected: Result<&[OwnedEvent], CodecError>) {
    let bytes = frames.concat();
    for chunk_size in [1, 2, 3, 5, 7, 64, bytes.len().max(1)] {
        let got = decode(&bytes, chunk_size, 1 << 20);
        assert_eq!(got.as_deref(), expected.as_ref().map(|got| *got), "in chunks of {chunk_size}");
    }
}

fn text(text: &str) -> OwnedEvent {
    OwnedEvent::Text(text.into())
}

#[test]
fn whole_messages_of_every_length_form() {
    for length in [0, 1, 125, 126, 127, 65_535, 65_536] {
        let payload = vec![7; length];
        check(&[frame(true, 2, &payload)], Ok(&[OwnedEvent::Binary(payload)]));
    }
    check(&[frame(true, 1, "grüße 🐧".as_bytes())], Ok(&[text("grüße 🐧")]));
}

#[test]
fn fragments_are_joined_across_control_frames() {
    check(
        &[frame(false, 1, b"a"), frame(true, 9, b"p"), frame(false, 0, b""), frame(true, 0, b"b")],
        Ok(&[OwnedEvent::Ping(b"p".to_vec()), text("ab")]),
    );
}

#[test]
fn a_message_after_a_buffered_one_starts_empty() {
    check(
        &[frame(false, 1, b"a"), frame(true, 0, b"b"), frame(false, 2, b"c"), frame(true, 0, b"")],
        Ok(&[text("ab"), OwnedEvent::Binary(b"c".to_vec())]),
    );
}

#[test]
fn a_split_character_is_valid_and_a_bad_byte_fails_at_once() {
    check(&[frame(false, 1, &[0xC3]), frame(true, 0, &[0xA4])], Ok(&[text("ä")]));
    check(&[frame(true, 1, &[0xC3])], Err(CodecError::InvalidUtf8));
    let mut decoder = Decoder::new(1 << 20);
    let mut start = frame(false, 1, &[0xC0, b'a', b'b']);
    // The first of three bytes is invalid: the other two need not arrive.
    start.truncate(start.len() - 2);
    assert_eq!(decoder.next(&mut start), Err(CodecError::InvalidUtf8));
}

#[test]
fn violations_of_the_rfc_are_rejected() {
    let protocol = |frames: &[Vec<u8>]| {
        let got = decode(&frames.concat(), 1, 1 << 20);
        assert!(matches!(got, Err(CodecError::Protocol(_))), "{got:?}");
    };
    protocol(&[vec![0xC1, 0x80]]);
    protocol(&[vec![0x83, 0x80]]);
    protocol(&[vec![0x81, 0x01]]);
    protocol(&[frame(false, 9, b"")]);
    protocol(&[vec![0x89, 0x80 | 126]]);
    protocol(&[frame(true, 0, b"")]);
    protocol(&[frame(false, 1, b""), frame(true, 1, b"")]);
    protocol(&[frame(true, 8, b"x")]);
    // Lengths not in their shortest form, and one of more than 63 bits.
    protocol(&[vec![0x82, 0x80 | 126, 0, 125, 1, 2, 3, 4]]);
    protocol(&[vec![0x82, 0x80 | 127, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 1, 2, 3, 4]]);
    protocol(&[vec![0x82, 0x80 | 127, 0x80, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]]);
    for code in [0_u16, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000] {
        protocol(&[frame(true, 8, &code.to_be_bytes())]);
    }
}

#[test]
fn rsv1_is_allowed_on_first_frames_if_negotiated() {
    let compressed = [0xF2, 0x48, 0xCD, 0xC9, 0xC9, 0x07, 0x00];
    let decode = |decoder: Decoder, frames: &[Vec<u8>]| {
        let (mut decoder, mut bytes) = (decoder, frames.concat());
        let (mut used, mut got) = (0, vec![]);
        while used < bytes.len() {
            let (more, received) = decoder.next(&mut bytes[used..])?;
            used += more;
            got.extend(received.and_then(to_owned_event));
        }
        Ok(got)
    };
    let whole = [frame(true, 0x41, &compressed)];
    let split = [frame(false, 0x41, &compressed[..2]), frame(true, 0, &compressed[2..])];
    for frames in [&whole[..], &split] {
        assert_eq!(decode(Decoder::with_deflate(100), frames), Ok(vec![text("Hello")]));
        let rejected = decode(Decoder::new(100), frames);
        assert!(matches!(rejected, Err(CodecError::Protocol(_))), "{rejected:?}");
    }
    for frames in [
        &[frame(true, 0x49, b"")][..],
        &[frame(true, 0x4A, b"")],
        &[frame(true, 0x48, b"")],
        &[frame(true, 0x43, b"")],
        &[frame(true, 0x61, b"")],
        &[frame(true, 0x51, b"")],
        &[frame(false, 0x41, &compressed[..2]), frame(true, 0x40, &compressed[2..])],
        &[frame(false, 0x01, b"a"), frame(true, 0x40, b"b")],
    ] {
        let rejected = decode(Decoder::with_deflate(100), frames);
        assert!(matches!(rejected, Err(CodecError::Protocol(_))), "{frames:02x?}: {rejected:?}");
    }
    let bad = decode(Decoder::with_deflate(100), &[frame(true, 0x42, b"\x06")]);
    assert_eq!(bad, Err(CodecError::InvalidDeflate));
    // The inflated character is incomplete, so only inflation shows the fault.
    let cut = deflate::tests::compress(&[&[0xC3]], 15, 6, FlushCompress::Sync);
    let bad = decode(Decoder::with_deflate(100), &[frame(true, 0x41, &cut)]);
    assert_eq!(bad, Err(CodecError::InvalidUtf8));
}

#[test]
fn close_frames_carry_code_and_reason() {
    check(&[frame(true, 8, b"")], Ok(&[OwnedEvent::Close(None)]));
    let payload = [&1000_u16.to_be_bytes()[..], b"bye"].concat();
    check(&[frame(true, 8, &payload)], Ok(&[OwnedEvent::Close(Some((1000, "bye".into())))]));
    let payload = [&1000_u16.to_be_bytes()[..], &[0xFF]].concat();
    check(&[frame(true, 8, &payload)], Err(CodecError::InvalidUtf8));
}

#[test]
fn the_limit_applies_to_messages_and_fails_at_the_header() {
    let fits = [frame(false, 2, &[0; 6]), frame(true, 0, &[0; 4])].concat();
    assert_eq!(decode(&fits, 3, 10), Ok(vec![OwnedEvent::Binary(vec![0; 10])]));
    let big = [frame(false, 2, &[0; 6]), frame(true, 0, &[0; 5])].concat();
    assert_eq!(decode(&big, 3, 10), Err(CodecError::MessageTooBig));
    // No byte of the payload has arrived yet.
    assert_eq!(decode(&frame(true, 2, &[0; 11])[..6], 6, 10), Err(CodecError::MessageTooBig));
    // Control frames have a limit of their own.
    assert!(decode(&frame(true, 9, &[0; 125]), 6, 10).is_ok());
}

#[test]
fn no_memory_is_held_once_all_events_are_handled() {
    let mut decoder = Decoder::with_deflate(1 << 20);
    let compressed = deflate::tests::compress(&[&[7; 100_000]], 15, 6, FlushCompress::Sync);
    for stream in [
        frame(true, 0x42, &compressed),
        [frame(false, 0x42, &compressed[..20]), frame(true, 0, &compressed[20..])].concat(),
        [frame(false, 2, &[7; 5000]), frame(true, 0, &[7; 5000])].concat(),
        frame(true, 1, &[b'x'; 5000]),
        frame(true, 9, &[7; 125]),
    ] {
        for size in [3, 1000, stream.len()] {
            let mut arrived = 0;
            for chunk in stream.chunks(size) {
                arrived += chunk.len();
                let mut chunk = chunk.to_vec();
                let mut used = 0;
                while used < chunk.len() {
                    used += decoder.next(&mut chunk[used..]).unwrap().0;
                }
                decoder.release();
                let held = decoder.message_bytes.capacity() + decoder.control.capacity();
                // A vector grows by doubling.
                assert!(held <= 2 * arrived, "{held} bytes held of {arrived} received");
            }
            let held = decoder.message_bytes.capacity() + decoder.control.capacity();
            assert_eq!(held, 0, "in chunks of {size}");
        }
    }
}

#[test]
fn a_close_reason_is_cut_at_a_character_boundary() {
    let frame = encode_close(1008, &"ä".repeat(70));
    assert_eq!(frame.len(), 2 + 2 + 122);
    assert!(std::str::from_utf8(&frame[4..]).is_ok());
}

proptest! {
    /// The same messages result, however the stream is split into reads.
    #[test]
    fn splitting_reads_does_not_change_the_messages(
        messages in proptest::collection::vec((any::<bool>(), ".{0,200}", 1_usize..5), 1..6),
        chunk_size in 1_usize..300,
    ) {
        let mut bytes = Vec::new();
        let mut expected = Vec::new();
        for (ping, message, fragments) in &messages {
            let payload = message.as_bytes();
            let size = payload.len().div_ceil(*fragments).max(1);
            let mut parts: Vec<&[u8]> = payload.chunks(size).collect();
            if parts.is_empty() {
                parts.push(b"");
            }
            let last = parts.len() - 1;
            for (i, part) in parts.iter().enumerate() {
                bytes.extend(frame(i == last, if i == 0 { 1 } else { 0 }, part));
                if *ping && i < last {
                    bytes.extend(frame(true, 9, b"?"));
                    expected.push(OwnedEvent::Ping(b"?".to_vec()));
                }
            }
            expected.push(text(message));
        }
        prop_assert_eq!(decode(&bytes, chunk_size, 1 << 20), Ok(expected));
    }

    /// Any bytes decode to messages or an error, and the decoder holds no more than has arrived.
    #[test]
    fn any_bytes_are_decoded_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = decode(&bytes, 7, 256);
    }
}

#[test]
fn each_call_completes_one_frame_at_most() {
    let fragments = [frame(false, 1, b"a"), frame(false, 0, b""), frame(false, 0, b"bc")];
    let stream = [&fragments[..], &[frame(true, 9, b""), frame(true, 0, b"d")]].concat();
    let mut bytes = stream.concat();
    let mut decoder = Decoder::new(100);
    let mut used = 0;
    for (frame, expected) in stream.iter().zip([
        DecoderEvent::Fragment(1),
        DecoderEvent::Fragment(0),
        DecoderEvent::Fragment(2),
        DecoderEvent::Ping(b""),
        DecoderEvent::Text("abcd"),
    ]) {
        let (count, received) = decoder.next(&mut bytes[used..]).unwrap();
        assert_eq!((count, received), (frame.len(), Some(expected)));
        used += count;
    }
}

#[test]
fn a_closing_connection_skips_to_the_close_frame() {
    let big = frame(true, 2, &[7; 3000]);
    let before = [frame(true, 1, b"a"), frame(false, 1, b"\xFF"), frame(true, 9, b"p")].concat();
    let stream = [&big[..], &before, &frame(true, 8, &1009_u16.to_be_bytes())].concat();
    for size in [1, 3, 7, 100, stream.len()] {
        for limit in [1000, 1 << 20] {
            let mut decoder = Decoder::new(limit);
            let mut chunks = stream.chunks(size);
            // The first chunk is decoded; it ends the connection if the frame is too big.
            let mut first = chunks.next().unwrap().to_vec();
            let used = match decoder.next(&mut first) {
                Ok((used, _)) => used,
                // The header was consumed.
                Err(CodecError::MessageTooBig) => 8,
                Err(error) => panic!("{error}"),
            };
            let mut closed = decoder.skip_to_close(&first[used.min(first.len())..]);
            let mut left = 0;
            for chunk in chunks {
                assert!(!closed, "in chunks of {size}");
                closed = decoder.skip_to_close(chunk);
                left += usize::from(closed);
                if closed {
                    break;
                }
            }
            assert!(closed && left <= 1, "in chunks of {size}, at most {limit}");
            assert_eq!(decoder.message_bytes.capacity() + decoder.control.capacity(), 0);
        }
    }
}
