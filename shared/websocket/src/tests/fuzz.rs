//! Fuzzes the decoder with mutated streams: `make fuzz N=100000000`. A small number of inputs runs
//! with every `cargo test`.
//!
//! cargo-fuzz needs a nightly compiler, which this project does not use. So this is a mutation
//! fuzzer of its own: valid streams are mutated in the ways that have found faults in such
//! decoders, split into reads at random, and compared with tungstenite. A seed determines the whole
//! run; it is printed with every failure.

use flate2::FlushCompress;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{differential, frame};
use crate::{
    CodecError, Opcode,
    deflate::{
        self,
        tests::{compress, reference},
    },
    extension,
};

/// Number of inputs of `cargo test`.
const DEFAULT_INPUTS: u64 = 20_000;

/// The number of inputs and the seed: from the environment, else few inputs and always the same.
fn inputs_and_seed() -> (u64, u64) {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    match number("SKEIN_FUZZ") {
        Some(inputs) => {
            (inputs, number("SKEIN_FUZZ_SEED").unwrap_or_else(|| rand::random::<u64>() >> 16))
        }
        None => (DEFAULT_INPUTS, 1),
    }
}

/// Runs `try_one` on all inputs, or on one in `one_in` where each takes long. Each has its own
/// seed, which reproduces it.
fn run(name: &str, one_in: u64, mut try_one: impl FnMut(&mut StdRng) -> Result<(), String>) {
    let (wanted, first) = inputs_and_seed();
    let inputs = wanted.div_ceil(one_in);
    for seed in first..first + inputs {
        if let Err(found) = try_one(&mut StdRng::seed_from_u64(seed)) {
            panic!("{name}, SKEIN_FUZZ=1 SKEIN_FUZZ_SEED={seed}:\n{found}");
        }
    }
    println!("{name}: {inputs} inputs from seed {first} on");
}

/// A stream of valid frames: whole and fragmented messages, with control frames between fragments.
fn valid_stream(random: &mut StdRng) -> Vec<u8> {
    const TEXTS: [&str; 6] = ["", "a", "grüße 🐧", "κόσμε", "\u{10FFFF}\u{D7FF}\u{E000}", "{}"];
    let mut bytes = Vec::new();
    for _ in 0..random.random_range(1..5) {
        let mut payload = TEXTS[random.random_range(0..TEXTS.len())].as_bytes().to_vec();
        if random.random_ratio(1, 4) {
            payload = payload.repeat(random.random_range(1..60));
        }
        let mut opcode = random.random_range(1..3_u8);
        let mut rest = &payload[..];
        while random.random_ratio(1, 2) {
            let (part, behind) = rest.split_at(random.random_range(0..=rest.len()));
            bytes.extend(frame(false, opcode, part));
            (opcode, rest) = (0, behind);
            if random.random_ratio(1, 4) {
                bytes.extend(frame(true, random.random_range(9..11), b"p"));
            }
        }
        bytes.extend(frame(true, opcode, rest));
    }
    if random.random_ratio(1, 4) {
        let code = random.random_range(0..5_000_u16);
        bytes.extend(frame(true, 8, &[&code.to_be_bytes()[..], b"bye"].concat()));
    }
    bytes
}

/// Applies one mutation to `bytes`.
fn mutate(bytes: &mut Vec<u8>, random: &mut StdRng) {
    const SPECIAL: [u8; 10] = [0x00, 0x7E, 0x7F, 0x80, 0xC0, 0xED, 0xF4, 0xFE, 0xFF, 0x88];
    if bytes.is_empty() {
        bytes.push(random.random());
        return;
    }
    let at = random.random_range(0..bytes.len());
    let to = random.random_range(at..=bytes.len().min(at + 20));
    match random.random_range(0..8) {
        0 | 1 => bytes[at] ^= 1 << random.random_range(0..8),
        2 => bytes[at] = random.random(),
        3 => bytes[at] = SPECIAL[random.random_range(0..SPECIAL.len())],
        4 => bytes.insert(at, random.random()),
        5 => drop(bytes.drain(at..to)),
        6 => {
            let copy = bytes[at..to].to_vec();
            let place = random.random_range(0..=bytes.len());
            bytes.splice(place..place, copy);
        }
        _ => bytes.truncate(at),
    }
}

#[test]
fn mutated_streams_decode_as_in_tungstenite() {
    run("frames", 1, |random| {
        let mut bytes = valid_stream(random);
        for _ in 0..random.random_range(0..4) {
            mutate(&mut bytes, random);
        }
        let max = if random.random_ratio(1, 2) { 64 } else { 4096 };
        let longest = random.random_range(1..40);
        differential::compare(&bytes, max, || random.random_range(1..=longest))
    });
}

#[test]
fn mutated_messages_inflate_as_in_the_reference() {
    run("deflate", 8, |random| {
        let flush = [FlushCompress::Sync, FlushCompress::Finish][random.random_range(0..2)];
        let text = valid_stream(random);
        let parts: Vec<&[u8]> = text.chunks(random.random_range(1..=text.len())).collect();
        let (bits, level) = (random.random_range(9..16), random.random_range(0..10));
        let mut payload = compress(&parts, bits, level, flush);
        for _ in 0..random.random_range(0..4) {
            mutate(&mut payload, random);
        }
        let max = if random.random_ratio(1, 8) { 50 } else { 1 << 20 };
        let (ours, reference) = (deflate::inflate(&payload, max), reference::inflate(&payload));
        let alike = match (&ours, &reference) {
            (Ok(out), Some(inflated)) => *out == inflated.out,
            (Err(CodecError::MessageTooBig), Some(inflated)) => inflated.out.len() > max,
            // It exceeded the limit before its fault.
            (Err(CodecError::MessageTooBig), None) => true,
            (Err(CodecError::InvalidDeflate), None) => true,
            _ => false,
        };
        if alike { Ok(()) } else { Err(format!("{ours:?}\n{reference:?}\nof {payload:02x?}")) }
    });
}

#[test]
fn compressed_messages_keep_to_their_window() {
    run("windows", 200, |random| {
        let mut text = valid_stream(random);
        while text.len() < 3_000 && random.random_ratio(20, 21) {
            mutate(&mut text, random);
            let from = random.random_range(0..=text.len());
            text.extend_from_within(from..text.len().min(from + 300));
        }
        if random.random_ratio(1, 8) {
            let noise = random.random_range(0..100_000);
            text.extend((0..noise).map(|_| random.random::<u8>()));
        }
        let bits = random.random_range(8..16);
        let window = extension::WindowBits::new(bits).unwrap();
        let frame = crate::encode(Opcode::Binary, &[&text]);
        let Some(compressed) = deflate::compress_frame(&frame, window) else { return Ok(()) };
        let inflated = reference::inflate(deflate::frame_payload(&compressed));
        match &inflated {
            Some(inflated) if inflated.out == text && inflated.farthest <= 1 << bits => Ok(()),
            _ => Err(format!("{bits} bits: {inflated:?}\nof {text:02x?}")),
        }
    });
}

#[test]
fn mutated_offers_yield_only_valid_parameters() {
    const CORPUS: [&str; 4] = [
        "permessage-deflate; client_max_window_bits",
        "permessage-deflate;server_max_window_bits=\"10\" , permessage-deflate",
        "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
        "foo; a=b; c=\"d\\e\", permessage-deflate; server_max_window_bits=8",
    ];
    run("offers", 1, |random| {
        let mut bytes = CORPUS[random.random_range(0..CORPUS.len())].as_bytes().to_vec();
        for _ in 0..random.random_range(0..4) {
            mutate(&mut bytes, random);
        }
        let text = String::from_utf8_lossy(&bytes);
        match extension::negotiate([&*text]) {
            // The response is an offer too, and negotiates the same parameters.
            Ok(Some(deflate))
                if extension::negotiate([&*deflate.to_string()]) == Ok(Some(deflate)) =>
            {
                Ok(())
            }
            Ok(Some(deflate)) => Err(format!("{text}: {deflate}")),
            Ok(None) | Err(_) => Ok(()),
        }
    });
}
