//! Checks the guarantees against the messages that all clients received.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde_json::Value;
use skein_core::envelope::Envelope;
use skein_protocol::position::Position;

use super::{
    client::{id_of, room_name},
    observer::{Id, RoomObserver, SeenMessage, client_of, name},
    shape::SimFault,
    world::Simulation,
};

/// Facts that the simulation knows beyond its clients.
#[derive(Default)]
pub struct GroundTruth {
    /// The time at which a message was first appended, on any server.
    appended: BTreeMap<Id, f64>,
    /// Acknowledged messages.
    acked: BTreeSet<Id>,
    rooms: BTreeMap<Id, usize>,
    /// The processes that have delivered a message, and so hold it.
    holders: BTreeMap<Id, BTreeSet<(usize, u64)>>,
    pub faults: Vec<SimFault>,
    /// Silent losses before the last messages.
    silent_before: Vec<String>,
}

impl GroundTruth {
    pub fn appended(&mut self, time: f64, _key: &[u8], payload: Bytes) {
        if let Ok(envelope) = Envelope::from_packed(payload) {
            self.appended.entry(envelope.id().0.as_u128()).or_insert(time);
        }
    }

    pub fn note_ack(&mut self, frame: &Value) {
        if frame["type"] == "ack" {
            self.acked.insert(id_of(frame));
        }
    }

    /// Records that a process has delivered a frame to a client.
    pub fn note_holder(&mut self, process: (usize, u64), frame: &Value) {
        let entries = frame["history"].as_array().into_iter().flatten();
        for entry in entries.chain([frame].into_iter().filter(|frame| frame["type"] == "message")) {
            self.holders.entry(id_of(entry)).or_default().insert(process);
        }
    }

    pub fn room_of(&mut self, id: Id, room: usize) {
        self.rooms.insert(id, room);
    }
}

/// The findings of a run, by their kind.
#[derive(Default)]
pub struct Findings {
    /// Violations of a guarantee.
    pub violations: BTreeMap<&'static str, Vec<String>>,
    /// Events that are allowed, as long as they are rare.
    pub counts: BTreeMap<&'static str, usize>,
}

impl Findings {
    fn violation(&mut self, kind: &'static str, text: String) {
        self.violations.entry(kind).or_default().push(text);
    }

    fn count(&mut self, kind: &'static str, more: usize) {
        *self.counts.entry(kind).or_default() += more;
    }
}

/// Records messages that are missing without a signalled discontinuity before the last messages are
/// sent, which may reveal the loss.
pub fn record_silent_losses(sim: &mut Simulation) {
    let mut silent = Vec::new();
    for_each_missing(sim, |client, observer, id, appended| {
        if !observer.breaks.iter().any(|time| *time >= appended) {
            silent.push(format!("c{client} never got {}", name(id)));
        }
    });
    sim.truth.silent_before = silent;
}

/// Calls `found` for each acknowledged message that a member did not receive.
fn for_each_missing(sim: &Simulation, mut found: impl FnMut(usize, &RoomObserver, Id, f64)) {
    for client in &sim.clients {
        for room in &client.rooms {
            let observer = &room.observer;
            let Some(joined) = observer.joined_at else { continue };
            let seen: BTreeSet<Id> = observer.seen.iter().map(|seen| seen.id).collect();
            for id in &sim.truth.acked {
                let here = sim.truth.rooms.get(id) == Some(&room.room);
                let appended = sim.truth.appended.get(id).copied().unwrap_or(0.0);
                if here && appended > joined && !seen.contains(id) {
                    found(client.number, observer, *id, appended);
                }
            }
        }
    }
}

/// Checks all guarantees at the end of a run.
pub fn check(sim: &Simulation) -> Findings {
    let mut findings = Findings::default();
    let primary = sim.primary.expect("Redis is back at the end");
    let store = &sim.servers[primary].data.store;
    let mut logged = BTreeMap::new();
    for number in 0..sim.shape.rooms {
        let stream = store.stream_ending(&format!(":r:{}:log", room_name(number)));
        for fields in stream.into_iter().flat_map(|stream| stream.entries.values()) {
            let envelope = Envelope::from_packed(fields[5].clone()).expect("gateways wrote it");
            *logged.entry(envelope.id().0.as_u128()).or_insert(0) += 1;
        }
    }
    for (id, count) in &logged {
        // A message that was appended again under a new number is in the log twice if the log has
        // kept both.
        if *count > 1 {
            findings.count("twice in the log", 1);
            let _ = id;
        }
    }
    check_losses(sim, &logged, &mut findings);
    check_positions(sim, &mut findings);
    for client in &sim.clients {
        for room in &client.rooms {
            let who = format!("c{} in {}", client.number, room_name(room.room));
            for (kind, text) in &room.observer.violations {
                findings.violation(kind, format!("{who}: {text}"));
            }
            if let Some(own) = room.unacked.front() {
                findings.violation("STUCK_UNACKED", format!("{who}: {}", name(own.id)));
            }
            check_acks(&who, &room.observer, &mut findings);
            check_sender_order(&who, client.number, &room.observer, &mut findings);
            findings.count("signalled discontinuities", room.observer.breaks.len());
        }
    }
    check_breaks(sim, &mut findings);
    findings
}

/// No discontinuity may be signalled if every process that held what Redis lost was present, or
/// Redis has kept its data.
fn check_breaks(sim: &Simulation, findings: &mut Findings) {
    let faults = &sim.truth.faults;
    // If everything stops in order, no process is missing, unless another fault happens meanwhile.
    let others = |fault: &&SimFault| **fault != SimFault::Planned;
    let planned = faults.contains(&SimFault::Planned);
    let missing = faults.iter().any(|fault| fault.changes_redis() || planned)
        && faults.iter().filter(others).any(|fault| fault.takes_a_gateway())
        || planned && faults.iter().any(|fault| fault.changes_redis());
    let signalled = findings.counts.get("signalled discontinuities").copied().unwrap_or(0);
    // A clock that jumps ends leases, and changes which processes are waited for.
    if signalled > 0 && !missing && !sim.shape.short_log && !faults.contains(&SimFault::Clock) {
        findings.violation("NEEDLESS_BREAK", format!("{signalled} times with {faults:?}"));
    }
}

fn check_losses(sim: &Simulation, logged: &BTreeMap<Id, i32>, findings: &mut Findings) {
    let faults = &sim.truth.faults;
    let may_go = faults.iter().any(|fault| fault.loses_data())
        && faults.iter().any(|fault| fault.takes_a_gateway());
    let held = |id: Id| {
        let mut holders = sim.truth.holders.get(&id).into_iter().flatten();
        holders.any(|(node, process)| sim.hosts[*node].process == *process)
    };
    for_each_missing(sim, |client, observer, id, appended| {
        let text = format!("c{client} never got {}, appended at {appended:.3}", name(id));
        if !observer.breaks.iter().any(|time| *time >= appended) {
            findings.violation("SILENT_LOSS", text);
        } else if logged.contains_key(&id) || sim.shape.short_log {
            findings.count("missed by one, discontinuity signalled", 1);
        } else if may_go && !held(id) {
            findings.count("lost with its holders, discontinuity signalled", 1);
        } else {
            findings.violation("GONE", text);
        }
    });
    if !findings.violations.contains_key("SILENT_LOSS") {
        for text in &sim.truth.silent_before {
            findings.violation("SILENT_TAIL", text.clone());
        }
    }
}

/// A position names one message for every client; a client receives a message once.
fn check_positions(sim: &Simulation, findings: &mut Findings) {
    let mut at: BTreeMap<(usize, String, u64), Id> = BTreeMap::new();
    for client in &sim.clients {
        for room in &client.rooms {
            let observer = &room.observer;
            let who = format!("c{} in {}", client.number, room_name(room.room));
            let mut first: BTreeMap<Id, &SeenMessage> = BTreeMap::new();
            for seen in &observer.seen {
                let Position { epoch, seq } = &seen.position;
                let key = (room.room, epoch.as_str().to_owned(), *seq);
                let known = *at.entry(key).or_insert(seen.id);
                if known != seen.id {
                    let text = format!(
                        "{who}: {} is {} and {}",
                        seen.position,
                        name(known),
                        name(seen.id)
                    );
                    findings.violation("DIVERGE", text);
                }
                if let Some(first) = first.get(&seen.id) {
                    if observer.broke_between(first.time, seen.time) {
                        findings.count("received twice, discontinuity signalled", 1);
                    } else {
                        let text = format!(
                            "{who}: {} at {} and {}",
                            name(seen.id),
                            first.position,
                            seen.position
                        );
                        findings.violation("DUP_ID", text);
                    }
                }
                first.insert(seen.id, seen);
            }
        }
    }
    check_acked_positions(sim, &at, findings);
}

/// An acknowledged position has the acknowledged message for all members, unless a discontinuity
/// was signalled to its sender since.
fn check_acked_positions(
    sim: &Simulation,
    at: &BTreeMap<(usize, String, u64), Id>,
    findings: &mut Findings,
) {
    for client in &sim.clients {
        for room in &client.rooms {
            for (id, acks) in &room.observer.acks {
                for (time, Position { epoch, seq }) in acks {
                    let Some(there) = at.get(&(room.room, epoch.as_str().to_owned(), *seq)) else {
                        continue;
                    };
                    let (who, is_signalled) =
                        (client.number, room.observer.breaks.iter().any(|b| b >= time));
                    if there != id && is_signalled {
                        findings.count(
                            "another message at an acknowledged number, discontinuity signalled",
                            1,
                        );
                    } else if there != id {
                        let text =
                            format!("c{who}: {epoch}:{seq} is {} and {}", name(*id), name(*there));
                        findings.violation("ACK_TAKEN", text);
                    }
                }
            }
        }
    }
}

fn check_acks(who: &str, observer: &RoomObserver, findings: &mut Findings) {
    for (id, acks) in &observer.acks {
        if acks.iter().any(|(_, position)| *position != acks[0].1) {
            let text = format!("{who}: {} at {acks:?}", name(*id));
            if observer.breaks.is_empty() {
                findings.violation("ACK_TWO_POSITIONS", text);
            } else {
                findings.count("acknowledged again after a discontinuity", 1);
            }
        }
    }
}

/// Messages that a client sent once have numbers in the order of sending.
fn check_sender_order(who: &str, client: usize, observer: &RoomObserver, findings: &mut Findings) {
    let mut known = BTreeSet::new();
    let mut last: Option<&SeenMessage> = None;
    for seen in &observer.seen {
        let own = client_of(seen.id) == client && !observer.resent.contains(&seen.id);
        if !own || !known.insert(seen.id) {
            continue;
        }
        if let Some(last) = last
            && last.id > seen.id
            && last.position.epoch == seen.position.epoch
            && observer.breaks.is_empty()
        {
            findings.violation(
                "SENDER_ORDER",
                format!("{who}: {} before {}", name(last.id), name(seen.id)),
            );
        }
        last = Some(seen);
    }
}
