//! The simulated Redis replies as a real one does: to each command it knows, to mistakes, and to
//! the scripts of the gateway.

use std::{path::Path, process::Stdio, time::Duration};

use bytes::{Bytes, BytesMut};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use skein_core::envelope::{AuthorHash, Envelope, EnvelopeParts};
use skein_protocol::ids::{ConnectionId, MessageId};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    process::{Child, Command},
};
use uuid::Uuid;

use super::{
    commands::ServerData,
    redis::SimRedis,
    resp::{Reply, encode_command, take_reply},
};

/// The real and the simulated server that are compared.
struct ServerPair {
    simulated: SimRedis,
    real: UnixStream,
    unread: BytesMut,
    server_id: String,
    _process: Child,
    _folder: tempfile::TempDir,
}

impl ServerPair {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("redis.sock");
        let process = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--unixsocket"])
            .arg(&path)
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let real = connect(&path).await;
        let mut simulated = SimRedis::start(ServerData::default());
        simulated.connect(1);
        let mut pair = Self {
            simulated,
            real,
            unread: BytesMut::new(),
            server_id: String::new(),
            _process: process,
            _folder: folder,
        };
        let hello = words(&["HELLO", "3"]);
        pair.send_both(&hello).await;
        let info = pair.send_real(&words(&["INFO"])).await;
        let Reply::Verbatim(info) = info else { panic!("{info:?}") };
        let info = String::from_utf8_lossy(&info).into_owned();
        let value = |register: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(register));
            line.unwrap().trim_start_matches(':').to_owned()
        };
        pair.simulated.data.run_id = value("run_id");
        pair.simulated.data.replid = value("master_replid");
        pair.server_id =
            pair.simulated.data.run_id[..8].to_owned() + &pair.simulated.data.replid[..8];
        pair
    }

    async fn send_real(&mut self, command: &[Bytes]) -> Reply {
        self.real.write_all(&encode_command(command)).await.unwrap();
        loop {
            if let Some(reply) = take_reply(&mut self.unread) {
                return reply;
            }
            assert!(
                self.real.read_buf(&mut self.unread).await.unwrap() > 0,
                "Redis closed the connection"
            );
        }
    }

    fn send_simulated(&mut self, command: &[Bytes]) -> Reply {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        self.simulated.data.now = now.as_millis() as u64;
        let out = self.simulated.receive(1, &encode_command(command));
        let own = out.into_iter().find(|out| !out.is_message).unwrap();
        take_reply(&mut BytesMut::from(&own.bytes[..])).unwrap()
    }

    async fn send_both(&mut self, command: &[Bytes]) -> (Reply, Reply) {
        let real = self.send_real(command).await;
        (real, self.send_simulated(command))
    }

    /// Sends a command to both, and checks that the replies are equal.
    async fn compare(&mut self, command: &[Bytes]) -> Reply {
        let (real, simulated) = self.send_both(command).await;
        let shown: Vec<_> = command.iter().map(|word| word.escape_ascii().to_string()).collect();
        assert_eq!(plain(real), plain(simulated.clone()), "{}", shown.join(" "));
        simulated
    }

    async fn script(&mut self, text: &str, keys: &[&str], args: &[Bytes]) -> Reply {
        let (flags, text) = match text.split_once('\n') {
            Some((flags, text)) if flags.starts_with("#!") => (format!("{flags}\n"), text),
            _ => (String::new(), text),
        };
        let prelude = include_str!("../../../redis/src/scripts/prelude.lua");
        let text = format!("{flags}local archive_backlog_max = 0\n{prelude}\n{text}");
        let mut command = words(&["EVAL", &text, &keys.len().to_string()]);
        command.extend(words(keys));
        command.extend_from_slice(args);
        self.compare(&command).await
    }
}

async fn connect(path: &Path) -> UnixStream {
    for _ in 0..1000 {
        if let Ok(stream) = UnixStream::connect(path).await {
            return stream;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("redis-server does not listen");
}

/// An error without the position in the script that Redis adds.
fn plain(reply: Reply) -> Reply {
    match reply {
        Reply::Error(text) => {
            let end = [" script: ", ", on @user_script"]
                .iter()
                .filter_map(|read_mark| text.find(read_mark))
                .min();
            Reply::Error(text[..end.unwrap_or(text.len())].trim_end_matches('.').to_owned())
        }
        other => other,
    }
}

fn words(words: &[&str]) -> Vec<Bytes> {
    words.iter().map(|word| Bytes::copy_from_slice(word.as_bytes())).collect()
}

#[tokio::test]
async fn simulated_commands_answer_as_redis_does() {
    let mut pair = ServerPair::start().await;
    let commands = "\
        PING; SELECT 0; CLIENT SETINFO x y; GET a; SET a 1 NX; SET a 2 NX; GET a; SET b 1 PX 100000; \
        SET a; HSET h f 1 g 2; HSET h f 3 k 4; HSET h f; HGET h f; HGET h z; HGET a f; HMGET h f z g; \
        HMGET none f; HGETALL h; HGETALL none; HEXISTS h f; HEXISTS h z; HEXISTS none z; HSETNX h f 9; \
        HSETNX h new 9; HINCRBY h # 1; HINCRBY h # 5; HINCRBY h new x; HINCRBY h txt 1; HSET h txt x; \
        HINCRBY h txt 1; HDEL h f z g; HLEN h; HDEL h k new # txt; EXISTS h; HDEL h f; \
        XADD s 0-0 e 1; XADD s 5-0 e 1 p 2; XADD s 5-0 e 1; XADD s 4-0 e 1; XADD s 6-0 e; \
        XADD s 7-0 e 2; XADD s 9-0 e 3; XLEN s; XRANGE s - +; XRANGE s - + COUNT 2; XRANGE s 6-0 9-0; \
        XRANGE s (5-0 + COUNT 5; XRANGE s 7-0 7-0; XRANGE s (9-0 +; XREVRANGE s + -; \
        XREVRANGE s (9-0 - COUNT 1; XREVRANGE s (0-0 -; XRANGE s 8-0 7-0; XRANGE none - +; \
        XTRIM s MAXLEN 2; XRANGE s - +; XADD s MINID 9-0 10-0 e 4; XRANGE s - +; XTRIM s MAXLEN 0; \
        XLEN s; XADD s 3-0 e 1; XADD s 11-0 e 1; XADD a 1-0 e 1; HSET s f 1; XRANGE a - +; XLEN none; \
        PEXPIRE s 100000; PEXPIRE none 1; PEXPIREAT s 1; EXISTS s; PEXPIRE a x; DEL a b none; \
        PUBLISH c x; HSET h f 1 g 2; HKEYS h; HKEYS none; HSCAN h 0 COUNT 5; HSCAN none 0; \
        ZADD z 5 b; ZADD z 0 a; ZADD z 7 b; ZREMRANGEBYSCORE z -inf 4; ZCARD z; ZADD z 0 a; ZREMRANGEBYRANK z 0 -10; ZREM z a c; ZREM z b; ZCARD z; ZADD z 0; \
        PERSIST h; PEXPIRE h 100000; PERSIST h; PERSIST none; EXISTS h none h; NOSUCH 1 2; EVALSHA 0000000000000000000000000000000000000000 0";
    for command in commands.split(';') {
        let command: Vec<_> = command.split_whitespace().collect();
        // Redis 7.0 does not know SETINFO, which clients ignore.
        if command[0] != "CLIENT" {
            pair.compare(&words(&command)).await;
        }
    }
}

#[tokio::test]
async fn simulated_lua_converts_values_as_redis_does() {
    let mut pair = ServerPair::start().await;
    for text in [
        "return 1.9",
        "return {1, 'a', {2, false, 3}, nil, 4}",
        "return false",
        "return true",
        "return {ok = 'OK'}",
        "return redis.error_reply('STALE not here')",
        "return redis.error_reply('bare')",
        "return redis.call('GET', 'none')",
        "return {redis.call('GET', 'none'), 7}",
        "return redis.call('HMGET', 'none', 'a', 'b')",
        "return redis.call('SET', 'k', 10)",
        "redis.call('HSET', 'h', 'a', 1, 'b', 2) return redis.call('HGETALL', 'h')",
        "return redis.call('HGET', 'k', 'a')",
        "return redis.call('XADD', 's', '0-0', 'a', 1)",
        "return redis.call('GET', 'k') + 5",
        "return type(redis.call('SET', 'k', 1)['ok'])",
        "return redis.call('XRANGE', 's', '-', '+')[1]",
        "return {KEYS[1], ARGV[1], ARGV[2], #KEYS}",
        "return redis.call('PEXPIRE', 'k', 5000)",
        "return tostring(1e14) .. string.format('%.0f', 1e15)",
    ] {
        pair.compare(&words(&["EVAL", text, "1", "key", "one", "two"])).await;
    }
}

/// The scripts of a room, in the order in which several days would call them.
#[tokio::test]
async fn room_scripts_run_as_on_redis() {
    const APPEND: &str = include_str!("../../../redis/src/scripts/append.lua");
    const READ: &str = include_str!("../../../redis/src/scripts/read.lua");
    const RESTORE: &str = include_str!("../../../redis/src/scripts/restore.lua");
    const CHECK_IN: &str = include_str!("../../../redis/src/scripts/check_in.lua");
    const LEASE: &str = include_str!("../../../redis/src/scripts/lease.lua");
    const DELETE: &str = include_str!("../../../redis/src/scripts/delete.lua");
    const RESTORE_UNCONFIRMED: &str =
        include_str!("../../../redis/src/scripts/restore_unconfirmed.lua");
    const ROOM: [&str; 7] = ["log", "meta", "ids0", "ids1", "barrier", "unheard", "archive"];

    let mut pair = ServerPair::start().await;
    let mut random = StdRng::seed_from_u64(7);
    let server_id = pair.server_id.clone();
    pair.script(LEASE, &["leases", "barrier"], &words(&["n1", "60000", "pokes", &server_id, ""]))
        .await;
    pair.script(LEASE, &["leases", "barrier"], &words(&["n2", "60000", "pokes", &server_id, ""]))
        .await;
    pair.script(LEASE, &["leases", "barrier"], &words(&["n1", "60000", "pokes", &server_id, ""]))
        .await;
    let append = |n: u128, server_id: &str| {
        let envelope = envelope(n);
        let mut args = common(server_id);
        args.push(Bytes::copy_from_slice(&envelope.dedup_key()));
        args.push(envelope.as_bytes().clone());
        args.extend(words(&["200", "60000", "1000000000", "", "", ""]));
        args
    };
    let unagreed = pair.script(APPEND, &ROOM, &append(1, &server_id)).await;
    assert!(matches!(unagreed, Reply::Error(text) if text.starts_with("STALE")));
    let check_in = words(&[&server_id, "n1", "60000", "60000", "0", "0", "n1", "n2"]);
    pair.script(CHECK_IN, &["barrier"], &check_in).await;
    let check_in = words(&[&server_id, "n2", "60000", "60000", "0", "0", "n2"]);
    let open = pair.script(CHECK_IN, &["barrier"], &check_in).await;
    let everybody = Reply::Bulk(Bytes::from_static(b"1"));
    let answer = [everybody, Reply::Array(vec![]), Reply::Int(1), Reply::Int(0)];
    assert_eq!(open, Reply::Array(answer.into()));
    for _ in 0..300 {
        let append = append(random.random_range(0..250), &server_id);
        pair.script(APPEND, &ROOM, &append).await;
    }
    for (kind, seq, limit) in [
        ("newest", "0", "3"),
        ("after", "20", "40"),
        ("before", "30", "40"),
        ("after", "9999", "5"),
    ] {
        let args = [common(&server_id), words(&[kind, seq, limit, "4000"])].concat();
        let page = pair.script(READ, &ROOM, &args).await;
        assert!(matches!(page, Reply::Array(parts) if parts.len() == 8));
    }
    let page = [common(&server_id), words(&["newest", "0", "20", "400000"])].concat();
    let Reply::Array(page) = pair.script(READ, &ROOM, &page).await else { panic!("no page") };
    // A server without the log, and one with a part of it: the whole log is restored.
    for missing in ["DEL log meta ids0 ids1", "XTRIM log MAXLEN 10"] {
        pair.compare(&words(&missing.split(' ').collect::<Vec<_>>())).await;
        for step in ["compare", "restore"] {
            let restore_args = restore_args(&page, &server_id, step);
            pair.script(RESTORE, &ROOM, &restore_args).await;
        }
        pair.compare(&words(&["XRANGE", "log", "-", "+"])).await;
        pair.compare(&words(&["HMGET", "meta", "e", "s", "r", "n", "pe", "ps"])).await;
        let append = append(random.random_range(1000..2000), &server_id);
        pair.script(APPEND, &ROOM, &append).await;
    }
    for gap in [false, true] {
        hand_in_unconfirmed(&mut pair, RESTORE_UNCONFIRMED, &ROOM, gap).await;
        let epoch = words(&["HGET", "meta", "e"]);
        let before = pair.compare(&epoch).await;
        pair.script(APPEND, &ROOM, &append(u128::from(gap) + 3000, &server_id)).await;
        assert_eq!(pair.compare(&epoch).await != before, gap);
        pair.compare(&words(&["XREVRANGE", "log", "+", "-", "COUNT", "12"])).await;
        pair.compare(&words(&["HMGET", "meta", "e", "s", "r", "n", "pe", "ps"])).await;
        pair.compare(&words(&["EXISTS", "unheard"])).await;
        // The message behind the gap was acknowledged, and is in the log under another number.
        let far = envelope(4001 + u128::from(gap) * 100);
        let mut known = false;
        for ids in ["ids0", "ids1"] {
            let id = Bytes::copy_from_slice(&far.dedup_key());
            let scope = [words(&["HGET", ids]), vec![id]].concat();
            known |= matches!(pair.compare(&scope).await, Reply::Bulk(_));
        }
        assert!(known, "steps missing: {gap}");
    }
    pair.script(DELETE, &ROOM, &common(&server_id)).await;
    pair.script(APPEND, &ROOM, &append(5, &server_id)).await;
}

/// Users join and leave on two nodes, one of which ends; a room is created, read and deleted.
#[tokio::test]
async fn presence_scripts_run_as_on_redis() {
    let presence = include_str!("../../../redis/src/scripts/presence.lua");
    let track = format!("{presence}\n{}", include_str!("../../../redis/src/scripts/track.lua"));
    let reap = format!("{presence}\n{}", include_str!("../../../redis/src/scripts/reap.lua"));
    let read_mark = include_str!("../../../redis/src/scripts/read_mark.lua");
    let create = include_str!("../../../redis/src/scripts/create_room.lua");
    let register = include_str!("../../../redis/src/scripts/register.lua");

    let mut pair = ServerPair::start().await;
    let mut random = StdRng::seed_from_u64(11);
    pair.script(register, &["incarnations"], &words(&["n0.x", "n0"])).await;
    let record = ["room", "86400000", "owner", "u1", "password", "hash", "max", "4"];
    for expected in [1, 0] {
        let made = pair.script(create, &["who", "record", "index", "log"], &words(&record)).await;
        assert_eq!(made, Reply::Int(expected));
    }
    pair.compare(&words(&["HSET", "meta", "s", "9"])).await;
    for scope in ["room", "*"] {
        for step in 0..400 {
            let node = random.random_range(0..2);
            let (own, scopes) = (format!("on{node}{scope}"), format!("places{node}"));
            let present_key = format!("who{scope}");
            let keys = [&*present_key, &own, &scopes, "record", "index", "seen", "marks", "meta"];
            let user = format!("u{}", random.random_range(0..6));
            let connections = random.random_range(0..3).to_string();
            let conditions = if random.random_bool(0.3) && connections != "0" { "1" } else { "" };
            let password_hash = if random.random_bool(0.8) { "hash" } else { "" };
            let admitted = if random.random_bool(0.9) { "1" } else { "" };
            let active = step.to_string();
            let args = [
                scope,
                "channel",
                "60000",
                &user,
                "A Name",
                &connections,
                "5",
                &active,
                "77",
                conditions,
                password_hash,
                "1",
                admitted,
                "1",
            ];
            pair.script(&track, &keys, &words(&args)).await;
            let read = random.random_range(0..12).to_string();
            pair.script(
                read_mark,
                &["marks", "meta"],
                &words(&[&user, &read, "channel", "c", "9999", "4"]),
            )
            .await;
            if step % 50 == 49 {
                // Some at a time, until none is left.
                let args = words(&[scope, "channel", "60000", "500"]);
                let left = pair.script(&reap, &keys[..6], &args).await;
                assert_eq!(left, Reply::Int(0));
                pair.compare(&words(&["EXISTS", &own])).await;
            }
            pair.compare(&words(&["HLEN", &present_key])).await;
            pair.compare(&words(&["HGET", &present_key, &user])).await;
            pair.compare(&words(&["HGET", &present_key, "#"])).await;
            pair.compare(&words(&["ZCARD", "index"])).await;
            pair.compare(&words(&["ZCARD", "seen"])).await;
        }
    }
}

/// Two nodes hand in unconfirmed publishes to a server on which the room was not opened yet: two
/// acknowledged ones, and publishes without an answer for a number between those.
async fn hand_in_unconfirmed(pair: &mut ServerPair, script: &str, room: &[&str], gap: bool) {
    let server_id = pair.server_id.clone();
    pair.compare(&words(&["HSET", "meta", "r", "another"])).await;
    let head = pair.compare(&words(&["HMGET", "meta", "e", "s"])).await;
    let Reply::Array(head) = head else { panic!("{head:?}") };
    let [Reply::Bulk(epoch), Reply::Bulk(top)] = &head[..] else { panic!("{head:?}") };
    let (epoch, top) = (String::from_utf8_lossy(epoch), String::from_utf8_lossy(top));
    let top: u64 = top.parse().unwrap();
    let hand_in = |process: &str, acknowledged: &[(u64, u128)], unanswered: &[u128]| {
        let at = |step: u64| format!("{epoch}:{}", top + step);
        let last = acknowledged.last().map(|(step, _)| at(*step)).unwrap_or_default();
        let mut args = common(&server_id);
        args.extend(words(&[process, &last, &acknowledged.len().to_string()]));
        for (step, n) in acknowledged {
            args.extend(words(&[&at(*step), "stamp"]));
            args.push(envelope(*n).as_bytes().clone());
        }
        for (number, n) in unanswered.iter().enumerate() {
            args.push(number.to_string().into());
            args.push(envelope(*n).as_bytes().clone());
        }
        args
    };
    let from = 4000 + u128::from(gap) * 100;
    let far = if gap { 9 } else { 4 };
    let ann = hand_in("ann", &[(1, from), (far, from + 1)], &[from + 2]);
    let bob = hand_in("bob", &[], &[from + 3, from, from + 4, from + 5]);
    for args in [ann, bob] {
        let accepted = pair.script(script, room, &args).await;
        assert_eq!(accepted, Reply::bulk("accepted"));
    }
}

fn envelope(n: u128) -> Envelope {
    Envelope::pack(EnvelopeParts {
        frame: Default::default(),
        author: AuthorHash::of(&"ann".parse().unwrap()),
        id: MessageId(Uuid::from_u128(n)),
        sender: ConnectionId(Uuid::nil()),
        echo: true,
        fields: r#""room":"r""#,
        binary_payload: None,
    })
}

/// The arguments that all scripts of a room share. The dedup window is so long that both clocks are
/// in the same one.
fn common(server_id: &str) -> Vec<Bytes> {
    words(&[server_id, "channel", "random", "60000", "60000", "100000000000000"])
}

/// The arguments of a node that holds the entries of `page`, newest first.
fn restore_args(page: &[Reply], server_id: &str, step: &str) -> Vec<Bytes> {
    let text = |reply: &Reply| match reply {
        Reply::Bulk(bytes) => bytes.clone(),
        other => panic!("{other:?}"),
    };
    let rows = |reply: &Reply| match reply {
        Reply::Array(items) => items.clone(),
        other => panic!("{other:?}"),
    };
    let entries: Vec<Vec<Reply>> = rows(&page[7]).iter().rev().map(rows).collect();
    let key = |entry: &[Reply]| text(&entry[3]).slice(2..26);
    let (oldest, newest) = (&entries[0], entries.last().unwrap());
    let mut args = common(server_id);
    args.extend([text(&page[0]), text(&page[1])]);
    args.extend(words(&["", "", step]));
    args.extend([text(&newest[2]), key(newest)]);
    args.push(Bytes::from_static(b"1"));
    args.extend([text(&oldest[0]), text(&oldest[2]), key(oldest)]);
    args.push(entries.len().to_string().into());
    for entry in &entries {
        args.extend(entry.iter().map(text));
    }
    args
}
