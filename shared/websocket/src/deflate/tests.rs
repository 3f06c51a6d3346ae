use flate2::{Compress, Compression, FlushCompress};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::StdRng};

use super::*;
use crate::{Decoder, DecoderEvent, Opcode, encode};

pub(crate) mod reference;

use reference::Inflated;

fn window(bits: u8) -> WindowBits {
    WindowBits::new(bits).unwrap()
}

/// Compresses `text` as a client may: with any window and level, flushed after each part.
pub(crate) fn compress(parts: &[&[u8]], bits: u8, level: u32, flush: FlushCompress) -> Vec<u8> {
    let mut deflater = Compress::new_with_window_bits(Compression::new(level), false, bits);
    let mut out = Vec::new();
    for part in parts {
        let mut chunk = Vec::with_capacity(part.len() * 2 + 100);
        deflater.compress_vec(part, &mut chunk, flush).unwrap();
        out.extend(chunk);
        if flush == FlushCompress::Finish {
            deflater.reset();
        }
    }
    match flush {
        FlushCompress::Finish => out.push(0),
        _ => out.truncate(out.len() - 4),
    }
    out
}

/// Incompressible bytes.
fn noise(count: usize) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(1);
    let mut noise = vec![0; count];
    random.fill_bytes(&mut noise);
    noise
}

#[test]
fn the_examples_of_rfc_7692_are_inflated() {
    let examples: [(&[u8], &[u8]); 9] = [
        (&[0xF2, 0x48, 0xCD, 0xC9, 0xC9, 0x07, 0x00], b"Hello"),
        // No compression.
        (&[0x00, 0x05, 0x00, 0xFA, 0xFF, 0x48, 0x65, 0x6C, 0x6C, 0x6F, 0x00], b"Hello"),
        // A final block, with an empty block after it, and without.
        (&[0xF3, 0x48, 0xCD, 0xC9, 0xC9, 0x07, 0x00, 0x00], b"Hello"),
        (&[0xF3, 0x48, 0xCD, 0xC9, 0xC9, 0x07, 0x00], b"Hello"),
        // Two blocks, and two final blocks.
        (&[0xF2, 0x48, 0x05, 0x00, 0x00, 0x00, 0xFF, 0xFF, 0xCA, 0xC9, 0xC9, 0x07, 0x00], b"Hello"),
        (
            &[
                0xF3, 0x48, 0xCD, 0xC9, 0xC9, 0x07, 0x00, 0xF3, 0x48, 0xCD, 0xC9, 0xC9, 0x07, 0x00,
                0x00,
            ],
            b"HelloHello",
        ),
        // Empty messages: as in the RFC, as a final block, and as some senders write them.
        (&[0x00], b""),
        (&[0x03, 0x00, 0x00], b""),
        (&[], b""),
    ];
    for (compressed, text) in examples {
        assert_eq!(inflate(compressed, 100).unwrap(), text, "{compressed:02x?}");
    }
}

#[test]
fn incomplete_messages_are_rejected() {
    let rejected: [&[u8]; 6] = [
        // An invalid block type; an invalid length of a stored block.
        &[0x06],
        &[0x00, 0x05, 0x00, 0x00, 0x00, 0x48],
        // A back-reference before the start.
        &[0x02, 0x02, 0x00],
        // The end of the block is missing; the sync flush tail is still there.
        &[0xF2, 0x48, 0xCD, 0xC9],
        &[0xF2, 0x48, 0xCD, 0xC9, 0xC9, 0x07, 0x00, 0x00, 0x00, 0xFF, 0xFF],
        // Not a block after the final one.
        &[0xF3, 0x48, 0xCD, 0xC9, 0xC9, 0x07, 0x00, 0xFF],
    ];
    for compressed in rejected {
        assert_eq!(inflate(compressed, 100), Err(CodecError::InvalidDeflate), "{compressed:02x?}");
        assert_eq!(reference::inflate(compressed), None, "{compressed:02x?}");
    }
}

#[test]
fn inflating_stops_at_the_limit() {
    let bomb = compress(&[&vec![0; 50 << 20]], 15, 9, FlushCompress::Sync);
    assert!(bomb.len() < 60_000);
    assert_eq!(inflate(&bomb, 100_000), Err(CodecError::MessageTooBig));
    let used = INFLATER.with_borrow(|inflater| inflater.as_ref().unwrap().total_out());
    assert_eq!(used, 100_001, "inflated beyond the limit");

    let exact = compress(&[&[7; 1000]], 15, 6, FlushCompress::Sync);
    let out = inflate(&exact, 1000).unwrap();
    assert_eq!(out, [7; 1000]);
    assert!(out.capacity() <= 1001);
    assert_eq!(inflate(&exact, 999), Err(CodecError::MessageTooBig));
}

#[test]
fn a_message_of_maximum_size_may_grow_by_compression() {
    // Incompressible data grows: stored, in many small blocks, with codes of nine bits.
    let noise: Vec<u8> = noise(10_000).iter().map(|byte| byte | 0x90).collect();
    for level in [0, 1, 6] {
        let compressed = compress(&[&noise], 15, level, FlushCompress::Sync);
        assert!(compressed.len() <= compressed_bytes_max(noise.len()));
        let fixed = reference::all_literals(&noise);
        assert!(fixed.len() <= compressed_bytes_max(noise.len()));
        assert_eq!(inflate(&compressed, noise.len()).unwrap(), noise);
        assert_eq!(inflate(&fixed, noise.len()).unwrap(), noise);
    }
}

#[test]
fn blocks_may_refer_back_across_final_blocks() {
    let mut deflater = Compress::new(Compression::new(6), false);
    let text = b"a sentence that is said twice. ".repeat(50);
    let mut first = Vec::with_capacity(1000);
    deflater.compress_vec(&text, &mut first, FlushCompress::Finish).unwrap();
    deflater.reset();
    deflater.set_dictionary(&text).unwrap();
    let mut second = Vec::with_capacity(1000);
    deflater.compress_vec(&text, &mut second, FlushCompress::Sync).unwrap();
    let whole = [&first[..], &second[..second.len() - 4]].concat();
    assert!(second.len() < 30, "it refers back: {}", second.len());
    assert_eq!(inflate(&whole, 1 << 20).unwrap(), text.repeat(2));
    assert_eq!(reference::inflate(&whole).unwrap().out, text.repeat(2));
}

#[test]
fn messages_that_do_not_shrink_stay_uncompressed() {
    let noise = noise(500);
    for payload in [&b""[..], b"a", b"short", &noise] {
        assert_eq!(compress_frame(&encode(Opcode::Binary, &[payload]), window(15)), None);
    }
}

#[test]
fn small_windows_are_not_used_for_large_messages() {
    for (bits, largest) in [(8, 32 << 10), (9, 32 << 10), (12, 256 << 10), (15, 2 << 20)] {
        let compressed = |length| {
            let frame = encode(Opcode::Text, &[&vec![b'x'; length]]);
            compress_frame(&frame, window(bits)).is_some()
        };
        assert!(compressed(largest) && !compressed(largest + 1), "{bits} bits");
    }
}

#[test]
fn incompressible_messages_leave_no_pending_output() {
    // zlib-rs 0.6 panics here if a deflater with pending output is reset: that output takes the
    // space that a block of codes needs.
    let noise = noise(200_000);
    let text: Vec<u8> = noise.iter().map(|byte| byte | 0x80).collect();
    for length in (0..noise.len()).step_by(7_001) {
        let window = WindowBits::MAX;
        for _ in 0..4 {
            assert_eq!(compress_frame(&encode(Opcode::Binary, &[&noise[..length]]), window), None);
        }
        let frame = compress_frame(&encode(Opcode::Binary, &[&text]), window).unwrap();
        assert_eq!(inflate(frame_payload(&frame), text.len()).unwrap(), text);
        assert!(DEFLATERS.with_borrow(|all| all[6].is_some()), "the deflater is kept");
    }
}

/// Text with repetitions at all distances.
fn repetitive() -> impl Strategy<Value = Vec<u8>> {
    let chunk = prop_oneof![
        "[a-d]{1,40}".prop_map(String::into_bytes),
        proptest::collection::vec(any::<u8>(), 1..60),
        (any::<u8>(), 1..600_usize).prop_map(|(byte, count)| vec![byte; count]),
    ];
    (proptest::collection::vec(chunk, 1..12), proptest::collection::vec(0..12_usize, 1..300))
        .prop_map(|(chunks, order)| {
            order.iter().flat_map(|i| chunks[i % chunks.len()].clone()).collect()
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// For every window, also that of 256 bytes: another implementation inflates the compressed
    /// message, and no back-reference exceeds the window.
    #[test]
    fn back_references_keep_to_the_window(text in repetitive(), bits in 8..=15_u8) {
        let frame = encode(Opcode::Text, &[&text]);
        if let Some(compressed) = compress_frame(&frame, window(bits)) {
            prop_assert!(compressed.len() < frame.len());
            prop_assert_eq!(compressed[0], 0xC1);
            let Inflated { out, farthest } = reference::inflate(frame_payload(&compressed)).unwrap();
            prop_assert_eq!(out, text);
            prop_assert!(farthest <= 1 << bits, "{} bytes back with {} bits", farthest, bits);
        }
    }

    /// A message is received complete, however a client compresses and fragments it.
    #[test]
    fn compressed_messages_are_received(
        parts in proptest::collection::vec(".{0,80}", 1..5),
        bits in 9..=15_u8,
        level in 0..=9_u32,
        last in any::<bool>(),
        fragment in 1..50_usize,
        chunk_size in 1..50_usize,
    ) {
        let flush = if last { FlushCompress::Finish } else { FlushCompress::Sync };
        let text = parts.concat();
        let parts: Vec<&[u8]> = parts.iter().map(|part| part.as_bytes()).collect();
        let compressed = compress(&parts, bits, level, flush);
        let mut bytes = Vec::new();
        let fragments: Vec<&[u8]> = compressed.chunks(fragment).collect();
        for (i, part) in fragments.iter().enumerate() {
            let opcode = if i == 0 { 0x41 } else { 0 };
            bytes.extend(super::super::tests::frame(i + 1 == fragments.len(), opcode, part));
        }
        let mut decoder = Decoder::with_deflate(1 << 16);
        let mut got = Vec::new();
        for chunk in bytes.chunks(chunk_size) {
            let mut chunk = chunk.to_vec();
            let mut used = 0;
            while used < chunk.len() {
                let (more, received) = decoder.next(&mut chunk[used..]).unwrap();
                used += more;
                got.extend(received.and_then(|received| match received {
                    DecoderEvent::Text(text) => Some(text.to_owned()),
                    DecoderEvent::Fragment(_) => None,
                    other => panic!("{other:?}"),
                }));
            }
        }
        prop_assert_eq!(got, [text]);
    }
}
