//! The catalogue: every attack as an entry of data.
//!
//! The groups follow the project's threat list: A unfair scheduling and unmetered input, B durable
//! state that clients make the cluster keep, E connections that stay open and do little.
//!
//! Pure.

use std::time::Duration;

use super::{
    profile::{AttackHandshake, AttackProfile, OnFinished, binary, frame, frame_header, text},
    verdict::Allowance,
};

/// One attack.
pub(crate) struct Attack {
    /// Name on the command line.
    pub(crate) name: &'static str,
    /// Group.
    pub(crate) group: &'static str,
    /// Description of what the attacker does.
    pub(crate) what: &'static str,
    /// Profiles that run before legitimate clients are measured.
    pub(crate) prepare: fn(Scale) -> Vec<AttackProfile>,
    /// Profiles that run while legitimate clients are measured.
    pub(crate) attack: fn(Scale) -> Vec<AttackProfile>,
    /// Whether the prepared connections are closed at once when the attack begins.
    pub(crate) drops_prepared: bool,
    /// Resources that the attack may use.
    pub(crate) allowed: fn(Scale) -> Allowance,
}

/// Limits of this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    /// Most connections that the attacker may hold.
    pub(crate) connections_max: u32,
}

impl Scale {
    /// So many connections, or as many as the machine allows.
    fn of(self, connections: u32) -> u32 {
        connections.min(self.connections_max)
    }
}

/// Defaults of an entry.
const PLAIN: Attack = Attack {
    name: "",
    group: "",
    what: "",
    prepare: |_| Vec::new(),
    attack: |_| Vec::new(),
    drops_prepared: false,
    allowed: |_| Allowance { users: 8, ..NOTHING },
};

const NOTHING: Allowance = Allowance {
    streams: 0,
    users: 0,
    records: 0,
    record_bytes: 0,
    newcomers: Duration::ZERO,
    close: None,
};
/// Time that newcomers may wait behind some thousands of connections: a node opens 5,000 and more
/// connections a second.
const QUEUE: Duration = Duration::from_secs(2);

/// Keys of a log in Redis: entries, position, two hashes of ids.
const KEYS_PER_LOG: u64 = 4;
/// Inboxes of users who were never connected that one user may create in an hour
/// (`limits.new_inboxes_per_hour`).
const NEW_INBOXES: u64 = 100;
/// Rooms that one user may create in a minute, and at once (`limits.new_rooms_per_minute`).
const NEW_ROOMS: u64 = 600 + 3000;

/// All attacks.
pub(crate) const CATALOGUE: &[Attack] = &[
    Attack {
        name: "none",
        group: "-",
        what: "nothing: the difference of the two nodes without an attack",
        ..PLAIN
    },
    // A1: input that costs more to handle than to send.
    Attack {
        name: "echo-pings",
        group: "A1",
        what: "2 connections to /ws/echo repeat an empty masked ping",
        attack: |_| vec![AttackProfile::websocket(2, echo).repeating(&frame(0x89, b""))],
        ..PLAIN
    },
    Attack {
        name: "bad-text",
        group: "A1",
        what: "8 connections repeat the text frame `x`",
        attack: |_| vec![AttackProfile::websocket(8, user).repeating(&text("x"))],
        ..PLAIN
    },
    Attack {
        name: "bad-text-unread",
        group: "A1",
        what: "as bad-text, without reading the errors",
        attack: |_| vec![unread(AttackProfile::websocket(8, user).repeating(&text("x")))],
        allowed: |_| Allowance { users: 8, streams: 8, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "continuations",
        group: "A1",
        what: "8 connections begin a message and repeat empty continuation frames",
        attack: |_| {
            let begun =
                AttackProfile { first: |_| frame(0x01, b"a"), ..AttackProfile::websocket(8, user) };
            vec![begun.repeating(&frame(0x00, b""))]
        },
        ..PLAIN
    },
    Attack {
        name: "tiny-fragments",
        group: "A1",
        what: "8 connections send messages in fragments of one byte",
        attack: |_| {
            let mut message = frame(0x01, b"{");
            (0..500).for_each(|_| message.extend(frame(0x00, b" ")));
            message.extend(frame(0x80, b"}"));
            vec![AttackProfile::websocket(8, user).repeating(&message)]
        },
        ..PLAIN
    },
    Attack {
        name: "pongs",
        group: "A1",
        what: "8 connections repeat an empty pong",
        attack: |_| vec![AttackProfile::websocket(8, user).repeating(&frame(0x8A, b""))],
        ..PLAIN
    },
    Attack {
        name: "unread-pings",
        group: "A1",
        what: "8 connections repeat a ping of 125 bytes and read no pong",
        attack: |_| {
            vec![unread(AttackProfile::websocket(8, user).repeating(&frame(0x89, &[b'p'; 125])))]
        },
        allowed: |_| Allowance { users: 8, streams: 8, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "json-pings",
        group: "A1",
        what: "8 connections repeat the frame `ping`",
        attack: |_| vec![AttackProfile::websocket(8, user).repeating(&text(r#"{"type":"ping"}"#))],
        ..PLAIN
    },
    Attack {
        name: "messages",
        group: "A1",
        what: "8 connections send messages of 100 bytes far above the rate limit",
        attack: |_| {
            let first = |_| text(r#"{"type":"join","room":"a1-messages"}"#);
            let profile = AttackProfile { first, ..AttackProfile::websocket(8, user) };
            let content = "x".repeat(60);
            vec![profile.repeating(&text(&format!(
                r#"{{"type":"message","room":"a1-messages","content":"{content}"}}"#
            )))]
        },
        allowed: |_| Allowance { users: 8, records: 8, record_bytes: 1 << 20, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "large-json",
        group: "A1",
        what: "8 connections repeat a JSON frame of 250 KB with an unknown type",
        attack: |_| {
            let numbers = "1,".repeat(124_000);
            let json = format!(r#"{{"list":[{numbers}1],"type":"nothing"}}"#);
            vec![AttackProfile::websocket(8, user).repeating(&text(&json))]
        },
        ..PLAIN
    },
    Attack {
        name: "deep-json",
        group: "A1",
        what: "8 connections repeat a JSON frame of 120,000 levels",
        attack: |_| {
            let (open, close) = ("[".repeat(120_000), "]".repeat(120_000));
            let json = format!(r#"{{"type":"message","room":"r","content":{open}{close}}}"#);
            vec![AttackProfile::websocket(8, user).repeating(&text(&json))]
        },
        ..PLAIN
    },
    Attack {
        name: "empty-deflate",
        group: "A1",
        what: "8 connections repeat a compressed message of 10,000 empty blocks",
        attack: |_| {
            let mut blocks = [0x00, 0x00, 0x00, 0xFF, 0xFF].repeat(10_000);
            blocks.push(0x00);
            let profile = AttackProfile {
                handshake: AttackHandshake::Deflate,
                ..AttackProfile::websocket(8, user)
            };
            vec![profile.repeating(&frame(0xC1, &blocks))]
        },
        ..PLAIN
    },
    Attack {
        name: "bad-binary",
        group: "A1",
        what: "8 connections repeat binary frames whose header is no JSON",
        attack: |_| {
            vec![AttackProfile::websocket(8, user).repeating(&binary("{nothing", b"payload"))]
        },
        ..PLAIN
    },
    Attack {
        name: "echo-text",
        group: "A1",
        what: "8 connections to /ws/echo repeat a text of 100 bytes",
        attack: |_| vec![AttackProfile::websocket(8, echo).repeating(&text(&"y".repeat(100)))],
        ..PLAIN
    },
    // A2: work for closed connections.
    Attack {
        name: "history-gone",
        group: "A2",
        what: "5 connections send 1,400 `history` of a full inbox and close",
        prepare: |_| vec![full_inbox()],
        attack: |_| {
            let asks = AttackProfile::websocket(5, |_| "/ws?user=a2-reader".to_owned());
            vec![AttackProfile {
                on_finished: OnFinished::Close,
                reopens: false,
                ..asks.sending(histories)
            }]
        },
        allowed: |_| Allowance { users: 2, records: 2, record_bytes: 1 << 20, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "history-again",
        group: "A2",
        what: "as history-gone, repeated 2 times a second",
        prepare: |_| vec![full_inbox()],
        attack: |_| {
            let asks = AttackProfile::websocket(5, |_| "/ws?user=a2-reader".to_owned());
            let asks = asks.sending(histories);
            vec![AttackProfile { on_finished: OnFinished::Reopen, opens_per_second: 2, ..asks }]
        },
        allowed: |_| Allowance { users: 2, records: 2, record_bytes: 1 << 20, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "gone-handshakes",
        group: "A2",
        what: "2,500 connections a second from 500 addresses send a handshake and close",
        attack: |_| vec![abandoned_handshakes(2_500, 500)],
        allowed: |_| Allowance { users: 1, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "handshakes",
        group: "A2",
        what: "1,000 handshakes a second from one address",
        attack: |_| {
            let profile = AttackProfile::websocket(50, |_| "/ws?user=a2-again".to_owned());
            vec![AttackProfile { on_finished: OnFinished::Reopen, ..profile }]
        },
        allowed: |_| Allowance { users: 1, ..NOTHING },
        ..PLAIN
    },
    // A3: many names in a frame.
    Attack {
        name: "watch-churn",
        group: "A3",
        what: "5 connections watch and unwatch 100 new names, 190 frames a second each",
        attack: |_| vec![AttackProfile::websocket(5, user).sending(watches).per_second(190)],
        ..PLAIN
    },
    Attack {
        name: "room-churn",
        group: "A3",
        what: "5 connections join and leave new rooms, 95 a second each",
        attack: |_| {
            vec![
                AttackProfile::websocket(5, user)
                    .sending(|serial, number| {
                        let room = format!("a3-{serial}-{number}");
                        Some([frame_of("join", &room), frame_of("leave", &room)].concat())
                    })
                    .per_second(95),
            ]
        },
        allowed: |_| rooms_of(5, 2),
        ..PLAIN
    },
    // A4: streams that are not read.
    Attack {
        name: "sse-unread",
        group: "A4",
        what: "100 event streams of 20 rooms with full history, nothing read",
        prepare: |_| vec![full_rooms()],
        attack: |_| {
            vec![unread(AttackProfile { addresses: 2, ..AttackProfile::raw(100, stream_of_rooms) })]
        },
        allowed: |_| full_rooms_and(100),
        ..PLAIN
    },
    Attack {
        name: "sse-unread-300",
        group: "A4",
        what: "as sse-unread with 300 event streams",
        prepare: |_| vec![full_rooms()],
        attack: |_| {
            vec![unread(AttackProfile { addresses: 4, ..AttackProfile::raw(300, stream_of_rooms) })]
        },
        allowed: |_| full_rooms_and(300),
        ..PLAIN
    },
    Attack {
        name: "history-unread",
        group: "A4",
        what: "100 WebSockets join 20 rooms with full history, nothing read",
        prepare: |_| vec![full_rooms()],
        attack: |_| {
            let first = |_| (0..20).flat_map(|room| frame_of("join", &full_room(room))).collect();
            let profile =
                AttackProfile { first, addresses: 2, ..AttackProfile::websocket(100, user) };
            vec![unread(profile)]
        },
        allowed: |_| full_rooms_and(100),
        ..PLAIN
    },
    Attack {
        name: "loud-unread",
        group: "A4",
        what: "100 WebSockets in a room of 45 messages of 16 KiB a second, nothing read",
        attack: |_| {
            let first = |_| frame_of("join", "a4-loud");
            let members =
                AttackProfile { first, addresses: 2, ..AttackProfile::websocket(100, user) };
            let sender = AttackProfile { first, ..AttackProfile::websocket(1, user) };
            let sender = sender.sending(|_, _| Some(message("a4-loud", 16 * 1024)));
            vec![unread(members), sender.per_second(45)]
        },
        allowed: |_| Allowance {
            users: 101,
            streams: 101,
            records: 1,
            record_bytes: 32 << 20,
            ..NOTHING
        },
        ..PLAIN
    },
    // A5: password guessing and requests without a valid key.
    Attack {
        name: "password-guessing",
        group: "A5",
        what: "700 connections of 4 addresses guess the password of a room, 3 times a second each",
        prepare: |_| {
            let first =
                |_| text(r#"{"type":"create_room","room":"a5-locked","password":"correct-horse"}"#);
            vec![AttackProfile {
                first,
                ..AttackProfile::websocket(1, |_| "/ws?user=a5-owner".to_owned())
            }]
        },
        attack: |_| {
            let guesses = AttackProfile::websocket(700, user).sending(|serial, number| {
                Some(text(&format!(
                    r#"{{"type":"join","room":"a5-locked","password":"{serial}-{number}"}}"#
                )))
            });
            vec![AttackProfile { addresses: 4, ..guesses }.per_second(3)]
        },
        allowed: |_| Allowance { users: 702, records: 4, record_bytes: 16 << 10, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "api-without-key",
        group: "A5",
        what: "8 connections repeat an API request without a key",
        attack: |_| vec![request("GET /api/v1/online HTTP/1.1\r\nHost: h\r\n\r\n")],
        ..PLAIN
    },
    Attack {
        name: "api-wrong-key",
        group: "A5",
        what: "8 connections repeat an API request with a wrong key",
        attack: |_| {
            let lines = "Host: h\r\nAuthorization: Bearer not-the-key-of-anybody\r\n\r\n";
            vec![request(&format!("GET /api/v1/online HTTP/1.1\r\n{lines}"))]
        },
        ..PLAIN
    },
    Attack {
        name: "http-pages",
        group: "A5",
        what: "8 connections repeat GET /",
        attack: |_| vec![request("GET / HTTP/1.1\r\nHost: h\r\n\r\n")],
        ..PLAIN
    },
    Attack {
        name: "http-connections",
        group: "A5",
        what: "2,000 connections a second from 50 addresses ask for /health and close",
        attack: |_| {
            let first =
                |_| b"GET /health HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".to_vec();
            let profile = AttackProfile::raw(400, first);
            vec![AttackProfile {
                addresses: 50,
                opens_per_second: 2_000,
                on_finished: OnFinished::Reopen,
                ..profile
            }]
        },
        ..PLAIN
    },
    // A6: many connections at once.
    Attack {
        name: "leave-at-once",
        group: "A6",
        what: "15,000 members of rooms leave at once",
        prepare: |scale| vec![members(scale.of(15_000))],
        drops_prepared: true,
        allowed: |scale| Allowance { users: scale.of(15_000).into(), newcomers: QUEUE, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "return-at-once",
        group: "A6",
        what: "5,000 members of rooms leave and return at once",
        prepare: |scale| vec![members(scale.of(5_000))],
        drops_prepared: true,
        attack: |scale| {
            vec![AttackProfile { opens_per_second: 1_000_000, ..members(scale.of(5_000)) }]
        },
        allowed: |scale| Allowance {
            users: u64::from(scale.of(5_000)) * 2,
            newcomers: QUEUE,
            ..NOTHING
        },
    },
    // B: durable state.
    Attack {
        name: "large-directs",
        group: "B1",
        what: "one connection sends directs of 250 KB to ever new users, 48 a second",
        attack: |_| {
            vec![
                AttackProfile::websocket(1, |_| "/ws?user=b1-large".to_owned())
                    .sending(|serial, number| {
                        Some(direct(&format!("b1-l-{serial}-{number}"), 250_000))
                    })
                    .per_second(48),
            ]
        },
        allowed: |_| inboxes_of(1),
        ..PLAIN
    },
    Attack {
        name: "small-directs",
        group: "B1",
        what: "4 connections send directs of 1 byte to ever new users, 50 a second each",
        attack: |_| {
            vec![
                AttackProfile::websocket(4, user)
                    .sending(|serial, number| Some(direct(&format!("b1-s-{serial}-{number}"), 1)))
                    .per_second(50),
            ]
        },
        allowed: |_| inboxes_of(4),
        ..PLAIN
    },
    Attack {
        name: "room-logs",
        group: "B1",
        what: "2 connections join a new room, send 4 KB there and leave, 45 times a second each",
        attack: |_| {
            vec![
                AttackProfile::websocket(2, user)
                    .sending(|serial, number| {
                        let room = format!("b1-log-{serial}-{number}");
                        let (join, leave) = (frame_of("join", &room), frame_of("leave", &room));
                        Some([join, message(&room, 4096), leave].concat())
                    })
                    .per_second(45),
            ]
        },
        allowed: |_| rooms_of(2, KEYS_PER_LOG),
        ..PLAIN
    },
    Attack {
        name: "large-messages",
        group: "B1",
        what: "one connection sends messages of 250 KB into 40 rooms, 48 a second",
        attack: |_| {
            let first =
                |_| (0..40).flat_map(|n| frame_of("join", &format!("b1-big-{n}"))).collect();
            vec![
                AttackProfile { first, ..AttackProfile::websocket(1, user) }
                    .sending(|_, number| Some(message(&format!("b1-big-{}", number % 40), 250_000)))
                    .per_second(48),
            ]
        },
        // The bytes that `limits.durable_bytes_per_minute` lets a user store at once.
        allowed: |_| Allowance {
            users: 1,
            records: 160,
            record_bytes: (64 << 20) / 160,
            ..NOTHING
        },
        ..PLAIN
    },
    Attack {
        name: "create-rooms",
        group: "B1",
        what: "2 connections create rooms with 8 KB of meta, 100 a second each",
        attack: |_| {
            vec![AttackProfile::websocket(2, user)
                .sending(|serial, number| {
                    let pad = "m".repeat(8_000);
                    Some(text(&format!(
                        r#"{{"type":"create_room","room":"b1-made-{serial}-{number}","meta":{{"pad":"{pad}"}}}}"#
                    )))
                })
                .per_second(100)]
        },
        allowed: |_| Allowance { users: 2, records: 200 * 4, record_bytes: 4 << 10, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "new-users",
        group: "B1",
        what: "100 connections a second from 20 addresses, each as a new user",
        attack: |_| {
            let ping = |_, number| (number == 0).then(|| text(r#"{"type":"ping"}"#));
            let profile = AttackProfile::websocket(20, user).sending(ping).per_second(10);
            vec![AttackProfile {
                addresses: 20,
                opens_per_second: 100,
                on_finished: OnFinished::Reopen,
                ..profile
            }]
        },
        allowed: |_| Allowance { users: 800, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "sessions",
        group: "B1",
        what: "one user makes sessions of 16 KB, 20 a second from 4 addresses",
        attack: |_| {
            let profile = AttackProfile::websocket(10, |_| "/ws?user=b1-sessions".to_owned());
            let profile = profile.sending(session_data).per_second(10);
            vec![AttackProfile {
                addresses: 4,
                opens_per_second: 20,
                on_finished: OnFinished::Reopen,
                ..profile
            }]
        },
        allowed: |_| Allowance { users: 1, records: 100, record_bytes: 20 << 10, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "session-data",
        group: "B1",
        what: "ever new users keep 16 KB of session data, 100 a second from 20 addresses",
        attack: |_| {
            let profile = AttackProfile::websocket(20, user).sending(session_data).per_second(10);
            vec![AttackProfile {
                addresses: 20,
                opens_per_second: 100,
                on_finished: OnFinished::Reopen,
                ..profile
            }]
        },
        allowed: |_| Allowance { users: 800, records: 800, record_bytes: 20 << 10, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "read-marks",
        group: "B1",
        what: "5 connections join 400 rooms and move their marks, 190 frames a second each",
        attack: |_| {
            vec![
                AttackProfile::websocket(5, user)
                    .sending(|serial, number| {
                        let room = format!("b1-mark-{serial}-{}", number % 400);
                        Some(match number {
                            0..400 => frame_of("join", &room),
                            _ => text(&format!(
                                r#"{{"type":"read","room":"{room}","seq":{number}}}"#
                            )),
                        })
                    })
                    .per_second(190),
            ]
        },
        allowed: |_| rooms_of(5, KEYS_PER_LOG),
        ..PLAIN
    },
    // E: connections that stay open and do little.
    Attack {
        name: "silent",
        group: "E",
        what: "500 TCP connections of 5 addresses that send nothing",
        attack: |_| vec![AttackProfile { addresses: 5, ..AttackProfile::raw(500, |_| Vec::new()) }],
        ..PLAIN
    },
    Attack {
        name: "slow-headers",
        group: "E",
        what: "500 handshakes of 5 addresses that send a header line a second",
        attack: |_| {
            let first = |_| b"GET /ws HTTP/1.1\r\nHost: h\r\n".to_vec();
            let profile = AttackProfile { addresses: 5, ..AttackProfile::raw(500, first) };
            vec![
                profile
                    .sending(|_, number| Some(format!("X-{number}: y\r\n").into_bytes()))
                    .per_second(1),
            ]
        },
        ..PLAIN
    },
    Attack {
        name: "slow-bodies",
        group: "E",
        what: "100 API requests that announce 200 KB and send a byte a second",
        attack: |_| {
            let first = |_| {
                b"POST /api/v1/broadcast HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer no\r\n\
                  Content-Type: application/json\r\nContent-Length: 200000\r\n\r\n"
                    .to_vec()
            };
            vec![AttackProfile::raw(100, first).sending(|_, _| Some(b" ".to_vec())).per_second(1)]
        },
        ..PLAIN
    },
    Attack {
        name: "announced-frames",
        group: "E",
        what: "500 WebSockets announce a frame of 250 KB and send one byte of it",
        attack: |_| {
            let first = |_| [frame_header(0x81, 250_000), b"{".to_vec()].concat();
            vec![AttackProfile { first, addresses: 5, ..AttackProfile::websocket(500, user) }]
        },
        allowed: |_| Allowance { users: 500, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "partial-frames",
        group: "E",
        what: "200 WebSockets send 200 KB of a frame of 250 KB and hold it",
        attack: |_| {
            let first = |_| [frame_header(0x81, 250_000), vec![b' '; 200_000]].concat();
            vec![AttackProfile { first, addresses: 2, ..AttackProfile::websocket(200, user) }]
        },
        allowed: |_| Allowance { users: 200, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "partial-messages",
        group: "E",
        what: "200 WebSockets send 200 KB in fragments and no last one",
        attack: |_| {
            let first = |_| {
                let fragment = frame(0x00, &[b' '; 10_000]);
                [frame(0x01, b"{"), fragment.repeat(20)].concat()
            };
            vec![AttackProfile { first, addresses: 2, ..AttackProfile::websocket(200, user) }]
        },
        allowed: |_| Allowance { users: 200, ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "too-large",
        group: "E",
        what: "10 connections send messages of 4 MB, and must receive 1009",
        attack: |_| {
            let first = |_| frame(0x81, &vec![b'x'; 4 << 20]);
            vec![AttackProfile { first, ..AttackProfile::websocket(10, user) }]
        },
        allowed: |_| Allowance { users: 500, close: Some("1009"), ..NOTHING },
        ..PLAIN
    },
    Attack {
        name: "never-closing",
        group: "E",
        what: "500 WebSockets send a close frame and keep the TCP connection",
        attack: |_| {
            let first = |_| frame(0x88, &1000_u16.to_be_bytes());
            vec![AttackProfile {
                first,
                addresses: 5,
                reads: false,
                ..AttackProfile::websocket(500, user)
            }]
        },
        allowed: |_| Allowance { users: 500, ..NOTHING },
        ..PLAIN
    },
];

/// The attacks with the requested names or groups; all of them without a request.
pub(crate) fn selected(requested: &[String]) -> Result<Vec<&'static Attack>, String> {
    let matches = |attack: &Attack, one: &str| {
        let group = attack.group.to_ascii_lowercase();
        attack.name == one || group == one || (one.len() == 1 && group.starts_with(one))
    };
    for one in requested {
        let one = one.to_ascii_lowercase();
        if !CATALOGUE.iter().any(|attack| matches(attack, &one)) {
            return Err(format!("{one}: no such attack or group; --list shows all"));
        }
    }
    let is_requested = |attack: &&Attack| {
        requested.is_empty()
            || requested.iter().any(|one| matches(attack, &one.to_ascii_lowercase()))
    };
    Ok(CATALOGUE.iter().filter(is_requested).collect())
}

/// Allowance for users who may create so many inboxes.
fn inboxes_of(users: u64) -> Allowance {
    let records = users * NEW_INBOXES * KEYS_PER_LOG;
    Allowance { users, records, record_bytes: 2048, ..NOTHING }
}

/// Allowance for users who may create so many rooms of `keys` keys each.
fn rooms_of(users: u64, keys: u64) -> Allowance {
    Allowance { users, records: users * NEW_ROOMS * keys, record_bytes: 1024, ..NOTHING }
}

fn user(serial: u32) -> String {
    format!("/ws?user=attacker-{serial}")
}

fn echo(_: u32) -> String {
    "/ws/echo".to_owned()
}

/// The profile without reads, and with a small receive buffer.
fn unread(profile: AttackProfile) -> AttackProfile {
    AttackProfile { reads: false, receive_buffer: Some(4096), ..profile }
}

fn frame_of(kind: &str, room: &str) -> Vec<u8> {
    text(&format!(r#"{{"type":"{kind}","room":"{room}"}}"#))
}

fn message(room: &str, bytes: usize) -> Vec<u8> {
    let content = "z".repeat(bytes);
    text(&format!(r#"{{"type":"message","room":"{room}","content":"{content}"}}"#))
}

fn direct(to: &str, bytes: usize) -> Vec<u8> {
    let content = "z".repeat(bytes);
    text(&format!(r#"{{"type":"direct","to":"{to}","content":"{content}"}}"#))
}

/// A user fills its own inbox with 70 directs of 3 KB.
fn full_inbox() -> AttackProfile {
    let profile = AttackProfile::websocket(1, |_| "/ws?user=a2-reader".to_owned());
    profile.sending(|_, number| (number < 70).then(|| direct("a2-peer", 3_000)))
}

/// 1,400 requests for the history with a user, 41 bytes each.
fn histories(_: u32, number: u64) -> Option<Vec<u8>> {
    (number == 0).then(|| text(r#"{"type":"history","with":"a2-peer"}"#).repeat(1_400))
}

fn watches(serial: u32, number: u64) -> Option<Vec<u8>> {
    let kind = if number.is_multiple_of(2) { "watch" } else { "unwatch" };
    let names: Vec<String> =
        (0..100).map(|name| format!(r#""a3-{serial}-{}-{name}""#, number / 2)).collect();
    Some(text(&format!(r#"{{"type":"{kind}","users":[{}]}}"#, names.join(","))))
}

/// Handshakes whose sender disconnects before the response.
fn abandoned_handshakes(per_second: u32, addresses: u32) -> AttackProfile {
    AttackProfile {
        handshake: AttackHandshake::Unawaited,
        addresses,
        opens_per_second: per_second,
        on_finished: OnFinished::Reopen,
        reads: false,
        ..AttackProfile::websocket(1_000, |_| "/ws?user=a2-gone".to_owned())
    }
}

/// 20 rooms, each with 45 messages of 8 KB.
fn full_rooms() -> AttackProfile {
    let first = |serial: u32| {
        let rooms = [serial % 10 * 2, serial % 10 * 2 + 1].map(full_room);
        rooms.iter().flat_map(|room| frame_of("join", room)).collect()
    };
    let profile = AttackProfile {
        first,
        ..AttackProfile::websocket(10, |serial| format!("/ws?user=a4-{}", serial % 10))
    };
    profile.sending(|serial, number| {
        let room = full_room(serial % 10 * 2 + (number % 2) as u32);
        (number < 90).then(|| message(&room, 8_000))
    })
}

fn full_room(number: u32) -> String {
    format!("a4-full-{number}")
}

fn full_rooms_and(streams: u64) -> Allowance {
    Allowance { users: streams + 10, streams, records: 60, record_bytes: 1 << 20, ..NOTHING }
}

fn stream_of_rooms(serial: u32) -> Vec<u8> {
    let rooms: Vec<String> = (0..20).map(full_room).collect();
    let rooms = rooms.join(",");
    format!("GET /sse?rooms={rooms}&user=stream-{serial} HTTP/1.1\r\nHost: h\r\n\r\n").into_bytes()
}

/// 8 connections that repeat an HTTP request without waiting for responses.
fn request(bytes: &str) -> AttackProfile {
    AttackProfile::raw(8, |_| Vec::new()).repeating(bytes.as_bytes())
}

/// Members of rooms of ten, from enough addresses for the limits per address.
fn members(connections: u32) -> AttackProfile {
    AttackProfile {
        first: |serial| frame_of("join", &format!("a6-{}", serial / 10)),
        addresses: 250,
        opens_per_second: 1_000,
        ..AttackProfile::websocket(connections, user)
    }
}

/// 16 KB of session data.
fn session_data(_: u32, number: u64) -> Option<Vec<u8>> {
    (number == 0).then(|| {
        let pad = "d".repeat(16_000);
        text(&format!(r#"{{"type":"session_set","data":{{"pad":"{pad}"}}}}"#))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use skein_protocol::ids::UserId;

    use super::*;
    use crate::abuse::profile::AttackPayload;

    const SCALE: Scale = Scale { connections_max: 1_000 };

    #[test]
    fn names_are_unique_and_groups_are_known() {
        let names: BTreeSet<&str> = CATALOGUE.iter().map(|attack| attack.name).collect();
        assert_eq!(names.len(), CATALOGUE.len());
        let groups: BTreeSet<&str> = CATALOGUE.iter().map(|attack| attack.group).collect();
        assert_eq!(Vec::from_iter(groups), ["-", "A1", "A2", "A3", "A4", "A5", "A6", "B1", "E"]);
    }

    #[test]
    fn attacks_are_selected_by_name_and_group() {
        let names = |requested: &[&str]| -> Vec<&str> {
            let requested: Vec<String> = requested.iter().map(|one| (*one).to_owned()).collect();
            selected(&requested).unwrap().iter().map(|attack| attack.name).collect()
        };
        assert_eq!(names(&[]).len(), CATALOGUE.len());
        assert_eq!(names(&["A3"]), ["watch-churn", "room-churn"]);
        assert!(names(&["b"]).contains(&"small-directs"));
        assert_eq!(names(&["silent", "pongs"]), ["pongs", "silent"]);
        assert!(selected(&["ping".to_owned()]).is_err());
    }

    #[test]
    fn every_attack_stays_within_the_machine_limits() {
        for attack in CATALOGUE {
            let profiles = [(attack.prepare)(SCALE), (attack.attack)(SCALE)].concat();
            let most: u32 = profiles.iter().map(|profile| profile.connections).sum();
            assert!(most <= 2_000, "{}: {most}", attack.name);
            for profile in &profiles {
                if let AttackPayload::Generate(each) = profile.payload {
                    assert!(each(0, 0).is_some_and(|chunk| chunk.len() < 512 * 1024));
                }
                assert!(profile.opens_per_second > 0 && profile.addresses > 0, "{}", attack.name);
            }
            assert!(
                attack.drops_prepared
                    || attack.name == "none"
                    || !(attack.attack)(SCALE).is_empty()
            );
        }
    }

    #[test]
    fn frames_of_the_catalogue_are_valid() {
        let history = histories(0, 0).unwrap();
        assert_eq!(history.len(), 1_400 * 41, "41 bytes each");
        let watch = watches(1, 4).unwrap();
        let text = String::from_utf8_lossy(&watch);
        assert!(text.contains(r#""type":"watch""#) && text.contains("a3-1-2-99"));
        assert!("a3-1-2-99".parse::<UserId>().is_ok());
        assert!(String::from_utf8_lossy(&watches(1, 5).unwrap()).contains("unwatch"));
    }
}
