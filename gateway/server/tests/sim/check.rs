//! Checks the delivery promises against everything the clients received.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde_json::Value;
use skein_core::envelope::Envelope;
use skein_protocol::position::Position;

use super::{
    client::{id_of, room},
    observer::{Id, RoomObserver, SeenMessage, client_of, name},
    shape::SimFault,
    world::Simulation,
};

/// Facts that only the simulation knows, and not the clients.
#[derive(Default)]
pub struct GroundTruth {
    /// The time at which a message was first appended, on any server.
    appended: BTreeMap<Id, f64>,
    /// Acknowledged messages.
    acked: BTreeSet<Id>,
    rooms: BTreeMap<Id, usize>,
    /// The processes that delivered a message, and therefore hold it.
    holders: BTreeMap<Id, BTreeSet<(usize, u64)>>,
    pub faults: Vec<SimFault>,
    /// Messages lost without a signal before the last messages were sent.
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

    /// Records that a process sent a frame to a client.
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

/// Findings by kind.
#[derive(Default)]
pub struct Findings {
    /// Violations: none is allowed.
    pub violations: BTreeMap<&'static str, Vec<String>>,
    /// Findings that are allowed as long as they are rare.
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

/// Records missing messages before the last messages are sent, because those may reveal the gaps.
pub fn record_silent_losses(world: &mut Simulation) {
    let mut silent = Vec::new();
    for_each_missing(world, |client, witness, id, appended| {
        if !witness.breaks.iter().any(|time| *time >= appended) {
            silent.push(format!("c{client} never got {}", name(id)));
        }
    });
    world.truth.silent_before = silent;
}

/// Calls `found` for each acknowledged message that a member did not get.
fn for_each_missing(world: &Simulation, mut found: impl FnMut(usize, &RoomObserver, Id, f64)) {
    for client in &world.clients {
        for place in &client.rooms {
            let witness = &place.observer;
            let Some(joined) = witness.joined_at else { continue };
            let seen: BTreeSet<Id> = witness.seen.iter().map(|seen| seen.id).collect();
            for id in &world.truth.acked {
                let here = world.truth.rooms.get(id) == Some(&place.room);
                let appended = world.truth.appended.get(id).copied().unwrap_or(0.0);
                if here && appended > joined && !seen.contains(id) {
                    found(client.number, witness, *id, appended);
                }
            }
        }
    }
}

/// Runs all checks at the end of a simulation.
pub fn check(world: &Simulation) -> Findings {
    let mut findings = Findings::default();
    let primary = world.primary.expect("Redis is back at the end");
    let store = &world.servers[primary].data.store;
    let mut logged = BTreeMap::new();
    for number in 0..world.shape.rooms {
        let stream = store.stream_ending(&format!(":r:{}:log", room(number)));
        for fields in stream.into_iter().flat_map(|stream| stream.entries.values()) {
            let envelope = Envelope::from_packed(fields[5].clone()).expect("gateways wrote it");
            *logged.entry(envelope.id().0.as_u128()).or_insert(0) += 1;
        }
    }
    for (id, count) in &logged {
        // A lost message that was appended again under a new number is in the log twice if the log
        // kept both.
        if *count > 1 {
            findings.count("twice in the log", 1);
            let _ = id;
        }
    }
    check_losses(world, &logged, &mut findings);
    check_positions(world, &mut findings);
    for client in &world.clients {
        for place in &client.rooms {
            let who = format!("c{} in {}", client.number, room(place.room));
            for (kind, text) in &place.observer.violations {
                findings.violation(kind, format!("{who}: {text}"));
            }
            if let Some(own) = place.unacked.front() {
                findings.violation("STUCK_UNACKED", format!("{who}: {}", name(own.id)));
            }
            check_acks(&who, &place.observer, &mut findings);
            check_sender_order(&who, client.number, &place.observer, &mut findings);
            findings.count("signalled discontinuities", place.observer.breaks.len());
        }
    }
    check_breaks(world, &mut findings);
    findings
}

/// No client gets a signalled discontinuity if all nodes that held the lost entries took part in
/// the recovery round, or if Redis did not change.
fn check_breaks(world: &Simulation, findings: &mut Findings) {
    let faults = &world.truth.faults;
    // No process is missing after an orderly stop, unless another fault happens meanwhile.
    let others = |fault: &&SimFault| **fault != SimFault::Planned;
    let planned = faults.contains(&SimFault::Planned);
    let missing = faults.iter().any(|fault| fault.changes_redis() || planned)
        && faults.iter().filter(others).any(|fault| fault.takes_a_gateway())
        || planned && faults.iter().any(|fault| fault.changes_redis());
    let told = findings.counts.get("signalled discontinuities").copied().unwrap_or(0);
    // A jump of the clock ends leases, and so changes which nodes a recovery round waits for.
    if told > 0 && !missing && !world.shape.short_log && !faults.contains(&SimFault::Clock) {
        findings.violation("NEEDLESS_BREAK", format!("{told} times with {faults:?}"));
    }
}

fn check_losses(world: &Simulation, logged: &BTreeMap<Id, i32>, findings: &mut Findings) {
    let faults = &world.truth.faults;
    let may_go = faults.iter().any(|fault| fault.loses_data())
        && faults.iter().any(|fault| fault.takes_a_gateway());
    let held = |id: Id| {
        let mut holders = world.truth.holders.get(&id).into_iter().flatten();
        holders.any(|(node, process)| world.hosts[*node].process == *process)
    };
    for_each_missing(world, |client, witness, id, appended| {
        let text = format!("c{client} never got {}, appended at {appended:.3}", name(id));
        if !witness.breaks.iter().any(|time| *time >= appended) {
            findings.violation("SILENT_LOSS", text);
        } else if logged.contains_key(&id) || world.shape.short_log {
            findings.count("missed by one, signalled", 1);
        } else if may_go && !held(id) {
            findings.count("lost with its holders, signalled", 1);
        } else {
            findings.violation("GONE", text);
        }
    });
    if !findings.violations.contains_key("SILENT_LOSS") {
        for text in &world.truth.silent_before {
            findings.violation("SILENT_TAIL", text.clone());
        }
    }
}

/// A position names the same message for every client, and a client receives a message once.
fn check_positions(world: &Simulation, findings: &mut Findings) {
    let mut at: BTreeMap<(usize, String, u64), Id> = BTreeMap::new();
    for client in &world.clients {
        for place in &client.rooms {
            let witness = &place.observer;
            let who = format!("c{} in {}", client.number, room(place.room));
            let mut first: BTreeMap<Id, &SeenMessage> = BTreeMap::new();
            for seen in &witness.seen {
                let Position { epoch, seq } = &seen.position;
                let key = (place.room, epoch.as_str().to_owned(), *seq);
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
                    if witness.broke_between(first.time, seen.time) {
                        findings.count("a second time after a discontinuity", 1);
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
    check_acked_positions(world, &at, findings);
}

/// An ack names the message that members received at its position, unless the sender got a
/// signalled discontinuity since.
fn check_acked_positions(
    world: &Simulation,
    at: &BTreeMap<(usize, String, u64), Id>,
    findings: &mut Findings,
) {
    for client in &world.clients {
        for place in &client.rooms {
            for (id, acks) in &place.observer.acks {
                for (time, Position { epoch, seq }) in acks {
                    let Some(there) = at.get(&(place.room, epoch.as_str().to_owned(), *seq)) else {
                        continue;
                    };
                    let (who, is_told) =
                        (client.number, place.observer.breaks.iter().any(|b| b >= time));
                    if there != id && is_told {
                        findings.count("another at an acknowledged number, signalled", 1);
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

fn check_acks(who: &str, witness: &RoomObserver, findings: &mut Findings) {
    for (id, acks) in &witness.acks {
        if acks.iter().any(|(_, position)| *position != acks[0].1) {
            let text = format!("{who}: {} at {acks:?}", name(*id));
            if witness.breaks.is_empty() {
                findings.violation("ACK_TWO_POSITIONS", text);
            } else {
                findings.count("acknowledged again after a discontinuity", 1);
            }
        }
    }
}

/// Messages that a client sent only once are numbered in the order of sending.
fn check_sender_order(who: &str, client: usize, witness: &RoomObserver, findings: &mut Findings) {
    let mut known = BTreeSet::new();
    let mut last: Option<&SeenMessage> = None;
    for seen in &witness.seen {
        let own = client_of(seen.id) == client && !witness.resent.contains(&seen.id);
        if !own || !known.insert(seen.id) {
            continue;
        }
        if let Some(last) = last
            && last.id > seen.id
            && last.position.epoch == seen.position.epoch
            && witness.breaks.is_empty()
        {
            findings.violation(
                "SENDER_ORDER",
                format!("{who}: {} before {}", name(last.id), name(seen.id)),
            );
        }
        last = Some(seen);
    }
}
