//! Failover: a node is killed during the load, and its members reconnect to other nodes and resume.
//!
//! They back off as `docs/protocol.md` says: the first delay is random up
//! to half a second, and each further one may be twice as long.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use hdrhistogram::Histogram;
use mio::{Interest, Token, net::TcpStream};
use serde::Deserialize;
use skein_client::frames;
use skein_protocol::{
    ids::RoomId,
    position::{Epoch, Position, Seq},
};

use super::{BenchClients, BenchTimes, ClientError, histogram, room};
use crate::{
    timestamp::SendTimestamp,
    websocket::{self, FrameReader, HandshakeResponse},
};

/// Duration of the load before the measurement, in which each member receives a message.
const WARM_UP: Duration = Duration::from_secs(4);
/// Time after the kill in which the latency of the other members is measured.
const OBSERVATION: Duration = Duration::from_secs(5);
/// Time limit for members to reconnect.
const RECONNECT_MAX: Duration = Duration::from_secs(30);
const BACKOFF: Duration = Duration::from_millis(500);

/// Result of a failover.
pub(crate) struct FailoverResult {
    /// Time from the kill until a member has joined again.
    pub(crate) reconnect_ns: Histogram<u64>,
    /// Latency of the members of other nodes: before the kill, and in the seconds after it.
    pub(crate) latency_ns: (Histogram<u64>, Histogram<u64>),
    pub(crate) lateness_ns: Histogram<u64>,
    /// Members whose join was not recovered.
    pub(crate) not_recovered: u64,
    /// Members that have not reconnected.
    pub(crate) missing: usize,
    pub(crate) expected: u64,
    pub(crate) wrong: u64,
}

/// Members of the killed node.
pub(super) struct FailoverGroup {
    /// Addresses of the other nodes.
    addresses: Vec<SocketAddr>,
    members: BTreeMap<usize, FailoverClient>,
    /// Ends of backoffs, with the members.
    backoffs: BTreeSet<(Duration, usize)>,
    killed_at: Option<Duration>,
    reconnect_ns: Histogram<u64>,
    not_recovered: u64,
}

struct FailoverClient {
    cursor: Option<Position>,
    state: FailoverState,
    tries: u32,
}

enum FailoverState {
    Connected,
    Disconnected,
    /// Received bytes of the handshake response.
    Handshaking(Vec<u8>),
    Joining,
}

/// The fields of a frame that are used.
#[derive(Deserialize)]
struct FailoverFrame<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    epoch: Option<Epoch>,
    seq: Option<Seq>,
    #[serde(default)]
    recovered: bool,
}

impl BenchClients {
    /// Runs the load, calls `kill` to end node number `node`, and continues until the node's
    /// members have reconnected. Only members of the first node send.
    pub(crate) fn run_failover(
        &mut self,
        times: BenchTimes,
        addresses: &[SocketAddr],
        node: usize,
        kill: impl FnOnce(),
    ) -> Result<FailoverResult, ClientError> {
        let rooms = self.load.rooms;
        self.senders = rooms;
        let is_doomed = |index: &usize| index / rooms % addresses.len() == node;
        let client = || FailoverClient { cursor: None, state: FailoverState::Connected, tries: 0 };
        let members = (0..self.connections.len()).filter(is_doomed);
        let mut survivors = addresses.to_vec();
        survivors.remove(node);
        self.failover = Some(FailoverGroup {
            addresses: survivors,
            members: members.map(|index| (index, client())).collect(),
            backoffs: BTreeSet::new(),
            killed_at: None,
            reconnect_ns: histogram(),
            not_recovered: 0,
        });
        self.begin();
        let mut next = 0;
        self.run(WARM_UP, &mut next)?;
        let _ = self.take_counters();
        self.run(WARM_UP + times.measured, &mut next)?;
        let before = self.take_counters();
        kill();
        let killed_at = self.began.elapsed();
        if let Some(failover) = &mut self.failover {
            failover.killed_at = Some(killed_at);
        }
        self.run(killed_at + OBSERVATION, &mut next)?;
        let after = self.take_counters();
        while self.missing() > 0 && self.began.elapsed() < killed_at + RECONNECT_MAX {
            self.run(self.began.elapsed() + Duration::from_millis(100), &mut next)?;
        }
        self.drain()?;
        let (expected, wrong) = self.count_missing();
        let missing = self.missing();
        let failover = self.failover.take().expect("set above");
        let mut lateness_ns = before.lateness_ns;
        let _ = lateness_ns.add(after.lateness_ns);
        Ok(FailoverResult {
            reconnect_ns: failover.reconnect_ns,
            latency_ns: (before.latency_ns, after.latency_ns),
            lateness_ns,
            not_recovered: failover.not_recovered,
            missing,
            expected,
            wrong,
        })
    }

    fn missing(&self) -> usize {
        let there = |client: &FailoverClient| matches!(client.state, FailoverState::Connected);
        let members = self.failover.iter().flat_map(|failover| failover.members.values());
        members.filter(|client| !there(client)).count()
    }

    /// Reconnects members whose backoff is over.
    pub(super) fn reconnect_due(&mut self) -> Result<(), ClientError> {
        let Some(failover) = &mut self.failover else { return Ok(()) };
        let now = self.began.elapsed();
        while failover.backoffs.first().is_some_and(|(until, _)| *until <= now) {
            let Some((_, index)) = failover.backoffs.pop_first() else { break };
            let Some(client) = failover.members.get_mut(&index) else { continue };
            let place = (index + client.tries as usize) % failover.addresses.len();
            let address = failover.addresses[place];
            let mut stream = TcpStream::connect(address)?;
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut stream, Token(index), interest)?;
            let connection = &mut self.connections[index];
            connection.stream = stream;
            connection.reader = FrameReader::default();
            connection.reader.keeps_payload = true;
            let path = format!("/ws?user=bench-{index:05}");
            connection.unsent = websocket::handshake_request(&address.to_string(), &path);
            connection.is_closed = false;
            client.state = FailoverState::Handshaking(Vec::new());
        }
        Ok(())
    }

    /// Starts the backoff of a member whose connection failed. Returns `false` if the member does
    /// not belong to the killed node.
    pub(super) fn on_connection_lost(&mut self, index: usize) -> bool {
        let now = self.began.elapsed();
        let Some(failover) = &mut self.failover else { return false };
        let Some(client) =
            failover.members.get_mut(&index).filter(|_| failover.killed_at.is_some())
        else {
            return false;
        };
        self.connections[index].is_closed = true;
        self.connections[index].unsent.clear();
        if !matches!(client.state, FailoverState::Disconnected) {
            client.state = FailoverState::Disconnected;
            let most = BACKOFF * 2_u32.pow(client.tries.min(6));
            let pause = most.mul_f64(fraction(index as u64, client.tries));
            failover.backoffs.insert((now + pause, index));
            client.tries += 1;
        }
        true
    }

    /// Removes the handshake response of a member from the received bytes. Returns the bytes after
    /// it; `None` if the handshake was rejected.
    pub(super) fn read_handshake<'a>(
        &mut self,
        index: usize,
        bytes: &'a [u8],
    ) -> Result<Option<&'a [u8]>, ClientError> {
        let Some(client) =
            self.failover.as_mut().and_then(|failover| failover.members.get_mut(&index))
        else {
            return Ok(Some(bytes));
        };
        let FailoverState::Handshaking(head) = &mut client.state else { return Ok(Some(bytes)) };
        let before = head.len();
        head.extend_from_slice(bytes);
        let Some(end) = memchr::memmem::find(head, b"\r\n\r\n") else { return Ok(Some(&[])) };
        match websocket::parse_response(&head[..end + 4])? {
            None => Ok(Some(&[])),
            Some(HandshakeResponse::Rejected { .. }) => {
                self.on_connection_lost(index);
                Ok(None)
            }
            Some(HandshakeResponse::Upgraded { .. }) => {
                client.state = FailoverState::Joining;
                let room: RoomId = room(index % self.load.rooms).parse().expect("a name");
                let (since, history) = (client.cursor.as_ref(), Some(0));
                let join =
                    frames::OutgoingJoin { since, history, ..frames::OutgoingJoin::new(&room) };
                self.connections[index].send(&websocket::text(&frames::encode_text(&join)))?;
                Ok(Some(&bytes[end + 4 - before..]))
            }
        }
    }
}

impl FailoverGroup {
    /// Handles a frame of a member. Returns the number of messages in it; `None` if the member does
    /// not belong to the killed node.
    pub(super) fn take(&mut self, index: usize, frame: &[u8], now: Duration) -> Option<u64> {
        let client = self.members.get_mut(&index)?;
        let Ok(FailoverFrame { kind, epoch, seq, recovered }) = serde_json::from_slice(frame)
        else {
            return Some(0);
        };
        if kind == "joined" || kind == "message" {
            client.cursor = epoch.zip(seq).map(|(epoch, seq)| Position::new(epoch, seq));
        }
        if kind == "joined" {
            client.state = FailoverState::Connected;
            self.not_recovered += u64::from(!recovered);
            let since = now - self.killed_at.unwrap_or(now);
            self.reconnect_ns.saturating_record(since.as_nanos() as u64);
        }
        Some(SendTimestamp::count(frame))
    }
}

/// A number from 0 to 1 that depends on the member and the attempt.
fn fraction(connection: u64, tries: u32) -> f64 {
    // SplitMix64 (Steele, Lea and Flood, 2014).
    let mut bits = (connection << 8 | u64::from(tries)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    bits = (bits ^ bits >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    (bits ^ bits >> 31) as f64 / u64::MAX as f64
}
