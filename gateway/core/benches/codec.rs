//! Benchmarks of encoding and decoding frames. `make bench-micro` runs them.
//!
//! To measure another step of the codec, add a function.

use bytes::Bytes;
use divan::{Bencher, black_box, counter::BytesCount};
use skein_core::envelope::{AuthorHash, Envelope, EnvelopeParts};
use skein_protocol::{
    ids::{ConnectionId, MessageId},
    position::Position,
    protocol::client_frame::ClientFrame,
};
use skein_websocket::{Decoder, Opcode, encode};

/// Content sizes: a short chat message, a long one, a document.
const SIZES: [usize; 3] = [128, 4 * 1024, 64 * 1024];

fn main() {
    divan::main();
}

#[divan::bench(args = SIZES)]
fn encode_frame(bencher: Bencher<'_, '_>, size: usize) {
    let payload = vec![b'x'; size];
    let encode = || encode(Opcode::Text, &[black_box(&payload)]);
    bencher.counter(BytesCount::new(size)).bench(encode);
}

/// Builds the frame of an entry from the log, before it is put into outboxes.
#[divan::bench]
fn encode_live_frame(bencher: Bencher<'_, '_>) {
    let fields = format!(r#""room":"lobby","id":"x","content":"{}""#, "x".repeat(128));
    let envelope = Envelope::pack(EnvelopeParts {
        frame: Default::default(),
        author: author(),
        id: MessageId::random(),
        sender: ConnectionId::random(),
        echo: true,
        fields: &fields,
        binary_payload: None,
    });
    let epoch = "1-abcdefgh".parse().expect("a valid epoch");
    let position = Position::new(epoch, 123_456);
    bencher.bench(|| envelope.live_frame(black_box(&position)));
}

/// Parses the header and unmasks the payload in place. At 128 bytes the header dominates, at 64 KiB
/// unmasking and the check of UTF-8.
#[divan::bench(args = SIZES)]
fn decode_text(bencher: Bencher<'_, '_>, size: usize) {
    decode(bencher, 0x1, size);
}

/// The same work without the check of UTF-8.
#[divan::bench(args = SIZES)]
fn decode_binary(bencher: Bencher<'_, '_>, size: usize) {
    decode(bencher, 0x2, size);
}

fn decode(bencher: Bencher<'_, '_>, opcode: u8, size: usize) {
    let frame = masked(opcode, &vec![b'x'; size]);
    let mut decoder = Decoder::new(1 << 20);
    bencher.counter(BytesCount::new(size)).with_inputs(|| frame.clone()).bench_local_refs(
        |frame| {
            let (used, received) = decoder.next(frame).expect("a valid frame");
            assert!(received.is_some());
            used
        },
    );
}

#[divan::bench]
fn parse_message(bencher: Bencher<'_, '_>) {
    let content = "x".repeat(128);
    let text = format!(
        r#"{{"type":"message","room":"lobby","id":"6f8f6b5e-3c70-4f0e-9a55-0d8a1d6f7a11","content":"{content}"}}"#
    );
    bencher.bench(|| ClientFrame::from_text(black_box(&text)).is_ok());
}

fn author() -> AuthorHash {
    AuthorHash::of(&"ann".parse().expect("a valid user id"))
}

/// A masked frame of a client.
fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    const MASK: [u8; 4] = [0x37, 0xFA, 0x21, 0x3D];
    let server = encode(Opcode::Binary, &[payload]);
    let header: Bytes = server.slice(..server.len() - payload.len());
    let mut frame = header.to_vec();
    frame[0] = 0x80 | opcode;
    frame[1] |= 0x80;
    frame.extend_from_slice(&MASK);
    frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}
