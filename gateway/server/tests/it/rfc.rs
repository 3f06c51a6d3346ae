//! RFC 6455, byte by byte: the cases of Autobahn's groups 1 to 7, 9 and 10 against `/ws/echo` with
//! `server.echo = "verbatim"`. Compression is in `rfc/deflate.rs`.

use std::net::SocketAddr;

use futures_util::future::join_all;
use tokio::time::Instant;

use crate::harness::{Gateway, Nginx};

pub mod client;
mod deflate;

use client::{BINARY, CLOSE, CONTINUATION, FIN, PING, PONG, RawClient, TEXT, close, frame, text};

/// How a case ends.
#[derive(Clone, Copy, Debug)]
enum Ending {
    /// The connection stays open until the client closes it.
    Alive,
    /// The server closes with this code.
    Fails(u16),
    /// The server answers the close frame of the case with the same code.
    Closed(Option<u16>),
}

/// One case: the bytes sent, the frames expected, and the end of the connection.
#[derive(Clone, Debug)]
struct FramingCase {
    name: String,
    sent: Vec<u8>,
    back: Vec<client::RawFrame>,
    end: Ending,
}

fn case(
    name: impl Into<String>,
    sent: &[Vec<u8>],
    back: &[(u8, &[u8])],
    end: Ending,
) -> FramingCase {
    let back = back.iter().map(|(first, payload)| (*first, payload.to_vec())).collect();
    FramingCase { name: name.into(), sent: sent.concat(), back, end }
}

impl FramingCase {
    /// Runs the case, with its bytes sent in chunks.
    async fn run(&self, address: SocketAddr, chunk_size: usize) {
        self.run_with(address, &[], chunk_size).await;
    }

    /// Runs the case with these headers in the handshake.
    async fn run_with(&self, address: SocketAddr, headers: &[&str], chunk_size: usize) {
        let name = format!("{} in chunks of {chunk_size}", self.name);
        let mut client = RawClient::open(address, "/ws/echo", headers).await;
        for chunk in self.sent.chunks(chunk_size) {
            client.send(chunk).await;
        }
        for (first, payload) in &self.back {
            let (got, echoed) =
                client.next().await.unwrap_or_else(|| panic!("{name}: the connection ended"));
            assert_eq!(got, *first, "{name}");
            assert!(echoed == *payload, "{name}: another payload");
        }
        let code = match self.end {
            Ending::Alive => {
                client.send(&close(1000, b"")).await;
                Some(1000)
            }
            Ending::Fails(code) => Some(code),
            Ending::Closed(code) => code,
        };
        let (first, payload) =
            client.next().await.unwrap_or_else(|| panic!("{name}: no close frame"));
        assert_eq!(first, FIN | CLOSE, "{name}: {payload:?}");
        let got = payload.first_chunk().map(|code| u16::from_be_bytes(*code));
        assert_eq!(got, code, "{name}");
        assert_eq!(client.next().await, None, "{name}: a frame after the close frame");
    }
}

async fn gateway() -> Gateway {
    Gateway::start(&[("server.echo", "verbatim"), ("limits.message_bytes_max", "4MiB")]).await
}

async fn run_all(cases: Vec<FramingCase>) {
    let gateway = gateway().await;
    // Concurrently, because most of the time is spent waiting for connections to end.
    join_all(cases.iter().map(async |case| {
        case.run(gateway.address, usize::MAX).await;
        // Byte by byte, unless that takes too long.
        case.run(gateway.address, if case.sent.len() < 500 { 1 } else { 997 }).await;
    }))
    .await;
    println!("{} cases, each whole and in chunks", cases.len());
}

fn messages() -> Vec<FramingCase> {
    let mut cases = vec![];
    for opcode in [TEXT, BINARY] {
        for length in [0, 1, 125, 126, 127, 128, 65_535, 65_536] {
            let (first, payload) = (FIN | opcode, vec![b'*'; length]);
            let name = format!("a message of {length}");
            cases.push(case(name, &[frame(first, &payload)], &[(first, &payload)], Ending::Alive));
        }
    }
    cases
}

fn pings() -> Vec<FramingCase> {
    let ping = |payload: &[u8]| frame(FIN | PING, payload);
    let long = [0xFE; 125];
    let mut cases = vec![
        case("an empty ping", &[ping(b"")], &[(FIN | PONG, b"")], Ending::Alive),
        case("a ping", &[ping(b"Hello")], &[(FIN | PONG, b"Hello")], Ending::Alive),
        case(
            "a ping that is not text",
            &[ping(&[0, 0xFF])],
            &[(FIN | PONG, &[0, 0xFF])],
            Ending::Alive,
        ),
        case("a ping of 125", &[ping(&long)], &[(FIN | PONG, &long)], Ending::Alive),
        case("a ping of 126", &[ping(&[0xFE; 126])], &[], Ending::Fails(1002)),
        case("an unsolicited pong", &[frame(FIN | PONG, b"x")], &[], Ending::Alive),
        case(
            "a pong, then a ping",
            &[frame(FIN | PONG, b"x"), ping(b"y")],
            &[(FIN | PONG, b"y")],
            Ending::Alive,
        ),
    ];
    let (sent, back): (Vec<_>, Vec<_>) = (b"0123456789")
        .iter()
        .map(|n| (ping(&[*n]), (FIN | PONG, std::slice::from_ref(n))))
        .unzip();
    cases.push(case("ten pings in order", &sent, &back, Ending::Alive));
    cases
}

fn reserved() -> Vec<FramingCase> {
    let mut cases = vec![];
    for bits in 1..8_u8 {
        for opcode in [TEXT, BINARY, PING, PONG, CLOSE, CONTINUATION] {
            let bad = frame(FIN | bits << 4 | opcode, b"");
            let name = format!("reserved bits {bits} on opcode {opcode}");
            cases.push(case(
                name,
                &[text("before"), bad, text("after")],
                &[(FIN | TEXT, b"before")],
                Ending::Fails(1002),
            ));
        }
    }
    for opcode in (3..8).chain(11..16) {
        for payload in [&b""[..], b"unknown"] {
            cases.push(case(
                format!("opcode {opcode} with {} bytes", payload.len()),
                &[text("before"), frame(FIN | opcode, payload), frame(FIN | PING, b"")],
                &[(FIN | TEXT, b"before")],
                Ending::Fails(1002),
            ));
        }
    }
    let bare = [&[FIN | TEXT, 1, b'x'][..], &[FIN | PING, 0], &[FIN | CLOSE, 0]];
    for bytes in bare {
        cases.push(case("a frame without a mask", &[bytes.to_vec()], &[], Ending::Fails(1002)));
    }
    for length in [&[126, 0, 125][..], &[127, 0, 0, 0, 0, 0, 0, 255, 255], &[127, 128, 0, 0, 0]] {
        let mut bytes = vec![FIN | BINARY, 0x80 | length[0]];
        bytes.extend(&length[1..]);
        bytes.resize(bytes.len() + 12, 0);
        cases.push(case("an invalid length", &[bytes], &[], Ending::Fails(1002)));
    }
    cases
}

fn fragments() -> Vec<FramingCase> {
    let begin = |payload: &[u8]| frame(TEXT, payload);
    let more = |payload: &[u8]| frame(CONTINUATION, payload);
    let end = |payload: &[u8]| frame(FIN | CONTINUATION, payload);
    let ping = || frame(FIN | PING, b"p");
    let (pong, whole) = ((FIN | PONG, &b"p"[..]), (FIN | TEXT, &b"ab"[..]));
    vec![
        case("a fragmented ping", &[frame(PING, b"a"), end(b"b")], &[], Ending::Fails(1002)),
        case("a fragmented pong", &[frame(PONG, b"a"), end(b"b")], &[], Ending::Fails(1002)),
        case("a fragmented close", &[frame(CLOSE, b"")], &[], Ending::Fails(1002)),
        case("two fragments", &[begin(b"a"), end(b"b")], &[whole], Ending::Alive),
        case(
            "a ping between fragments",
            &[begin(b"a"), ping(), end(b"b")],
            &[pong, whole],
            Ending::Alive,
        ),
        case(
            "empty fragments and a pong between",
            &[begin(b""), more(b"ab"), frame(FIN | PONG, b""), more(b""), end(b"")],
            &[whole],
            Ending::Alive,
        ),
        case(
            "only empty fragments",
            &[begin(b""), more(b""), end(b"")],
            &[(FIN | TEXT, b"")],
            Ending::Alive,
        ),
        case("a continuation without a message", &[end(b"a"), text("b")], &[], Ending::Fails(1002)),
        case(
            "an open continuation without a message",
            &[more(b"a"), text("b")],
            &[],
            Ending::Fails(1002),
        ),
        case(
            "a continuation after a whole message",
            &[begin(b"a"), end(b"b"), end(b"c")],
            &[whole],
            Ending::Fails(1002),
        ),
        case("a message within a message", &[begin(b"a"), text("b")], &[], Ending::Fails(1002)),
        case(
            "a fragmented message within a message",
            &[begin(b"a"), begin(b"b"), end(b"c")],
            &[],
            Ending::Fails(1002),
        ),
        case(
            "pings between many fragments",
            &[begin(b"a"), ping(), more(b""), ping(), end(b"b"), ping()],
            &[pong, pong, whole, pong],
            Ending::Alive,
        ),
    ]
}

/// Valid and invalid UTF-8 (Markus Kuhn's stress test, as in Autobahn's group 6).
const VALID: [&str; 12] = [
    "κόσμε",
    "Hello-µ@ßöäüàá-UTF-8!!",
    "\0",
    "\u{7F}",
    "\u{80}",
    "\u{7FF}",
    "\u{800}",
    "\u{D7FF}",
    "\u{E000}",
    "\u{FFFD}",
    "\u{10000}",
    "\u{10FFFF}",
];
const INVALID: [&[u8]; 26] = [
    b"\xCE\xBA\xE1\xBD\xB9\xCF\x83\xCE\xBC\xCE\xB5\xED\xA0\x80edited",
    b"\xF8\x88\x80\x80\x80",
    b"\xFC\x84\x80\x80\x80\x80",
    b"\xF7\xBF\xBF\xBF",
    b"\xFB\xBF\xBF\xBF\xBF",
    b"\xFD\xBF\xBF\xBF\xBF\xBF",
    b"\xF4\x90\x80\x80",
    b"\x80",
    b"\xBF",
    b"\x80\xBF\x80\xBF",
    b"\xC0 \xC1 ",
    b"\xE0 ",
    b"\xF0 ",
    b"\xC0",
    b"\xC2",
    b"\xE0\x80",
    b"\xE1\x80",
    b"\xF1\x80\x80",
    b"\xFE",
    b"\xFF",
    b"\xC0\xAF",
    b"\xE0\x9F\xBF",
    b"\xF0\x8F\xBF\xBF",
    b"\xED\xA0\x80",
    b"\xED\xAF\xBF\xED\xBF\xBF",
    b"\xED\xBF\xBF",
];

fn utf8() -> Vec<FramingCase> {
    let mut cases = vec![];
    let split = |bytes: &[u8]| {
        let mut frames = vec![frame(TEXT, b"")];
        frames.extend(bytes.iter().map(|byte| frame(CONTINUATION, &[*byte])));
        frames.push(frame(FIN | CONTINUATION, b""));
        frames
    };
    for good in VALID {
        let back = [(FIN | TEXT, good.as_bytes())];
        cases.push(case(format!("{good:?}"), &[text(good)], &back, Ending::Alive));
        cases.push(case(format!("{good:?}, split"), &split(good.as_bytes()), &back, Ending::Alive));
    }
    for bad in INVALID {
        let whole = [frame(FIN | TEXT, bad)];
        cases.push(case(format!("{bad:02x?}"), &whole, &[], Ending::Fails(1007)));
        cases.push(case(format!("{bad:02x?}, split"), &split(bad), &[], Ending::Fails(1007)));
    }
    cases
}

fn closes() -> Vec<FramingCase> {
    let long = [b'x'; 123];
    let mut cases = vec![
        case("no payload", &[frame(FIN | CLOSE, b"")], &[], Ending::Closed(None)),
        case("half a code", &[frame(FIN | CLOSE, b"x")], &[], Ending::Fails(1002)),
        case("a reason of 123", &[close(1000, &long)], &[], Ending::Closed(Some(1000))),
        case("126 bytes", &[close(1000, &[b'x'; 124])], &[], Ending::Fails(1002)),
        case(
            "a reason that is not UTF-8",
            &[close(1000, &[0xED, 0xA0, 0x80])],
            &[],
            Ending::Fails(1007),
        ),
        case(
            "a message and a ping after it",
            &[close(1000, b""), text("late"), frame(FIN | PING, b"")],
            &[],
            Ending::Closed(Some(1000)),
        ),
        case(
            "within a fragmented message",
            &[frame(TEXT, b"a"), close(1000, b""), frame(FIN | CONTINUATION, b"b")],
            &[],
            Ending::Closed(Some(1000)),
        ),
        case("twice", &[close(1000, b""), close(1001, b"")], &[], Ending::Closed(Some(1000))),
    ];
    let good = (1000..=1003).chain(1007..=1014).chain([3000, 3999, 4000, 4999]);
    cases.extend(good.map(|code| {
        case(format!("code {code}"), &[close(code, b"why")], &[], Ending::Closed(Some(code)))
    }));
    for code in [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535] {
        cases.push(case(format!("code {code}"), &[close(code, b"")], &[], Ending::Fails(1002)));
    }
    cases
}

/// Large messages, whole and in fragments.
fn large() -> Vec<FramingCase> {
    let mut cases = vec![];
    let payload: Vec<u8> = (0..1 << 20).map(|i: u32| b'a' + (i % 26) as u8).collect();
    for (opcode, fragment) in [(TEXT, 1 << 20), (BINARY, 1 << 20), (TEXT, 1300), (BINARY, 65_536)] {
        let parts: Vec<&[u8]> = payload.chunks(fragment).collect();
        let sent: Vec<_> = parts
            .iter()
            .enumerate()
            .map(|(i, part)| {
                let fin = if i + 1 == parts.len() { FIN } else { 0 };
                frame(fin | if i == 0 { opcode } else { CONTINUATION }, part)
            })
            .collect();
        let name = format!("1 MiB in fragments of {fragment}");
        cases.push(case(name, &sent, &[(FIN | opcode, &payload)], Ending::Alive));
    }
    cases
}

/// Messages above the limit: by the header of one frame, and by the sum of fragments.
fn too_large() -> Vec<FramingCase> {
    let huge = vec![0; 4 << 20];
    let mut header = frame(FIN | BINARY, &[0; 65_536]);
    header[2..10].copy_from_slice(&((4_u64 << 20) + 1).to_be_bytes());
    header.truncate(14);
    let fits = frame(BINARY, &huge);
    vec![
        case("a frame's length", &[header], &[], Ending::Fails(1009)),
        case("fragments", &[fits, frame(FIN | CONTINUATION, b"x")], &[], Ending::Fails(1009)),
    ]
}

#[tokio::test]
async fn messages_and_pings_are_echoed() {
    run_all([messages(), pings()].concat()).await;
}

#[tokio::test]
async fn invalid_headers_fail_the_connection() {
    run_all(reserved()).await;
}

#[tokio::test]
async fn fragments_are_joined() {
    run_all(fragments()).await;
}

#[tokio::test]
async fn invalid_utf8_fails_the_connection() {
    run_all(utf8()).await;
}

#[tokio::test]
async fn close_frames_are_answered_and_validated() {
    run_all(closes()).await;
}

#[tokio::test]
async fn large_messages_are_echoed_and_larger_ones_rejected() {
    run_all([large(), too_large()].concat()).await;
}

#[tokio::test]
async fn the_cases_hold_behind_nginx() {
    let gateway = gateway().await;
    let nginx = Nginx::start(&[gateway.address]).await;
    let all = [messages(), pings(), reserved(), fragments(), utf8(), closes(), large()].concat();
    let sample = all.iter().step_by(5).chain(&too_large()[..1]).cloned().collect::<Vec<_>>();
    join_all(sample.iter().map(|case| case.run(nginx.address, usize::MAX))).await;
    println!("{} cases through nginx", sample.len());
}

#[tokio::test]
async fn invalid_utf8_fails_before_the_end_of_its_frame() {
    let gateway = gateway().await;
    let valid_text = text(&"x".repeat(1000));
    let bad = |valid: &[u8], bad: &[u8], behind: &[u8]| {
        let whole = frame(FIN | TEXT, &[valid, bad, behind].concat());
        whole[..whole.len() - behind.len()].to_vec()
    };
    for (name, sent) in [
        ("at the start of a frame", bad(b"", b"\xFF", &[b'x'; 100])),
        ("in the middle of a large one", bad(&[b'x'; 70_000], b"\xED\xA0", &[b'x'; 100])),
        ("beyond the last character", bad("κόσμε".as_bytes(), b"\xF4\x90", b"\x80\x80")),
        ("in an open fragment", [frame(TEXT, b"ok"), frame(CONTINUATION, b"\xC0")].concat()),
        (
            "after half a character in another fragment",
            [frame(TEXT, b"\xE2\x82"), frame(CONTINUATION, b"x")].concat(),
        ),
    ] {
        for chunk_size in [usize::MAX, 1] {
            let mut client = RawClient::open(gateway.address, "/ws/echo", &[]).await;
            client.send(&valid_text).await;
            assert_eq!(client.next().await.unwrap().0, FIN | TEXT);
            for chunk in sent.chunks(chunk_size.min(sent.len())).take(2000) {
                client.send(chunk).await;
            }
            if sent.len() > 2000 && chunk_size == 1 {
                client.send(&sent[2000..]).await;
            }
            // The rest was not sent, so this is the reaction to the invalid byte.
            let (first, payload) = client.next().await.unwrap();
            assert_eq!(
                (first, &payload[..2]),
                (FIN | CLOSE, &1007_u16.to_be_bytes()[..]),
                "{name}"
            );
        }
    }
}

#[tokio::test]
async fn the_gateway_waits_a_few_seconds_for_the_answer_to_a_close() {
    let gateway = Gateway::start(&[]).await;
    let closing = async || {
        let mut client = RawClient::open(gateway.address, "/ws/echo", &[]).await;
        client.send(&text("bye")).await;
        assert_eq!(client.next().await, Some((FIN | CLOSE, 1000_u16.to_be_bytes().to_vec())));
        client
    };
    // Frames before the answer are dropped, and the connection ends with the answer.
    let mut client = closing().await;
    client.send(&[text("late"), frame(FIN | PING, b"late")].concat()).await;
    let started = Instant::now();
    client.send(&close(1000, b"")).await;
    assert_eq!(client.next().await, None);
    assert!(started.elapsed().as_secs() < 3, "{:?}", started.elapsed());

    // Without an answer the gateway ends the connection after a few seconds.
    let mut client = closing().await;
    let started = Instant::now();
    assert_eq!(client.next().await, None);
    let waited = started.elapsed().as_secs();
    assert!((3..10).contains(&waited), "{:?}", started.elapsed());
}
