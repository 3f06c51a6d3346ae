//! A client behind a real slow link: a network namespace, a pair of virtual Ethernet devices, and a
//! token bucket (`tc … tbf`) on both of them.
//!
//! The client joins with a `since` that is megabytes behind. All entries must arrive in order on
//! one connection; the user must stay online for others meanwhile; the client's own acks and pongs
//! must overtake the bulk. During the first half the client sends only the pongs that it owes, so
//! that only the flow of bytes shows that it is alive. Needs root, `ip` and `tc`.

use std::{
    fmt, fs, io,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use skein_testkit::servers::free_address;
use tokio::time::Instant;

use super::{
    error::{AbuseError, LinkError},
    testbed::{API_KEY, AbuseNode, NodeOptions},
};
use crate::{
    args::AbuseArgs,
    report::StepResult,
    websocket::{self, FrameReader, HandshakeResponse, WsFrame},
};

/// Name on the command line, group, and description.
pub(crate) const NAME: &str = "slow-link";
pub(crate) const GROUP: &str = "E1";
pub(crate) const WHAT: &str = "a client behind a link of 96 kbit/s catches up 4 MB (root only)";

/// Size of a message's content, bytes.
const CONTENT_BYTES: u64 = 8_000;
/// Messages in one request to the server API.
const BATCH: u64 = 10;
/// Time limit of an own ack and of a pong.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(3);
/// Interval between the client's pings.
const PING_EVERY: Duration = Duration::from_secs(2);
/// Number of messages that the client sends while it catches up.
const OWN_MESSAGES: u64 = 5;
/// Time limit of a request on loopback.
const LOOPBACK_MAX: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(200);
const ROOM: &str = "slow-link";
const USER: &str = "slow-link-client";

/// A network namespace behind a slow link, until it is dropped.
struct ShapedLink {
    namespace: String,
    /// Address of the gateway's side.
    host: Ipv4Addr,
}

impl ShapedLink {
    fn up(rate: &str) -> Result<Self, LinkError> {
        let own = std::process::id();
        let namespace = format!("skein-{own}");
        let (host_device, client_device) = (format!("sk{own}a"), format!("sk{own}b"));
        // Each process has a network of its own.
        let [_, _, high, low] = own.to_be_bytes();
        let host = Ipv4Addr::new(10, 213, high, low & 0xFC | 1);
        let client = Ipv4Addr::new(10, 213, high, low & 0xFC | 2);
        run_command(&format!("ip netns add {namespace}"))?;
        let link = Self { namespace, host };
        let inside = format!("ip netns exec {}", link.namespace);
        let bucket = format!("root tbf rate {rate} burst 4kb latency 500ms");
        for command in [
            format!(
                "ip link add {host_device} type veth peer name {client_device} netns {}",
                link.namespace
            ),
            format!("ip addr add {host}/30 dev {host_device}"),
            format!("ip link set {host_device} up"),
            format!("{inside} ip addr add {client}/30 dev {client_device}"),
            format!("{inside} ip link set {client_device} up"),
            format!("tc qdisc add dev {host_device} {bucket}"),
            format!("{inside} tc qdisc add dev {client_device} {bucket}"),
        ] {
            run_command(&command)?;
        }
        Ok(link)
    }

    /// Moves this thread into the namespace behind the link, for good.
    fn enter(namespace: &str) -> io::Result<()> {
        let file = fs::File::open(PathBuf::from("/var/run/netns").join(namespace))?;
        let kind = rustix::thread::LinkNameSpaceType::Network;
        Ok(rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(kind))?)
    }
}

impl Drop for ShapedLink {
    fn drop(&mut self) {
        // The pair of devices is deleted with it.
        let _ = run_command(&format!("ip netns del {}", self.namespace));
    }
}

fn run_command(command: &str) -> Result<(), LinkError> {
    let mut words = command.split(' ');
    let program = words.next().unwrap_or_default();
    let failed = |output: String| LinkError::Command { command: command.to_owned(), output };
    match Command::new(program).args(words).output() {
        Ok(Output { status, .. }) if status.success() => Ok(()),
        Ok(output) => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
        Err(error) => Err(failed(error.to_string())),
    }
}

/// Observations of the client behind the link and of a watcher.
#[derive(Clone, Debug, Default, PartialEq)]
struct SlowLinkResults {
    /// Entries to receive, own messages included.
    expected: u64,
    /// Entries received in order.
    received: u64,
    /// Entries that did not follow the one before.
    out_of_order: u64,
    /// Why the connection ended before all entries arrived.
    ended: Option<String>,
    took: Duration,
    acks: Vec<Duration>,
    /// Own messages without an ack.
    unanswered: u64,
    pongs: Vec<Duration>,
    /// Pings without a pong within [`RESPONSE_TIMEOUT`].
    pongs_missing: u64,
    /// Whether the watcher saw the user online.
    online: bool,
    /// How often the watcher saw the user go offline.
    offline: u64,
}

impl SlowLinkResults {
    /// Compares the observations with the expectations.
    fn steps(&self) -> Vec<StepResult> {
        let step = |name: &str, result: String, passed| StepResult {
            name: format!("{NAME}, {name}"),
            result,
            passed,
        };
        let longest = |times: &[Duration]| times.iter().max().copied().unwrap_or_default();
        let describe = |times: &[Duration], missing: u64| {
            format!(
                "{} within {:.1} s, {missing} missing",
                times.len(),
                longest(times).as_secs_f64()
            )
        };
        let in_time = |times: &[Duration], missing: u64| {
            !times.is_empty() && missing == 0 && longest(times) <= RESPONSE_TIMEOUT
        };
        let Self { expected, received, out_of_order, .. } = *self;
        let caught_up = format!(
            "{received} of {expected} entries, {out_of_order} out of order, in {:.0} s",
            self.took.as_secs_f64()
        );
        let offline = match self.online {
            true => format!("{} times", self.offline),
            false => "never online".to_owned(),
        };
        let ended = self.ended.clone().unwrap_or_else(|| "no".to_owned());
        vec![
            step("caught up", caught_up, expected > 0 && received == expected && out_of_order == 0),
            step("connection cut", ended, self.ended.is_none()),
            step(
                "own acks",
                describe(&self.acks, self.unanswered),
                in_time(&self.acks, self.unanswered),
            ),
            step(
                "pongs",
                describe(&self.pongs, self.pongs_missing),
                in_time(&self.pongs, self.pongs_missing),
            ),
            step("seen offline", offline, self.online && self.offline == 0),
        ]
    }
}

/// Runs the slow link.
pub(crate) async fn run(
    args: &AbuseArgs,
    stop: &Arc<AtomicBool>,
) -> Result<Result<Vec<StepResult>, LinkError>, AbuseError> {
    let link = match ShapedLink::up(&args.link_rate) {
        Ok(link) => link,
        Err(error) => return Ok(Err(error)),
    };
    let listen = SocketAddr::from((link.host, free_address()?.port()));
    let options = NodeOptions {
        gateway: args.gateway.clone(),
        redis_maxmemory: args.redis_maxmemory.clone(),
        set: args.set.clone(),
    };
    let node = AbuseNode::start_at("slow-link", &options, listen).await?;
    let entries = args.link_bytes.div_ceil(CONTENT_BYTES);
    let stop = stop.clone();
    let (namespace, time_limit) = (link.namespace.clone(), args.link_patience);
    let results = tokio::task::spawn_blocking(move || {
        catch_up(listen, &namespace, entries, time_limit, &stop)
    });
    let results = results.await?;
    node.stop().await;
    drop(link);
    Ok(Ok(results?.steps()))
}

/// Fills a room, lets a client behind the link catch up, and watches its user from outside.
fn catch_up(
    address: SocketAddr,
    namespace: &str,
    entries: u64,
    time_limit: Duration,
    stop: &Arc<AtomicBool>,
) -> io::Result<SlowLinkResults> {
    let mut watcher = SlowLinkClient::connect(address, "/ws?user=slow-link-watcher")?;
    watcher.send(&json!({"type": "join", "room": ROOM, "history": 0}))?;
    let joined = watcher.wait_for("joined")?;
    let since = json!({"epoch": joined["epoch"], "seq": joined["seq"]});
    let first_seq = joined["seq"].as_u64().unwrap_or_default();
    for batch in 0..entries.div_ceil(BATCH) {
        publish(address, BATCH.min(entries - batch * BATCH))?;
    }
    watcher.send(&json!({"type": "watch", "users": [USER]}))?;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let client = std::thread::Builder::new().spawn_scoped(scope, || {
            let results = ShapedLink::enter(namespace).and_then(|()| {
                behind_the_link(address, &since, first_seq, entries, time_limit, stop)
            });
            is_over.store(true, Ordering::Relaxed);
            results
        })?;
        let (mut online, mut offline) = (false, 0);
        while !is_over.load(Ordering::Relaxed) {
            watcher.receive(POLL_INTERVAL, &mut |received| {
                let Incoming::Frame(frame) = received else { return };
                let is_user = frame["user"] == USER;
                let kind = frame["type"].as_str().unwrap_or_default();
                online |= is_user && (kind == "member_joined" || frame["status"] == "online");
                let is_gone = kind == "member_left" || frame["status"] == "offline";
                offline += u64::from(online && is_user && is_gone);
            })?;
        }
        let results = client.join().map_err(|_| io::Error::other("the client panicked"))??;
        Ok(SlowLinkResults { online, offline, ..results })
    })
}

/// Publishes messages through the server API.
fn publish(address: SocketAddr, count: u64) -> io::Result<()> {
    let content = "x".repeat(CONTENT_BYTES as usize);
    let message = json!({"room": ROOM, "content": content});
    let body = json!({"messages": vec![message; count as usize]}).to_string();
    let mut stream = TcpStream::connect_timeout(&address, LOOPBACK_MAX)?;
    stream.set_read_timeout(Some(LOOPBACK_MAX))?;
    write!(
        stream,
        "POST /api/v1/publish HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {API_KEY}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.starts_with("HTTP/1.1 20") && !answer.contains(r#""error""#) {
        return Ok(());
    }
    Err(io::Error::other(format!("publish: {}", answer.lines().next().unwrap_or_default())))
}

fn behind_the_link(
    address: SocketAddr,
    since: &Value,
    first_seq: u64,
    entries: u64,
    time_limit: Duration,
    stop: &AtomicBool,
) -> io::Result<SlowLinkResults> {
    let mut client = SlowLinkClient::connect(address, &format!("/ws?user={USER}"))?;
    client.send(&json!({"type": "join", "room": ROOM, "since": since}))?;
    let began = Instant::now();
    let mut results = SlowLinkResults { expected: entries, ..SlowLinkResults::default() };
    let (mut last, mut pinged, mut pings) = (first_seq, began, Vec::new());
    let mut own: Vec<(Instant, bool)> = Vec::new();
    while results.received < results.expected
        && began.elapsed() < time_limit
        && !stop.load(Ordering::Relaxed)
    {
        let now = Instant::now();
        let sends = results.received * 2 >= entries;
        if sends && (pinged.elapsed() >= PING_EVERY || pings.is_empty()) {
            client.write(&websocket::ping(&(pings.len() as u32).to_be_bytes()))?;
            pings.push((now, false));
            pinged = now;
        }
        // Own messages are spread evenly over the second half.
        let sent = own.len() as u64;
        let at = entries / 2 + entries / 2 * sent / (OWN_MESSAGES + 1);
        if sends && sent < OWN_MESSAGES && results.received >= at {
            let frame = json!({"type": "message", "room": ROOM, "content": "mine", "ref": sent});
            client.send(&frame)?;
            own.push((now, false));
            results.expected += 1;
        }
        let mut take = |seq: Option<u64>| {
            let Some(seq) = seq else { return };
            results.received += u64::from(seq == last + 1);
            results.out_of_order += u64::from(seq != last + 1);
            last = seq;
        };
        let received = client.receive(POLL_INTERVAL, &mut |received| match received {
            Incoming::Pong(payload) => {
                let number = <[u8; 4]>::try_from(payload).map(u32::from_be_bytes);
                if let Some((at, answered)) =
                    number.ok().and_then(|number| pings.get_mut(number as usize))
                {
                    *answered = true;
                    results.pongs.push(at.elapsed());
                }
            }
            Incoming::Frame(frame) => match frame["type"].as_str().unwrap_or_default() {
                "joined" => {
                    let history = frame["history"].as_array();
                    history.into_iter().flatten().for_each(|entry| take(entry["seq"].as_u64()));
                }
                "message" => take(frame["seq"].as_u64()),
                "ack" => {
                    let number = frame["ref"].as_u64().unwrap_or(u64::MAX) as usize;
                    if let Some((at, answered)) = own.get_mut(number) {
                        *answered = true;
                        results.acks.push(at.elapsed());
                    }
                }
                _ => {}
            },
        });
        if let Err(error) = received {
            results.ended = Some(error.to_string());
            break;
        }
    }
    results.took = began.elapsed();
    results.unanswered = own.iter().filter(|(_, answered)| !answered).count() as u64;
    let late = |(at, answered): &&(Instant, bool)| !answered && at.elapsed() > RESPONSE_TIMEOUT;
    results.pongs_missing = pings.iter().filter(late).count() as u64;
    Ok(results)
}

/// A frame or pong that a client received; pings are answered at once.
enum Incoming<'a> {
    Frame(Value),
    Pong(&'a [u8]),
}

/// A client on a thread of its own.
struct SlowLinkClient {
    stream: TcpStream,
    reader: FrameReader,
    buffer: Vec<u8>,
    /// Bytes after the handshake response.
    rest: Vec<u8>,
}

impl SlowLinkClient {
    fn connect(address: SocketAddr, path: &str) -> io::Result<Self> {
        let mut stream = TcpStream::connect_timeout(&address, LOOPBACK_MAX)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LOOPBACK_MAX))?;
        stream.write_all(&websocket::handshake_request(&address.to_string(), path))?;
        let (mut head, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
        loop {
            let count = stream.read(&mut buffer)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            head.extend_from_slice(&buffer[..count]);
            match websocket::parse_response(&head).map_err(io::Error::other)? {
                None => {}
                Some(HandshakeResponse::Rejected { status }) => {
                    return Err(io::Error::other(format!("handshake: HTTP {status}")));
                }
                Some(HandshakeResponse::Upgraded { end }) => {
                    let reader = FrameReader::with_payload();
                    return Ok(Self { stream, reader, buffer, rest: head.split_off(end) });
                }
            }
        }
    }

    fn send(&mut self, frame: &Value) -> io::Result<()> {
        self.write(&websocket::text(&frame.to_string()))
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Handles the bytes that arrive within `wait`.
    fn receive(&mut self, wait: Duration, on: &mut dyn FnMut(Incoming<'_>)) -> io::Result<()> {
        let bytes = if self.rest.is_empty() {
            self.stream.set_read_timeout(Some(wait))?;
            match self.stream.read(&mut self.buffer) {
                Ok(0) => return Err(io::Error::other("no close frame")),
                Ok(count) => self.buffer[..count].to_vec(),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::TimedOut
                            | io::ErrorKind::Interrupted
                    ) =>
                {
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        } else {
            std::mem::take(&mut self.rest)
        };
        let (mut pongs, mut closed) = (Vec::new(), None);
        let pushed = self.reader.push(&bytes, |received| match received {
            WsFrame::Message(Some(message)) => {
                on(Incoming::Frame(serde_json::from_slice(&message).unwrap_or_default()));
            }
            WsFrame::Message(None) => {}
            WsFrame::Ping(payload) => pongs.extend(websocket::pong(&payload)),
            WsFrame::Pong(payload) => on(Incoming::Pong(&payload)),
            WsFrame::Close(code, reason) => closed = Some(format!("close {code:?} {reason}")),
        });
        pushed.map_err(io::Error::other)?;
        if !pongs.is_empty() {
            self.stream.write_all(&pongs)?;
        }
        closed.map_or(Ok(()), |how| Err(io::Error::other(how)))
    }

    fn wait_for(&mut self, kind: &str) -> io::Result<Value> {
        let (deadline, mut found) = (Instant::now() + LOOPBACK_MAX, None);
        while found.is_none() && Instant::now() < deadline {
            self.receive(POLL_INTERVAL, &mut |received| {
                if let Incoming::Frame(frame) = received
                    && frame["type"] == kind
                {
                    found.get_or_insert(frame);
                }
            })?;
        }
        found.ok_or_else(|| io::ErrorKind::TimedOut.into())
    }
}

impl fmt::Debug for SlowLinkClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("stream", &self.stream).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> SlowLinkResults {
        SlowLinkResults {
            expected: 505,
            received: 505,
            took: Duration::from_secs(350),
            acks: vec![Duration::from_secs(1); 5],
            pongs: vec![Duration::from_millis(2_900)],
            online: true,
            ..SlowLinkResults::default()
        }
    }

    #[test]
    fn each_expectation_can_fail() {
        let failed = |change: fn(&mut SlowLinkResults)| -> Vec<String> {
            let mut results = good();
            change(&mut results);
            let steps = results.steps().into_iter();
            steps.filter(|step| !step.passed).map(|step| step.name).collect()
        };
        assert_eq!(failed(|_| ()), [""; 0]);
        assert_eq!(failed(|results| results.received = 504), ["slow-link, caught up"]);
        assert_eq!(failed(|results| results.out_of_order = 1), ["slow-link, caught up"]);
        assert_eq!(
            failed(|results| results.ended = Some("4003".to_owned())),
            ["slow-link, connection cut"]
        );
        assert_eq!(
            failed(|results| results.acks[2] = Duration::from_secs(61)),
            ["slow-link, own acks"]
        );
        assert_eq!(failed(|results| results.unanswered = 1), ["slow-link, own acks"]);
        assert_eq!(failed(|results| results.acks.clear()), ["slow-link, own acks"]);
        assert_eq!(failed(|results| results.pongs_missing = 1), ["slow-link, pongs"]);
        assert_eq!(failed(|results| results.offline = 1), ["slow-link, seen offline"]);
        assert_eq!(failed(|results| results.online = false), ["slow-link, seen offline"]);
    }
}
