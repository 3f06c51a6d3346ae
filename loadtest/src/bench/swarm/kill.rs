//! A node that is killed in the middle: its members go on elsewhere, from where they were.
//!
//! They do as clients of section 5 of the protocol: the first pause is any time up to half a
//! second, each further one may be twice as long.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use hdrhistogram::Histogram;
use mio::{Interest, Token, net::TcpStream};
use serde::Deserialize;
use shared::{
    client::frames,
    ids::RoomId,
    position::{Epoch, Position, Seq},
};

use super::{ClientError, Swarm, Times, histogram, room};
use crate::{
    timestamp::SendTimestamp,
    websocket::{self, FrameReader, HandshakeResponse},
};

/// How long everybody talks before anything is measured, so that each has been told something.
const WARM: Duration = Duration::from_secs(4);
/// How long is looked at what others notice.
const AFTERMATH: Duration = Duration::from_secs(5);
/// How long the others may take to go on elsewhere.
const BACK_MAX: Duration = Duration::from_secs(30);
const BACK_OFF: Duration = Duration::from_millis(500);

/// What came of it.
pub(crate) struct Killed {
    /// Until one was where it would be without that, since the node was killed.
    pub(crate) back_ns: Histogram<u64>,
    /// Of the members of other nodes: before it, and in the seconds after it.
    pub(crate) latency_ns: (Histogram<u64>, Histogram<u64>),
    pub(crate) lateness_ns: Histogram<u64>,
    /// Whose log did not go on from where they were.
    pub(crate) not_recovered: u64,
    /// Who is not back.
    pub(crate) away: usize,
    pub(crate) expected: u64,
    pub(crate) wrong: u64,
}

/// The members of a node that is killed.
pub(super) struct Doomed {
    /// Where they go on.
    addresses: Vec<SocketAddr>,
    members: BTreeMap<usize, One>,
    /// Whose pause is over when.
    pauses: BTreeSet<(Duration, usize)>,
    killed_at: Option<Duration>,
    back_ns: Histogram<u64>,
    not_recovered: u64,
}

struct One {
    cursor: Option<Position>,
    state: State,
    tries: u32,
}

enum State {
    There,
    Away,
    /// What has arrived of the answer to its handshake.
    Opening(Vec<u8>),
    Joining,
}

/// What is looked at in a frame.
#[derive(Deserialize)]
struct Frame<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    epoch: Option<Epoch>,
    seq: Option<Seq>,
    #[serde(default)]
    recovered: bool,
}

impl Swarm {
    /// Talks, has `kill` end the node that member `i` of each `nodes` is on for `i` = `node`, and
    /// goes on until its members are back. Only members of the first node talk.
    pub(crate) fn talk_and_kill(
        &mut self,
        times: Times,
        addresses: &[SocketAddr],
        node: usize,
        kill: impl FnOnce(),
    ) -> Result<Killed, ClientError> {
        let rooms = self.talk.rooms;
        self.senders = rooms;
        let is_doomed = |index: &usize| index / rooms % addresses.len() == node;
        let one = || One { cursor: None, state: State::There, tries: 0 };
        let members = (0..self.connections.len()).filter(is_doomed);
        let mut elsewhere = addresses.to_vec();
        elsewhere.remove(node);
        self.doomed = Some(Doomed {
            addresses: elsewhere,
            members: members.map(|index| (index, one())).collect(),
            pauses: BTreeSet::new(),
            killed_at: None,
            back_ns: histogram(),
            not_recovered: 0,
        });
        self.begin();
        let mut next = 0;
        self.run(WARM, &mut next)?;
        let _ = self.take_tally();
        self.run(WARM + times.measured, &mut next)?;
        let before = self.take_tally();
        kill();
        let killed_at = self.began.elapsed();
        if let Some(doomed) = &mut self.doomed {
            doomed.killed_at = Some(killed_at);
        }
        self.run(killed_at + AFTERMATH, &mut next)?;
        let after = self.take_tally();
        while self.away() > 0 && self.began.elapsed() < killed_at + BACK_MAX {
            self.run(self.began.elapsed() + Duration::from_millis(100), &mut next)?;
        }
        self.wait_for_the_rest()?;
        let (expected, wrong) = self.account();
        let away = self.away();
        let doomed = self.doomed.take().expect("set above");
        let mut lateness_ns = before.lateness_ns;
        let _ = lateness_ns.add(after.lateness_ns);
        Ok(Killed {
            back_ns: doomed.back_ns,
            latency_ns: (before.latency_ns, after.latency_ns),
            lateness_ns,
            not_recovered: doomed.not_recovered,
            away,
            expected,
            wrong,
        })
    }

    fn away(&self) -> usize {
        let there = |one: &One| matches!(one.state, State::There);
        let members = self.doomed.iter().flat_map(|doomed| doomed.members.values());
        members.filter(|one| !there(one)).count()
    }

    /// Connects those anew whose pause is over.
    pub(super) fn come_back(&mut self) -> Result<(), ClientError> {
        let Some(doomed) = &mut self.doomed else { return Ok(()) };
        let now = self.began.elapsed();
        while doomed.pauses.first().is_some_and(|(until, _)| *until <= now) {
            let Some((_, index)) = doomed.pauses.pop_first() else { break };
            let Some(one) = doomed.members.get_mut(&index) else { continue };
            let place = (index + one.tries as usize) % doomed.addresses.len();
            let address = doomed.addresses[place];
            let mut stream = TcpStream::connect(address)?;
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut stream, Token(index), interest)?;
            let member = &mut self.connections[index];
            member.stream = stream;
            member.reader = FrameReader::default();
            member.reader.keeps_payload = true;
            let path = format!("/ws?user=bench-{index:05}");
            member.unsent = websocket::handshake_request(&address.to_string(), &path);
            member.over = false;
            one.state = State::Opening(Vec::new());
        }
        Ok(())
    }

    /// Whether a member that fails is one that comes back. It is away then.
    pub(super) fn is_lost(&mut self, index: usize) -> bool {
        let now = self.began.elapsed();
        let Some(doomed) = &mut self.doomed else { return false };
        let Some(one) = doomed.members.get_mut(&index).filter(|_| doomed.killed_at.is_some())
        else {
            return false;
        };
        self.connections[index].over = true;
        self.connections[index].unsent.clear();
        if !matches!(one.state, State::Away) {
            one.state = State::Away;
            let most = BACK_OFF * 2_u32.pow(one.tries.min(6));
            let pause = most.mul_f64(fraction(index as u64, one.tries));
            doomed.pauses.insert((now + pause, index));
            one.tries += 1;
        }
        true
    }

    /// Takes what belongs to the handshake of a member from what arrived. Returns what is behind
    /// it; nothing where the handshake was refused.
    pub(super) fn shake_hands<'a>(
        &mut self,
        index: usize,
        bytes: &'a [u8],
    ) -> Result<Option<&'a [u8]>, ClientError> {
        let Some(one) = self.doomed.as_mut().and_then(|doomed| doomed.members.get_mut(&index))
        else {
            return Ok(Some(bytes));
        };
        let State::Opening(head) = &mut one.state else { return Ok(Some(bytes)) };
        let before = head.len();
        head.extend_from_slice(bytes);
        let Some(end) = memchr::memmem::find(head, b"\r\n\r\n") else { return Ok(Some(&[])) };
        match websocket::parse_response(&head[..end + 4])? {
            None => Ok(Some(&[])),
            Some(HandshakeResponse::Rejected { .. }) => {
                self.is_lost(index);
                Ok(None)
            }
            Some(HandshakeResponse::Upgraded { .. }) => {
                one.state = State::Joining;
                let room: RoomId = room(index % self.talk.rooms).parse().expect("a name");
                let (since, history) = (one.cursor.as_ref(), Some(0));
                let join =
                    frames::OutgoingJoin { since, history, ..frames::OutgoingJoin::new(&room) };
                self.connections[index].send(&websocket::text(&frames::encode_text(&join)))?;
                Ok(Some(&bytes[end + 4 - before..]))
            }
        }
    }
}

impl Doomed {
    /// Takes a frame that a member got. Returns how many messages are in it, or nothing where the
    /// member is none of these.
    pub(super) fn take(&mut self, index: usize, frame: &[u8], now: Duration) -> Option<u64> {
        let one = self.members.get_mut(&index)?;
        let Ok(Frame { kind, epoch, seq, recovered }) = serde_json::from_slice(frame) else {
            return Some(0);
        };
        if kind == "joined" || kind == "message" {
            one.cursor = epoch.zip(seq).map(|(epoch, seq)| Position::new(epoch, seq));
        }
        if kind == "joined" {
            one.state = State::There;
            self.not_recovered += u64::from(!recovered);
            let since = now - self.killed_at.unwrap_or(now);
            self.back_ns.saturating_record(since.as_nanos() as u64);
        }
        Some(SendTimestamp::count(frame))
    }
}

/// A number from 0 to 1, another one for each member and try.
fn fraction(member: u64, tries: u32) -> f64 {
    // SplitMix64 (Steele, Lea and Flood, 2014).
    let mut bits = (member << 8 | u64::from(tries)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    bits = (bits ^ bits >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    (bits ^ bits >> 31) as f64 / u64::MAX as f64
}
