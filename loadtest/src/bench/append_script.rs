//! The append script alone: how often Redis runs it for this client only.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    clients::BenchTimes,
    rows::{BenchLoad, CONTENT_BYTES},
};
use crate::timestamp::SendTimestamp;

/// The text of the gateway's script, without an archive.
const SCRIPT: &str = concat!(
    "local archive_backlog_max = 0\n",
    include_str!("../../../gateway/redis/src/scripts/prelude.lua"),
    "\n",
    include_str!("../../../gateway/redis/src/scripts/append.lua"),
);
/// Number of calls in flight.
const PIPELINE_LEN: usize = 128;
/// Identity of the Redis server that the nodes agreed on, for the script's check.
const SERVER_ID: &str = "0123456789abcdef";
/// Size of an envelope around the content: header, room, id, author, time.
const ENVELOPE_BYTES: usize = CONTENT_BYTES + 240;

/// Result of a run.
pub(crate) struct ScriptResult<T> {
    pub(crate) snapshots: (T, T),
    pub(crate) publishes: u64,
}

/// Calls the script for a while, for the rooms of `load`. `snapshot` is read before and after the
/// measurement.
pub(crate) fn publish<T, E: From<io::Error>>(
    address: SocketAddr,
    load: BenchLoad,
    times: BenchTimes,
    snapshot: impl Fn() -> Result<T, E>,
) -> Result<ScriptResult<T>, E> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut redis =
        RedisConnection { replies: BufReader::with_capacity(1 << 18, stream.try_clone()?), stream };
    redis.execute(&[&["HSET", "gw:barrier", "t", SERVER_ID, "open", "1"]])?;
    let sha = redis.execute(&[&["SCRIPT", "LOAD", SCRIPT]])?.swap_remove(0);
    let mut number = 0;
    let mut run = |until: Duration, began: Instant| -> io::Result<u64> {
        let mut publishes = 0;
        while began.elapsed() < until {
            let calls: Vec<Vec<String>> = (number..number + PIPELINE_LEN)
                .map(|number| call(&sha, number % load.rooms, number))
                .collect();
            number += PIPELINE_LEN;
            let calls: Vec<Vec<&str>> =
                calls.iter().map(|call| call.iter().map(String::as_str).collect()).collect();
            let calls: Vec<&[&str]> = calls.iter().map(Vec::as_slice).collect();
            publishes += redis.execute(&calls)?.len() as u64;
        }
        Ok(publishes)
    };
    run(times.warm_up, Instant::now())?;
    let before = snapshot()?;
    let publishes = run(times.measured, Instant::now())?;
    Ok(ScriptResult { snapshots: (before, snapshot()?), publishes })
}

/// Arguments of one call, as a gateway with default options passes them.
fn call(sha: &str, room: usize, number: usize) -> Vec<String> {
    let key = |name: &str| format!("gw:{{0}}:r:bench-{room:04}:{name}");
    let id = format!("bench-{number:018x}");
    let timestamp = SendTimestamp { sender: 0, due_ns: number as u64 };
    // Bytes 3 to 26 of an envelope are its id key.
    let envelope =
        format!("{:x<ENVELOPE_BYTES$}", format!("xx{id}{}", timestamp.content(CONTENT_BYTES)));
    let arguments = [
        "EVALSHA",
        sha,
        "7",
        &key("log"),
        &key("meta"),
        &key("ids0"),
        &key("ids1"),
        "gw:barrier",
        &key("unheard"),
        "gw:archive",
        SERVER_ID,
        &format!("gw:{{0}}:r:bench-{room:04}"),
        "abcdefgh",
        "86400000",
        "604800000",
        "600000",
        &id,
        &envelope,
        "1000",
        "120000",
        "16777216",
        "",
        "",
        // Redis is not short of memory.
        "",
    ];
    arguments.map(str::to_owned).into()
}

struct RedisConnection {
    stream: TcpStream,
    replies: BufReader<TcpStream>,
}

impl RedisConnection {
    /// Sends commands in one write and reads the reply to each.
    fn execute(&mut self, commands: &[&[&str]]) -> io::Result<Vec<String>> {
        let mut bytes = Vec::new();
        for command in commands {
            write!(bytes, "*{}\r\n", command.len())?;
            for part in *command {
                write!(bytes, "${}\r\n{part}\r\n", part.len())?;
            }
        }
        self.stream.write_all(&bytes)?;
        commands.iter().map(|_| self.read_reply()).collect()
    }

    /// The last text of one reply; an error reply is an error.
    fn read_reply(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.replies.read_line(&mut line)?;
        let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
        let (kind, rest) = line.trim_end().split_at_checked(1).ok_or_else(|| invalid("nothing"))?;
        let length = || rest.parse::<usize>().map_err(|_| invalid(&line));
        match kind {
            "+" | ":" => Ok(rest.to_owned()),
            "$" => {
                let mut text = vec![0; length()? + 2];
                self.replies.read_exact(&mut text)?;
                Ok(String::from_utf8_lossy(&text).trim_end().to_owned())
            }
            "*" => (0..length()?).try_fold(String::new(), |_, _| self.read_reply()),
            _ => Err(invalid(&line)),
        }
    }
}
