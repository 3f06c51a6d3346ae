//! The protocol of connections to Redis: commands as clients write them, replies as a server does
//! (the RESP3 specification of the Redis project).

use bytes::{Buf as _, Bytes, BytesMut};

/// A reply, or a push.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Status(&'static str),
    Error(String),
    Int(i64),
    Bulk(Bytes),
    /// Text with a format, as the reply of INFO.
    Verbatim(Bytes),
    Null,
    Array(Vec<Reply>),
    Map(Vec<(Reply, Reply)>),
    Push(Vec<Reply>),
}

impl Reply {
    pub fn bulk(text: impl AsRef<[u8]>) -> Self {
        Self::Bulk(Bytes::copy_from_slice(text.as_ref()))
    }

    /// A bulk string, or null.
    pub fn maybe(value: Option<Bytes>) -> Self {
        value.map_or(Self::Null, Self::Bulk)
    }

    /// Encodes the reply as RESP3.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let head = |out: &mut Vec<u8>, kind: u8, length: usize| {
            out.push(kind);
            out.extend_from_slice(length.to_string().as_bytes());
            out.extend_from_slice(b"\r\n");
        };
        match self {
            Self::Status(text) => out.extend_from_slice(format!("+{text}\r\n").as_bytes()),
            Self::Error(text) => out.extend_from_slice(format!("-{text}\r\n").as_bytes()),
            Self::Int(number) => out.extend_from_slice(format!(":{number}\r\n").as_bytes()),
            Self::Null => out.extend_from_slice(b"_\r\n"),
            Self::Bulk(bytes) => {
                head(out, b'$', bytes.len());
                out.extend_from_slice(bytes);
                out.extend_from_slice(b"\r\n");
            }
            Self::Verbatim(bytes) => {
                head(out, b'=', bytes.len() + 4);
                out.extend_from_slice(b"txt:");
                out.extend_from_slice(bytes);
                out.extend_from_slice(b"\r\n");
            }
            Self::Array(items) | Self::Push(items) => {
                let kind = if matches!(self, Self::Push(_)) { b'>' } else { b'*' };
                head(out, kind, items.len());
                items.iter().for_each(|item| item.encode(out));
            }
            Self::Map(pairs) => {
                head(out, b'%', pairs.len());
                for (key, value) in pairs {
                    key.encode(out);
                    value.encode(out);
                }
            }
        }
    }
}

/// Takes the first command from `input`, once it is complete. Clients only write arrays of bulk
/// strings.
pub fn take_command(input: &mut BytesMut) -> Option<Vec<Bytes>> {
    let mut at = 0;
    let count = number_at(input, &mut at, b'*')?;
    let mut ranges = Vec::with_capacity(count);
    for _ in 0..count {
        let length = number_at(input, &mut at, b'$')?;
        if input.len() < at + length + 2 {
            return None;
        }
        ranges.push(at..at + length);
        at += length + 2;
    }
    let whole = input.split_to(at).freeze();
    Some(ranges.into_iter().map(|range| whole.slice(range)).collect())
}

/// The number of a line that begins with `kind`; moves `at` behind the line.
fn number_at(input: &[u8], at: &mut usize, kind: u8) -> Option<usize> {
    let rest = input.get(*at..)?;
    let end = rest.windows(2).position(|pair| pair == b"\r\n")?;
    assert_eq!(rest[0], kind, "the client wrote something other than a command");
    *at += end + 2;
    std::str::from_utf8(&rest[1..end]).ok()?.parse().ok()
}

/// Encodes a command as a client does.
pub fn encode_command(words: &[Bytes]) -> Vec<u8> {
    let mut out = Vec::new();
    Reply::Array(words.iter().cloned().map(Reply::Bulk).collect()).encode(&mut out);
    out
}

/// Takes the first reply from `input`, once it is complete.
pub fn take_reply(input: &mut BytesMut) -> Option<Reply> {
    let mut at = 0;
    let reply = reply_at(input, &mut at)?;
    input.advance(at);
    Some(reply)
}

fn reply_at(input: &[u8], at: &mut usize) -> Option<Reply> {
    let rest = input.get(*at..)?;
    let end = rest.windows(2).position(|pair| pair == b"\r\n")?;
    let (kind, text) = (rest[0], std::str::from_utf8(&rest[1..end]).ok()?);
    *at += end + 2;
    let mut items =
        |count: usize| (0..count).map(|_| reply_at(input, at)).collect::<Option<Vec<_>>>();
    match kind {
        b'+' => Some(Reply::Status(if text == "OK" { "OK" } else { "PONG" })),
        b'-' => Some(Reply::Error(text.to_owned())),
        b':' => Some(Reply::Int(text.parse().ok()?)),
        b'_' => Some(Reply::Null),
        b'*' => items(text.parse().ok()?).map(Reply::Array),
        b'>' => items(text.parse().ok()?).map(Reply::Push),
        b'%' => {
            let flat = items(text.parse::<usize>().ok()? * 2)?;
            Some(Reply::Map(flat.chunks(2).map(|p| (p[0].clone(), p[1].clone())).collect()))
        }
        b'$' | b'=' => {
            let length: usize = text.parse().ok()?;
            let bytes = input.get(*at..*at + length)?;
            input.get(*at + length + 1)?;
            *at += length + 2;
            Some(if kind == b'$' {
                Reply::bulk(bytes)
            } else {
                Reply::Verbatim(Bytes::copy_from_slice(&bytes[4..]))
            })
        }
        _ => panic!("the server wrote something other than RESP3: {kind}"),
    }
}
