//! The commands of a simulated Redis that gateways and their scripts use.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::{
    resp::Reply,
    store::{Store, StoredStream, WrongType},
};

/// The number of entries in a node of a stream: trimming with `~` removes whole nodes.
const STREAM_NODE_LEN: u64 = 8;
/// Memory of an empty stream, and of each entry beside its payload: roughly as Redis reports it.
const STREAM_BYTES: usize = 4_300;
const ENTRY_BYTES: usize = 40;

/// The data that commands and scripts of one server work on.
#[derive(Clone, Default)]
pub struct ServerData {
    pub store: Store,
    /// The subscribers of each channel.
    pub channels: BTreeMap<Bytes, BTreeSet<u64>>,
    pub run_id: String,
    pub replid: String,
    pub is_replica: bool,
    /// The server's wall clock, ms.
    pub now: u64,
    /// Messages that were published and not delivered yet.
    pub published: Vec<(Bytes, Bytes)>,
}

type CommandResult = Result<Reply, CommandFailure>;

/// The error text of a failed command.
pub struct CommandFailure(pub String);

impl From<WrongType> for CommandFailure {
    fn from(_: WrongType) -> Self {
        Self("WRONGTYPE Operation against a key holding the wrong kind of value".to_owned())
    }
}

fn err<T>(text: &str) -> Result<T, CommandFailure> {
    Err(CommandFailure(format!("ERR {text}")))
}

const SYNTAX: &str = "syntax error";
const NO_INTEGER: &str = "value is not an integer or out of range";
const ID_TOO_SMALL: &str =
    "The ID specified in XADD is equal or smaller than the target stream top item";
const INVALID_ID: &str = "Invalid stream ID specified as stream command argument";

/// Executes a command that scripts may use as well.
pub fn execute(data: &mut ServerData, words: &[Bytes]) -> CommandResult {
    let name = words[0].to_ascii_uppercase();
    let args = &words[1..];
    if let Some(least) = least_args(&name)
        && args.len() < least
    {
        let name = String::from_utf8_lossy(&words[0]).to_lowercase();
        return err(&format!("wrong number of arguments for '{name}' command"));
    }
    let now = data.now;
    if let Some(key) = args.first().filter(|_| !matches!(&name[..], b"DEL" | b"MEMORY")) {
        data.store.expire(key, now);
    }
    match &name[..] {
        b"PING" => Ok(Reply::Status("PONG")),
        b"TIME" => {
            let (seconds, micros) = (now / 1000, now % 1000 * 1000);
            let words = [seconds.to_string(), micros.to_string()];
            Ok(Reply::Array(words.iter().map(Reply::bulk).collect()))
        }
        b"INFO" => Ok(Reply::Verbatim(info(data, args).into())),
        b"GET" => Ok(Reply::maybe(data.store.text(&args[0])?.cloned())),
        b"SET" => set(data, args),
        b"DEL" => {
            args.iter().for_each(|key| data.store.expire(key, now));
            Ok(Reply::Int(args.iter().filter(|key| data.store.delete(key)).count() as i64))
        }
        b"EXISTS" => {
            args.iter().for_each(|key| data.store.expire(key, now));
            Ok(Reply::Int(args.iter().filter(|key| data.store.exists(key)).count() as i64))
        }
        b"TYPE" => Ok(Reply::Status(data.store.type_of(&args[0]))),
        b"PERSIST" => Ok(Reply::Int(i64::from(data.store.persist(&args[0])))),
        b"PUBLISH" => {
            let subscribers = data.channels.get(&args[0]).map_or(0, BTreeSet::len);
            data.published.push((args[0].clone(), args[1].clone()));
            Ok(Reply::Int(subscribers as i64))
        }
        b"PEXPIRE" | b"PEXPIREAT" => {
            let Ok(time) = number(&args[1]) else { return err(NO_INTEGER) };
            let ends = if name.len() == 7 { now as i64 + time } else { time };
            if args.get(2).is_some_and(|option| option.eq_ignore_ascii_case(b"GT")) {
                // A key without expiry lasts longer than any other.
                let before = data.store.expiry(&args[0]);
                if before.is_none_or(|before| ends <= before as i64) {
                    return Ok(Reply::Int(0));
                }
            }
            if ends <= now as i64 {
                return Ok(Reply::Int(i64::from(data.store.delete(&args[0]))));
            }
            Ok(Reply::Int(i64::from(data.store.set_expiry(&args[0], ends as u64))))
        }
        b"PTTL" => Ok(Reply::Int(match data.store.expiry(&args[0]) {
            _ if !data.store.exists(&args[0]) => -2,
            None => -1,
            Some(ends) => ends as i64 - now as i64,
        })),
        b"MEMORY" => {
            data.store.expire(&args[1], now);
            let stream = data.store.stream(&args[1])?;
            Ok(stream.map_or(Reply::Null, |stream| Reply::Int(bytes_of(stream) as i64)))
        }
        [b'H', ..] => hash(data, &name, args),
        [b'X', ..] => stream(data, &name, args),
        [b'Z', ..] => sorted_set(data, &name, args),
        _ => {
            let name = String::from_utf8_lossy(&words[0]).into_owned();
            let rest: Vec<_> =
                args.iter().map(|arg| format!("'{}' ", arg.escape_ascii())).collect();
            err(&format!("unknown command '{name}', with args beginning with: {}", rest.concat()))
        }
    }
}

fn score(text: &[u8]) -> i64 {
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn least_args(name: &[u8]) -> Option<usize> {
    Some(match name {
        b"GET" | b"DEL" | b"EXISTS" | b"TYPE" | b"HGETALL" | b"HKEYS" | b"HLEN" | b"XLEN" => 1,
        b"PERSIST" | b"PTTL" | b"ZCARD" | b"HVALS" => 1,
        b"HSCAN" | b"ZREM" | b"ZSCORE" => 2,
        b"ZADD" | b"ZREMRANGEBYSCORE" | b"ZREMRANGEBYRANK" => 3,
        b"SET" | b"PUBLISH" | b"PEXPIRE" | b"PEXPIREAT" | b"MEMORY" => 2,
        b"HGET" | b"HMGET" | b"HDEL" | b"HEXISTS" => 2,
        b"HSET" | b"HINCRBY" | b"HSETNX" | b"XRANGE" | b"XREVRANGE" | b"XTRIM" => 3,
        b"XADD" => 4,
        _ => return None,
    })
}

fn info(data: &ServerData, sections: &[Bytes]) -> String {
    let wants = |name: &str| {
        sections.is_empty()
            || sections.iter().any(|section| section.eq_ignore_ascii_case(name.as_bytes()))
    };
    let mut text = String::new();
    if wants("server") {
        text += &format!("# Server\r\nredis_version:7.0.15\r\nrun_id:{}\r\n", data.run_id);
    }
    if wants("memory") {
        text += "# Memory\r\nused_memory:1000000\r\nmaxmemory:0\r\n";
    }
    if wants("replication") {
        let role = if data.is_replica { "slave" } else { "master" };
        text += &format!("# Replication\r\nrole:{role}\r\nmaster_replid:{}\r\n", data.replid);
    }
    if wants("persistence") {
        text += "# Persistence\r\naof_enabled:1\r\n";
    }
    text
}

fn set(data: &mut ServerData, args: &[Bytes]) -> CommandResult {
    let (mut only_new, mut ends, mut at) = (false, None, 2);
    while at < args.len() {
        match &args[at].to_ascii_uppercase()[..] {
            b"NX" => only_new = true,
            b"PX" => {
                at += 1;
                let Some(Ok(time)) = args.get(at).map(number) else { return err(NO_INTEGER) };
                ends = Some((data.now as i64 + time) as u64);
            }
            _ => return err(SYNTAX),
        }
        at += 1;
    }
    if only_new && data.store.exists(&args[0]) {
        return Ok(Reply::Null);
    }
    data.store.set_text(&args[0], args[1].clone());
    if let Some(ends) = ends {
        data.store.set_expiry(&args[0], ends);
    }
    Ok(Reply::Status("OK"))
}

fn hash(data: &mut ServerData, name: &[u8], args: &[Bytes]) -> CommandResult {
    let store = &mut data.store;
    let key = &args[0];
    match name {
        b"HGET" => Ok(Reply::maybe(store.hash(key)?.and_then(|hash| hash.get(&args[1])).cloned())),
        b"HMGET" => {
            let hash = store.hash(key)?;
            let value = |field| Reply::maybe(hash.and_then(|hash| hash.get(field)).cloned());
            Ok(Reply::Array(args[1..].iter().map(|field| value(field)).collect()))
        }
        b"HGETALL" => {
            let rows = store.hash(key)?.map(|hash| hash.rows().to_vec()).unwrap_or_default();
            let pair = |(field, value)| (Reply::Bulk(field), Reply::Bulk(value));
            Ok(Reply::Map(rows.into_iter().map(pair).collect()))
        }
        b"HKEYS" => {
            let rows = store.hash(key)?.map(|hash| hash.rows().to_vec()).unwrap_or_default();
            Ok(Reply::Array(rows.into_iter().map(|(field, _)| Reply::Bulk(field)).collect()))
        }
        b"HVALS" => {
            let rows = store.hash(key)?.map(|hash| hash.rows().to_vec()).unwrap_or_default();
            Ok(Reply::Array(rows.into_iter().map(|(_, value)| Reply::Bulk(value)).collect()))
        }
        // All fields at once, as Redis returns a small hash.
        b"HSCAN" => {
            let rows = store.hash(key)?.map(|hash| hash.rows().to_vec()).unwrap_or_default();
            let flat = rows.into_iter().flat_map(|(field, value)| [field, value]);
            let flat = flat.map(Reply::Bulk).collect();
            Ok(Reply::Array(vec![Reply::bulk("0"), Reply::Array(flat)]))
        }
        b"HLEN" => Ok(Reply::Int(store.hash(key)?.map_or(0, |hash| hash.rows().len()) as i64)),
        b"HEXISTS" => {
            let there = store.hash(key)?.is_some_and(|hash| hash.get(&args[1]).is_some());
            Ok(Reply::Int(i64::from(there)))
        }
        b"HSET" => {
            if args.len().is_multiple_of(2) {
                return err("wrong number of arguments for 'hset' command");
            }
            let mut new = 0;
            for pair in args[1..].chunks(2) {
                new += i64::from(store.set_field(key, pair[0].clone(), pair[1].clone())?);
            }
            Ok(Reply::Int(new))
        }
        b"HSETNX" => {
            if store.hash(key)?.is_some_and(|hash| hash.get(&args[1]).is_some()) {
                return Ok(Reply::Int(0));
            }
            store.set_field(key, args[1].clone(), args[2].clone())?;
            Ok(Reply::Int(1))
        }
        b"HINCRBY" => {
            let Ok(by) = number(&args[2]) else { return err(NO_INTEGER) };
            let before = match store.hash(key)?.and_then(|hash| hash.get(&args[1])).map(number) {
                None => 0,
                Some(Ok(before)) => before,
                Some(Err(_)) => return err("hash value is not an integer"),
            };
            let after = before + by;
            store.set_field(key, args[1].clone(), after.to_string().into())?;
            Ok(Reply::Int(after))
        }
        b"HDEL" => {
            let mut gone = 0;
            for field in &args[1..] {
                gone += i64::from(store.remove_field(key, field)?);
            }
            Ok(Reply::Int(gone))
        }
        _ => err("unknown command of hashes"),
    }
}

/// Sorted sets, kept as hashes of scores, which are whole numbers here.
fn sorted_set(data: &mut ServerData, name: &[u8], args: &[Bytes]) -> CommandResult {
    let (store, key) = (&mut data.store, &args[0]);
    match name {
        b"ZREMRANGEBYSCORE" => {
            if &args[1][..] != b"-inf" {
                return err("only ranges from -inf on are simulated");
            }
            let max = score(&args[2]);
            let rows = store.hash(key)?.map(|hash| hash.rows().to_vec()).unwrap_or_default();
            let mut gone = 0;
            for (member, _) in rows.iter().filter(|(_, of)| score(of) <= max) {
                gone += i64::from(store.remove_field(key, member)?);
            }
            Ok(Reply::Int(gone))
        }
        // More members are kept than any simulation has.
        b"ZREMRANGEBYRANK" => {
            store.hash(key)?;
            Ok(Reply::Int(0))
        }
        b"ZSCORE" => {
            Ok(Reply::maybe(store.hash(key)?.and_then(|hash| hash.get(&args[1])).cloned()))
        }
        b"ZADD" => {
            Ok(Reply::Int(i64::from(store.set_field(key, args[2].clone(), args[1].clone())?)))
        }
        b"ZREM" => {
            let mut gone = 0;
            for member in &args[1..] {
                gone += i64::from(store.remove_field(key, member)?);
            }
            Ok(Reply::Int(gone))
        }
        b"ZCARD" => Ok(Reply::Int(store.hash(key)?.map_or(0, |hash| hash.rows().len()) as i64)),
        _ => err("unknown command of sorted sets"),
    }
}

fn stream(data: &mut ServerData, name: &[u8], args: &[Bytes]) -> CommandResult {
    let key = &args[0];
    match name {
        b"XLEN" => Ok(Reply::Int(data.store.stream(key)?.map_or(0, |s| s.entries.len()) as i64)),
        b"XADD" => add(data, args),
        b"XTRIM" => {
            let last = args.last().unwrap_or(key);
            let keep = match &args[1].to_ascii_uppercase()[..] {
                b"MAXLEN" => number(last),
                b"MINID" => {
                    let first = id_of(last)?;
                    return Ok(Reply::Int(data.store.trim(key, first) as i64));
                }
                _ => return err(SYNTAX),
            };
            let Ok(keep) = keep else { return err(NO_INTEGER) };
            let Some(stream) = data.store.stream(key)? else { return Ok(Reply::Int(0)) };
            let over = stream.entries.len().saturating_sub(keep as usize);
            let first = stream.entries.keys().nth(over).copied().unwrap_or(stream.last + 1);
            Ok(Reply::Int(data.store.trim(key, first) as i64))
        }
        b"XRANGE" | b"XREVRANGE" => {
            let backwards = name == b"XREVRANGE";
            let (from, to) = if backwards { (&args[2], &args[1]) } else { (&args[1], &args[2]) };
            let (from, to) = (bound(from, true)?, bound(to, false)?);
            let count = match args.get(3) {
                None => usize::MAX,
                Some(_) => match args.get(4).map(number) {
                    Some(Ok(count)) => count as usize,
                    _ => return err(NO_INTEGER),
                },
            };
            let Some(stream) = data.store.stream(key)? else { return Ok(Reply::Array(vec![])) };
            let row = |(id, fields): (&u64, &Vec<Bytes>)| {
                let fields = fields.iter().cloned().map(Reply::Bulk).collect();
                Reply::Array(vec![Reply::bulk(format!("{id}-0")), Reply::Array(fields)])
            };
            let range = stream.range(from..=to);
            let rows = if backwards {
                range.rev().take(count).map(row).collect()
            } else {
                range.take(count).map(row).collect()
            };
            Ok(Reply::Array(rows))
        }
        _ => err("unknown command of streams"),
    }
}

fn add(data: &mut ServerData, args: &[Bytes]) -> CommandResult {
    let (key, mut at, mut keep_from) = (&args[0], 1, None);
    if args[at].eq_ignore_ascii_case(b"MINID") {
        at += 1;
        let about = &args[at][..] == b"~";
        at += usize::from(about);
        let first = id_of(&args[at])?;
        // Only whole nodes are removed, so that a few entries more may stay.
        keep_from = Some(if about { first / STREAM_NODE_LEN * STREAM_NODE_LEN } else { first });
        at += 1;
    }
    let id = id_of(&args[at])?;
    let fields = &args[at + 1..];
    if fields.is_empty() || !fields.len().is_multiple_of(2) {
        return err("wrong number of arguments for 'xadd' command");
    }
    if id == 0 {
        return err("The ID specified in XADD must be greater than 0-0");
    }
    if data.store.stream(key)?.is_some_and(|stream| id <= stream.last) {
        return err(ID_TOO_SMALL);
    }
    data.store.add(key, id, fields.to_vec())?;
    if let Some(first) = keep_from {
        data.store.trim(key, first);
    }
    Ok(Reply::bulk(format!("{id}-0")))
}

/// An id `<number>-0` or `<number>`.
fn id_of(word: &Bytes) -> Result<u64, CommandFailure> {
    let text = std::str::from_utf8(word).unwrap_or_default();
    let number = text.strip_suffix("-0").unwrap_or(text).parse();
    number.or_else(|_| err(INVALID_ID))
}

/// One end of a range, both ends included.
fn bound(word: &Bytes, lower: bool) -> Result<u64, CommandFailure> {
    match &word[..] {
        b"-" => Ok(0),
        b"+" => Ok(u64::MAX),
        [b'(', rest @ ..] => {
            let id = id_of(&Bytes::copy_from_slice(rest))?;
            match id {
                // There is nothing below the first id.
                0 if !lower => err("invalid end ID for the interval"),
                id => Ok(if lower { id + 1 } else { id - 1 }),
            }
        }
        _ => id_of(word),
    }
}

fn bytes_of(stream: &StoredStream) -> usize {
    let entry = |fields: &Vec<Bytes>| fields.iter().map(Bytes::len).sum::<usize>() + ENTRY_BYTES;
    STREAM_BYTES + stream.entries.values().map(entry).sum::<usize>()
}

fn number(word: &Bytes) -> Result<i64, ()> {
    std::str::from_utf8(word).ok().and_then(|text| text.parse().ok()).ok_or(())
}
