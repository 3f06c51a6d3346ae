//! RFC 7692, byte by byte: what Autobahn's groups 12 and 13 ask for, what has to be refused, and
//! that what many get is compressed once.

use std::net::SocketAddr;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use futures_util::future::join_all;
use serde_json::{Value, json};

use super::{
    Case, End, case,
    client::{BINARY, CLOSE, CONTINUATION, Client, FIN, PING, PONG, RSV1, TEXT, frame, text},
};
use crate::harness::{Gateway, Nginx, get, http_raw, until};

const ANSWER: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
const OFFER: &str = "Sec-WebSocket-Extensions: permessage-deflate";

/// A payload as a client compresses it.
fn compress(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + payload.len() / 8 + 100);
    Compress::new(Compression::new(6), false)
        .compress_vec(payload, &mut out, FlushCompress::Sync)
        .unwrap();
    out.truncate(out.len() - 4);
    out
}

/// A payload of the server's, inflated with a window of `bits` and not a byte more: it leaves the
/// inflater in small pieces, so that all it can refer to is its window.
fn inflate(payload: &[u8], bits: u8) -> Vec<u8> {
    let mut inflater = Decompress::new_with_window_bits(false, bits.max(9));
    let input = [payload, &[0, 0, 0xFF, 0xFF]].concat();
    let (mut out, mut piece) = (Vec::new(), [0; 32]);
    loop {
        let used = inflater.total_in() as usize;
        let before = inflater.total_out();
        inflater
            .decompress(&input[used..], &mut piece, FlushDecompress::None)
            .expect("it refers back beyond its window, or is no deflated data");
        let count = (inflater.total_out() - before) as usize;
        out.extend(&piece[..count]);
        if count < piece.len() && inflater.total_in() == input.len() as u64 {
            return out;
        }
    }
}

/// A message in fragments of `size`, its first frame with `first` beside its opcode.
fn fragmented(first: u8, payload: &[u8], size: usize) -> Vec<u8> {
    let parts: Vec<&[u8]> =
        if payload.is_empty() { vec![b""] } else { payload.chunks(size).collect() };
    let of = |(i, part): (usize, &&[u8])| {
        let fin = if i + 1 == parts.len() { FIN } else { 0 };
        frame(fin | if i == 0 { first } else { CONTINUATION }, part)
    };
    parts.iter().enumerate().flat_map(of).collect()
}

/// Text and bytes, of the kinds that Autobahn takes.
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

/// Sends messages of all kinds and sizes, compressed and not, in fragments of all sizes, and takes
/// them back. Returns how many came back compressed.
async fn exchange(address: SocketAddr, offer: &str, answer: &str, bits: u8) -> usize {
    let mut client = Client::open(address, "/ws/echo", &[offer]).await;
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
async fn messages_of_all_sizes_come_back_whatever_window_is_asked_for() {
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
        let (offer, answer) = (format!("{OFFER}{offer}"), format!("{ANSWER}{answer}"));
        let compressed = exchange(gateway.address, &offer, &answer, bits).await;
        // Two of three kinds can be compressed, from 256 bytes on; up to 64 windows.
        let lengths = if bits < 10 { 6 } else { 8 };
        assert_eq!(compressed, lengths * 2 * 3 * 2, "{offer}");
    }
    exchange(nginx.address, OFFER, ANSWER, 15).await;
}

#[tokio::test]
async fn an_offer_is_accepted_declined_or_refused_as_the_rfcs_say() {
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
        (Some(ANSWER.to_owned()), Some(format!("{ANSWER}; server_max_window_bits=10")));
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

fn refusals() -> Vec<Case> {
    let hello = compress(b"Hello");
    let first = FIN | TEXT | RSV1;
    let ok = (first, &hello[..]);
    let fails = |name: &str, frames: &[Vec<u8>], code| {
        let sent = [&[frame(ok.0, ok.1)], frames].concat();
        case(name, &sent, &[(FIN | TEXT, b"Hello")], End::Fails(code))
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
            "on a continuation of what is not compressed",
            &[frame(TEXT, b"a"), frame(FIN | CONTINUATION | RSV1, b"b")],
            1002,
        ),
        fails("with another bit", &[frame(first | 0x20, &hello)], 1002),
        fails("another bit alone", &[frame(FIN | TEXT | 0x10, b"")], 1002),
        fails("on an unknown opcode", &[frame(FIN | 3 | RSV1, b"")], 1002),
        fails("no deflated data", &[frame(first, b"\x06\xFF\xFF")], 1007),
        fails("half a message", &[frame(first, &hello[..3])], 1007),
        fails("plain text", &[frame(first, b"Hello")], 1007),
        fails("no UTF-8", &[deflated(b"\xC0\xAF")], 1007),
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

fn messages() -> Vec<Case> {
    let hello = compress(b"Hello");
    let first = FIN | TEXT | RSV1;
    let (pong, back) = ((FIN | PONG, &b"p"[..]), (FIN | TEXT, &b"Hello"[..]));
    // Blocks that say they are the last, as RFC 7692, section 7.2.3.4, has them.
    let last = b"\xF3\x48\xCD\xC9\xC9\x07\x00\x00";
    let two = b"\xF2\x48\x05\x00\x00\x00\xFF\xFF\xCA\xC9\xC9\x07\x00";
    let split = "grüße".as_bytes();
    vec![
        case("compressed", &[frame(first, &hello)], &[back], End::Alive),
        case("not compressed", &[text("Hello")], &[back], End::Alive),
        case(
            "in turn",
            &[frame(first, &hello), text("Hello"), frame(first, &hello)],
            &[back; 3],
            End::Alive,
        ),
        case("a last block", &[frame(first, last)], &[back], End::Alive),
        case("two blocks", &[frame(first, two)], &[back], End::Alive),
        case("stored", &[frame(first, b"\x00\x05\x00\xFA\xFFHello\x00")], &[back], End::Alive),
        case("empty", &[frame(first, b"\x00")], &[(FIN | TEXT, b"")], End::Alive),
        case("without any byte", &[frame(first, b"")], &[(FIN | TEXT, b"")], End::Alive),
        case(
            "a ping between fragments",
            &[
                frame(TEXT | RSV1, &hello[..2]),
                frame(FIN | PING, b"p"),
                frame(CONTINUATION, b""),
                frame(FIN | CONTINUATION, &hello[2..]),
            ],
            &[pong, back],
            End::Alive,
        ),
        case(
            "a first fragment without a byte",
            &[frame(TEXT | RSV1, b""), frame(FIN | CONTINUATION, &hello)],
            &[back],
            End::Alive,
        ),
        case(
            "text in two bytes a character",
            &[frame(first, &compress(split))],
            &[(FIN | TEXT, split)],
            End::Alive,
        ),
        case(
            "close",
            &[frame(first, &hello), super::close(1000, b"")],
            &[back],
            End::Closed(Some(1000)),
        ),
    ]
}

#[tokio::test]
async fn compressed_messages_are_taken_and_what_is_none_is_refused() {
    let gateway = gateway(&[]).await;
    let nginx = Nginx::start(&[gateway.address]).await;
    join_all([messages(), refusals()].concat().iter().map(async |case| {
        for (address, piece) in
            [(gateway.address, usize::MAX), (gateway.address, 1), (nginx.address, usize::MAX)]
        {
            let piece = if case.sent.len() > 1000 { piece.max(997) } else { piece };
            case.play_with(address, &[OFFER], piece).await;
        }
    }))
    .await;
    let mut client = Client::open(gateway.address, "/ws/echo", &[OFFER]).await;
    let largest = payloads(1 << 20)[2].1.clone();
    client.send(&frame(FIN | BINARY | RSV1, &compress(&largest))).await;
    assert!(client.next().await == Some((FIN | BINARY, largest)));

    // Where nothing was agreed on, the bit has no meaning.
    let hello = frame(FIN | TEXT | RSV1, &compress(b"Hello"));
    let refused = case("the bit without an agreement", &[hello], &[], End::Fails(1002));
    refused.play(gateway.address, usize::MAX).await;
    let declined = "Sec-WebSocket-Extensions: permessage-deflate; foo";
    refused.play_with(gateway.address, &[declined], usize::MAX).await;
}

#[tokio::test]
async fn small_messages_are_sent_as_they_are() {
    for (option, smallest) in [("256", 256), ("0", 20), ("4KiB", 4096)] {
        let gateway = gateway(&[("transport.deflate_bytes_min", option)]).await;
        let mut client = Client::open(gateway.address, "/ws/echo", &[OFFER]).await;
        for (length, bits) in [(smallest - 1, 0), (smallest, RSV1)] {
            client.send(&frame(FIN | BINARY, &vec![b'x'; length])).await;
            let (first, _) = client.next().await.unwrap();
            let bits = if option == "0" { RSV1 } else { bits };
            assert_eq!(first, FIN | BINARY | bits, "{length} bytes with {option}");
        }
    }
}

/// The frames of a chat, inflated.
struct Chat {
    client: Client,
    bits: u8,
}

impl Chat {
    async fn open(gateway: &Gateway, user: &str, offer: Option<(&str, u8)>) -> Self {
        let path = format!("/ws?user={user}");
        let headers: Vec<String> =
            offer.iter().map(|(offer, _)| format!("{OFFER}{offer}")).collect();
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let client = Client::open(gateway.address, &path, &headers).await;
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

    /// The next frame of `kind`, and its bytes as they came.
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
async fn a_message_is_compressed_once_for_each_window_and_not_at_all_where_nobody_wants_it() {
    let gateway = gateway(&[]).await;
    let compressed = async || {
        let metrics = get(gateway.admin, "/metrics").await.body;
        let line =
            metrics.lines().find(|line| line.starts_with("gateway_deflated_messages_total "));
        line.unwrap().split(' ').nth(1).unwrap().parse::<u64>().unwrap()
    };
    let message = |text: &str| json!({"type": "message", "room": "r", "content": text.repeat(1000), "meta": {"n": 1}});
    let mut plain = [Chat::open(&gateway, "a", None).await, Chat::open(&gateway, "b", None).await];
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
        chats.push(Chat::open(&gateway, user, Some(offer)).await);
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

    // Who comes later gets it compressed as well, among what `joined` has.
    let mut late = Chat::open(&gateway, "h", Some(("", 15))).await;
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
