//! RFC 7692, byte by byte: the cases of Autobahn's groups 12 and 13, violations, and that a message
//! to many clients is compressed once.

use std::net::SocketAddr;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use futures_util::future::join_all;
use serde_json::{Value, json};

use super::{
    Ending, FramingCase, case,
    client::{BINARY, CLOSE, CONTINUATION, FIN, PING, PONG, RSV1, RawClient, TEXT, frame, text},
};
use crate::harness::{Gateway, Nginx, get, http_raw, until};

const RESPONSE: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
const OFFER: &str = "Sec-WebSocket-Extensions: permessage-deflate";

/// Compresses a payload as a client does.
fn compress(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + payload.len() / 8 + 100);
    Compress::new(Compression::new(6), false)
        .compress_vec(payload, &mut out, FlushCompress::Sync)
        .unwrap();
    out.truncate(out.len() - 4);
    out
}

/// Inflates a payload of the server with a window of exactly `bits`: the output leaves the inflater
/// in small chunks, so that back-references reach only the window.
fn inflate(payload: &[u8], bits: u8) -> Vec<u8> {
    let mut inflater = Decompress::new_with_window_bits(false, bits.max(9));
    let input = [payload, &[0, 0, 0xFF, 0xFF]].concat();
    let (mut out, mut chunk) = (Vec::new(), [0; 32]);
    loop {
        let used = inflater.total_in() as usize;
        let before = inflater.total_out();
        inflater
            .decompress(&input[used..], &mut chunk, FlushDecompress::None)
            .expect("a reference beyond the window, or invalid data");
        let count = (inflater.total_out() - before) as usize;
        out.extend(&chunk[..count]);
        if count < chunk.len() && inflater.total_in() == input.len() as u64 {
            return out;
        }
    }
}

/// A message in fragments of `size`. `first` holds the opcode and RSV1 of the first frame.
fn fragmented(first: u8, payload: &[u8], size: usize) -> Vec<u8> {
    let parts: Vec<&[u8]> =
        if payload.is_empty() { vec![b""] } else { payload.chunks(size).collect() };
    let of = |(i, part): (usize, &&[u8])| {
        let fin = if i + 1 == parts.len() { FIN } else { 0 };
        frame(fin | if i == 0 { first } else { CONTINUATION }, part)
    };
    parts.iter().enumerate().flat_map(of).collect()
}

/// Text and bytes, of the kinds that Autobahn uses.
fn payloads(length: usize) -> [(u8, Vec<u8>); 3] {
    let mut json = String::new();
    let mut noise = Vec::new();
    let mut state = length as u32 | 1;
    while json.len() < length || noise.len() < length {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        noise.extend(state.to_be_bytes()[..2].iter());
        json.push_str(&format!(r#"{{"id":{state},"name":"some name","tags":["a","b"]}},"#));
    }
    json.truncate(length);
    noise.truncate(length);
    [(TEXT, json.into_bytes()), (BINARY, vec![0xFE; length]), (BINARY, noise)]
}

async fn gateway(extra: &[(&str, &str)]) -> Gateway {
    let verbatim = [("server.echo", "verbatim"), ("limits.message_bytes_max", "1MiB")];
    Gateway::start(&[&verbatim, extra].concat()).await
}

/// Sends messages of all kinds and sizes, compressed and not, in fragments of all sizes, and checks
/// the echoes. Returns the number of compressed echoes.
async fn exchange(address: SocketAddr, offer: &str, answer: &str, bits: u8) -> usize {
    let mut client = RawClient::open(address, "/ws/echo", &[offer]).await;
    assert_eq!(client.extensions.as_deref(), Some(answer), "{offer}");
    let mut compressed = 0;
    for length in [0, 16, 64, 256, 1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072] {
        for (opcode, payload) in payloads(length) {
            for fragment in [100, 1024, usize::MAX] {
                let deflated = compress(&payload);
                client.send(&fragmented(opcode | RSV1, &deflated, fragment)).await;
                client.send(&fragmented(opcode, &payload, fragment)).await;
                for _ in 0..2 {
                    let (first, got) = client.next().await.unwrap();
                    assert_eq!(first & !RSV1, FIN | opcode, "{offer}: {length}");
                    let is_compressed = first & RSV1 != 0;
                    if is_compressed {
                        assert!(got.len() < payload.len(), "{offer}: {length}");
                    }
                    let got = if is_compressed { inflate(&got, bits) } else { got };
                    assert!(got == payload, "{offer}: {length}");
                    compressed += usize::from(is_compressed);
                }
            }
        }
    }
    compressed
}

#[tokio::test]
async fn messages_of_all_sizes_are_echoed_with_every_window() {
    let gateway = gateway(&[]).await;
    let nginx = Nginx::start(&[gateway.address]).await;
    for (offer, answer, bits) in [
        ("", "", 15),
        ("; client_max_window_bits", "", 15),
        ("; server_no_context_takeover; client_no_context_takeover", "", 15),
        ("; server_max_window_bits=8", "; server_max_window_bits=8", 8),
        ("; server_max_window_bits=9", "; server_max_window_bits=9", 9),
        ("; server_max_window_bits=12", "; server_max_window_bits=12", 12),
        ("; server_max_window_bits=15", "; server_max_window_bits=15", 15),
        (
            "; server_no_context_takeover; server_max_window_bits=9, \
             permessage-deflate; server_no_context_takeover, permessage-deflate",
            "; server_max_window_bits=9",
            9,
        ),
    ] {
        let (offer, answer) = (format!("{OFFER}{offer}"), format!("{RESPONSE}{answer}"));
        let compressed = exchange(gateway.address, &offer, &answer, bits).await;
        // Two of three kinds are compressible, from 256 bytes up to 64 windows.
        let lengths = if bits < 10 { 6 } else { 8 };
        assert_eq!(compressed, lengths * 2 * 3 * 2, "{offer}");
    }
    exchange(nginx.address, OFFER, RESPONSE, 15).await;
}

#[tokio::test]
async fn offers_are_accepted_declined_or_rejected_by_the_rfcs() {
    let (on, off) = (gateway(&[]).await, gateway(&[("transport.deflate", "false")]).await);
    let ask = async |address: SocketAddr, lines: &[&str]| {
        let lines: String =
            lines.iter().map(|line| format!("Sec-WebSocket-Extensions: {line}\r\n")).collect();
        let request = format!(
            "GET /ws/echo HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{lines}\r\n"
        );
        let answer = http_raw(address, &request).await;
        (answer.status, answer.header("sec-websocket-extensions").map(str::to_owned))
    };
    let (plain, ten) =
        (Some(RESPONSE.to_owned()), Some(format!("{RESPONSE}; server_max_window_bits=10")));
    for (lines, answer) in [
        (&[][..], (101, None)),
        (&["permessage-deflate"], (101, plain.clone())),
        (
            &["foo; bar=\"baz\"", "permessage-deflate; server_max_window_bits=\"10\""],
            (101, ten.clone()),
        ),
        (&["permessage-deflate; foo", "permessage-deflate; server_max_window_bits=10"], (101, ten)),
        (&["permessage-deflate; server_max_window_bits=7, permessage-deflate"], (101, plain)),
        (&["permessage-deflate; server_max_window_bits"], (101, None)),
        (&["permessage-deflate; client_max_window_bits; client_max_window_bits"], (101, None)),
        (&["permessage-deflate", "permessage-deflate; foo=\"bar"], (400, None)),
        (&["permessage-deflate; =10"], (400, None)),
        (&["permessage deflate"], (400, None)),
    ] {
        assert_eq!(ask(on.address, lines).await, answer, "{lines:?}");
        let (status, extensions) = ask(off.address, lines).await;
        assert_eq!((status, extensions), (answer.0, None), "{lines:?}");
    }
}

fn violations() -> Vec<FramingCase> {
    let hello = compress(b"Hello");
    let first = FIN | TEXT | RSV1;
    let ok = (first, &hello[..]);
    let fails = |name: &str, frames: &[Vec<u8>], code| {
        let sent = [&[frame(ok.0, ok.1)], frames].concat();
        case(name, &sent, &[(FIN | TEXT, b"Hello")], Ending::Fails(code))
    };
    let deflated = |payload: &[u8]| frame(first, &compress(payload));
    vec![
        fails("on a ping", &[frame(FIN | PING | RSV1, b"")], 1002),
        fails("on a pong", &[frame(FIN | PONG | RSV1, b"")], 1002),
        fails("on a close", &[frame(FIN | CLOSE | RSV1, b"")], 1002),
        fails(
            "on a continuation",
            &[frame(TEXT | RSV1, &hello[..3]), frame(FIN | CONTINUATION | RSV1, &hello[3..])],
            1002,
        ),
        fails(
            "on a continuation of an uncompressed message",
            &[frame(TEXT, b"a"), frame(FIN | CONTINUATION | RSV1, b"b")],
            1002,
        ),
        fails("with another bit", &[frame(first | 0x20, &hello)], 1002),
        fails("another bit alone", &[frame(FIN | TEXT | 0x10, b"")], 1002),
        fails("on an unknown opcode", &[frame(FIN | 3 | RSV1, b"")], 1002),
        fails("invalid deflate data", &[frame(first, b"\x06\xFF\xFF")], 1007),
        fails("half a message", &[frame(first, &hello[..3])], 1007),
        fails("plain text", &[frame(first, b"Hello")], 1007),
        fails("invalid UTF-8", &[deflated(b"\xC0\xAF")], 1007),
        fails("half a character", &[deflated("ä".as_bytes().split_at(1).0)], 1007),
        fails("one byte too much", &[deflated(&vec![b'x'; (1 << 20) + 1])], 1009),
        fails("a bomb", &[deflated(&vec![b'x'; 100 << 20])], 1009),
        fails(
            "a bomb in fragments",
            &[fragmented(TEXT | RSV1, &compress(&vec![b'x'; 100 << 20]), 1000)],
            1009,
        ),
    ]
}

fn messages() -> Vec<FramingCase> {
    let hello = compress(b"Hello");
    let first = FIN | TEXT | RSV1;
    let (pong, back) = ((FIN | PONG, &b"p"[..]), (FIN | TEXT, &b"Hello"[..]));
    // Final blocks, as in RFC 7692, section 7.2.3.4.
    let last = b"\xF3\x48\xCD\xC9\xC9\x07\x00\x00";
    let two = b"\xF2\x48\x05\x00\x00\x00\xFF\xFF\xCA\xC9\xC9\x07\x00";
    let split = "grüße".as_bytes();
    vec![
        case("compressed", &[frame(first, &hello)], &[back], Ending::Alive),
        case("not compressed", &[text("Hello")], &[back], Ending::Alive),
        case(
            "compressed and not, in turn",
            &[frame(first, &hello), text("Hello"), frame(first, &hello)],
            &[back; 3],
            Ending::Alive,
        ),
        case("a final block", &[frame(first, last)], &[back], Ending::Alive),
        case("two blocks", &[frame(first, two)], &[back], Ending::Alive),
        case("stored", &[frame(first, b"\x00\x05\x00\xFA\xFFHello\x00")], &[back], Ending::Alive),
        case("empty", &[frame(first, b"\x00")], &[(FIN | TEXT, b"")], Ending::Alive),
        case("an empty payload", &[frame(first, b"")], &[(FIN | TEXT, b"")], Ending::Alive),
        case(
            "a ping between fragments",
            &[
                frame(TEXT | RSV1, &hello[..2]),
                frame(FIN | PING, b"p"),
                frame(CONTINUATION, b""),
                frame(FIN | CONTINUATION, &hello[2..]),
            ],
            &[pong, back],
            Ending::Alive,
        ),
        case(
            "an empty first fragment",
            &[frame(TEXT | RSV1, b""), frame(FIN | CONTINUATION, &hello)],
            &[back],
            Ending::Alive,
        ),
        case(
            "text with two bytes per character",
            &[frame(first, &compress(split))],
            &[(FIN | TEXT, split)],
            Ending::Alive,
        ),
        case(
            "close",
            &[frame(first, &hello), super::close(1000, b"")],
            &[back],
            Ending::Closed(Some(1000)),
        ),
    ]
}

#[tokio::test]
async fn compressed_messages_are_echoed_and_invalid_ones_rejected() {
    let gateway = gateway(&[]).await;
    let nginx = Nginx::start(&[gateway.address]).await;
    join_all([messages(), violations()].concat().iter().map(async |case| {
        for (address, chunk_size) in
            [(gateway.address, usize::MAX), (gateway.address, 1), (nginx.address, usize::MAX)]
        {
            let chunk_size = if case.sent.len() > 1000 { chunk_size.max(997) } else { chunk_size };
            case.run_with(address, &[OFFER], chunk_size).await;
        }
    }))
    .await;
    let mut client = RawClient::open(gateway.address, "/ws/echo", &[OFFER]).await;
    let largest = payloads(1 << 20)[2].1.clone();
    client.send(&frame(FIN | BINARY | RSV1, &compress(&largest))).await;
    assert!(client.next().await == Some((FIN | BINARY, largest)));

    // Without negotiation, the bit is a violation.
    let hello = frame(FIN | TEXT | RSV1, &compress(b"Hello"));
    let violation = case("RSV1 without negotiation", &[hello], &[], Ending::Fails(1002));
    violation.run(gateway.address, usize::MAX).await;
    let declined = "Sec-WebSocket-Extensions: permessage-deflate; foo";
    violation.run_with(gateway.address, &[declined], usize::MAX).await;
}

#[tokio::test]
async fn small_messages_are_sent_uncompressed() {
    for (option, smallest) in [("256", 256), ("0", 20), ("4KiB", 4096)] {
        let gateway = gateway(&[("transport.deflate_bytes_min", option)]).await;
        let mut client = RawClient::open(gateway.address, "/ws/echo", &[OFFER]).await;
        for (length, bits) in [(smallest - 1, 0), (smallest, RSV1)] {
            client.send(&frame(FIN | BINARY, &vec![b'x'; length])).await;
            let (first, _) = client.next().await.unwrap();
            let bits = if option == "0" { RSV1 } else { bits };
            assert_eq!(first, FIN | BINARY | bits, "{length} bytes with {option}");
        }
    }
}

/// A client that inflates the frames it receives.
struct DeflateClient {
    client: RawClient,
    bits: u8,
}

impl DeflateClient {
    async fn open(gateway: &Gateway, user: &str, offer: Option<(&str, u8)>) -> Self {
        let path = format!("/ws?user={user}");
        let headers: Vec<String> =
            offer.iter().map(|(offer, _)| format!("{OFFER}{offer}")).collect();
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let client = RawClient::open(gateway.address, &path, &headers).await;
        let mut chat = Self { client, bits: offer.map_or(0, |(_, bits)| bits) };
        chat.send(&json!({"type": "join", "room": "r"})).await;
        chat.next("joined").await;
        chat
    }

    async fn send(&mut self, value: &Value) {
        let payload = value.to_string();
        let sent = match self.bits {
            0 => text(&payload),
            _ => frame(FIN | TEXT | RSV1, &compress(payload.as_bytes())),
        };
        self.client.send(&sent).await;
    }

    /// The next frame of `kind`, and its payload as received.
    async fn next(&mut self, kind: &str) -> (Value, Vec<u8>) {
        loop {
            let (first, payload) = self.client.next().await.unwrap();
            let inflated = match first & RSV1 {
                0 => payload.clone(),
                _ => inflate(&payload, self.bits),
            };
            let value: Value = serde_json::from_slice(&inflated).unwrap();
            if value["type"] == kind {
                return (value, payload);
            }
        }
    }
}

#[tokio::test]
async fn a_message_is_compressed_once_per_negotiated_window() {
    let gateway = gateway(&[]).await;
    let compressed = async || {
        let metrics = get(gateway.admin, "/metrics").await.body;
        let line =
            metrics.lines().find(|line| line.starts_with("gateway_deflated_messages_total "));
        line.unwrap().split(' ').nth(1).unwrap().parse::<u64>().unwrap()
    };
    let message = |text: &str| json!({"type": "message", "room": "r", "content": text.repeat(1000), "meta": {"n": 1}});
    let mut plain = [
        DeflateClient::open(&gateway, "a", None).await,
        DeflateClient::open(&gateway, "b", None).await,
    ];
    plain[0].send(&message("plain")).await;
    for chat in &mut plain {
        assert!(chat.next("message").await.0["content"] == message("plain")["content"]);
    }
    assert_eq!(compressed().await, 0);

    let mut chats = vec![];
    for (user, offer) in [
        ("c", ("; client_max_window_bits", 15)),
        ("d", ("", 15)),
        ("e", ("; server_max_window_bits=9", 9)),
        ("f", ("; server_max_window_bits=8", 8)),
        ("g", ("; server_max_window_bits=9", 9)),
    ] {
        chats.push(DeflateClient::open(&gateway, user, Some(offer)).await);
    }
    let before = compressed().await;
    chats[0].send(&message("shared")).await;
    let mut frames = vec![];
    for chat in plain.iter_mut().chain(&mut chats) {
        let (value, bytes) = chat.next("message").await;
        assert!(value["content"] == message("shared")["content"]);
        frames.push(bytes);
    }
    assert!(frames[0] == frames[1] && frames[0].len() > 6000);
    assert!(frames[2] == frames[3] && frames[2].len() < 600);
    assert!(frames[4] == frames[6] && frames[4].len() < 600);
    assert_eq!(compressed().await - before, 3, "windows of 15, 9 and 8");

    // A client that joins later receives it compressed in `history`.
    let mut late = DeflateClient::open(&gateway, "h", Some(("", 15))).await;
    late.send(&json!({"type": "history", "room": "r"})).await;
    let (history, bytes) = late.next("history").await;
    assert!(history["messages"][1]["content"] == message("shared")["content"]);
    assert!(bytes.len() < 2000, "{}", bytes.len());
    until("the handshakes are counted", async || {
        let metrics = get(gateway.admin, "/metrics").await.body;
        metrics.lines().any(|line| line == "gateway_deflate_handshakes_total 6")
    })
    .await;
}
