//! What was promised, held against what all clients saw.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde_json::Value;
use shared::{envelope::Envelope, position::Position};

use super::{
    client::{id_of, room},
    shape::Fault,
    witness::{Id, Seen, Witness, client_of, name},
    world::World,
};

/// What the world knows beside what its clients know.
#[derive(Default)]
pub struct Book {
    /// When a message was first appended, on whichever server.
    appended: BTreeMap<Id, f64>,
    /// What was acknowledged.
    acked: BTreeSet<Id>,
    rooms: BTreeMap<Id, usize>,
    /// Which processes have passed a message on, and so hold it.
    holders: BTreeMap<Id, BTreeSet<(usize, u64)>>,
    pub faults: Vec<Fault>,
    /// What was lost and not told of before the last messages.
    silent_before: Vec<String>,
}

impl Book {
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

    /// A process has given a frame to a client.
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

/// What was found, by its kind.
#[derive(Default)]
pub struct Findings {
    /// What must not be.
    pub violations: BTreeMap<&'static str, Vec<String>>,
    /// What may be, as long as it is seldom.
    pub counts: BTreeMap<&'static str, usize>,
}

impl Findings {
    fn bad(&mut self, kind: &'static str, text: String) {
        self.violations.entry(kind).or_default().push(text);
    }

    fn count(&mut self, kind: &'static str, more: usize) {
        *self.counts.entry(kind).or_default() += more;
    }
}

/// Remembers what is missing before the last messages are sent: they may bring it to light.
pub fn look_before_the_last(world: &mut World) {
    let mut silent = Vec::new();
    for_each_missing(world, |client, witness, id, appended| {
        if !witness.breaks.iter().any(|time| *time >= appended) {
            silent.push(format!("c{client} never got {}", name(id)));
        }
    });
    world.book.silent_before = silent;
}

/// Calls `found` for each acknowledged message that a member did not get.
fn for_each_missing(world: &World, mut found: impl FnMut(usize, &Witness, Id, f64)) {
    for client in &world.clients {
        for place in &client.places {
            let witness = &place.witness;
            let Some(joined) = witness.joined_at else { continue };
            let seen: BTreeSet<Id> = witness.seen.iter().map(|seen| seen.id).collect();
            for id in &world.book.acked {
                let here = world.book.rooms.get(id) == Some(&place.room);
                let appended = world.book.appended.get(id).copied().unwrap_or(0.0);
                if here && appended > joined && !seen.contains(id) {
                    found(client.number, witness, *id, appended);
                }
            }
        }
    }
}

/// Everything that can be said at the end.
pub fn judge(world: &World) -> Findings {
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
        // An orphan that comes back under a new number stands twice where the log kept both.
        if *count > 1 {
            findings.count("twice in the log", 1);
            let _ = id;
        }
    }
    judge_losses(world, &logged, &mut findings);
    judge_positions(world, &mut findings);
    for client in &world.clients {
        for place in &client.places {
            let who = format!("c{} in {}", client.number, room(place.room));
            for (kind, text) in &place.witness.bad {
                findings.bad(kind, format!("{who}: {text}"));
            }
            if let Some(own) = place.unacked.front() {
                findings.bad("STUCK_UNACKED", format!("{who}: {}", name(own.id)));
            }
            judge_acks(&who, &place.witness, &mut findings);
            judge_sender_order(&who, client.number, &place.witness, &mut findings);
            findings.count("breaks told", place.witness.breaks.len());
        }
    }
    judge_breaks(world, &mut findings);
    findings
}

/// Nobody is told of a break where everybody was there who had what Redis lost, or Redis has stayed
/// the same.
fn judge_breaks(world: &World, findings: &mut Findings) {
    let faults = &world.book.faults;
    // Where all is stopped in order nobody is missing, unless something else happens meanwhile.
    let others = |fault: &&Fault| **fault != Fault::Planned;
    let planned = faults.contains(&Fault::Planned);
    let missing = faults.iter().any(|fault| fault.changes_redis() || planned)
        && faults.iter().filter(others).any(|fault| fault.takes_a_gateway())
        || planned && faults.iter().any(|fault| fault.changes_redis());
    let told = findings.counts.get("breaks told").copied().unwrap_or(0);
    // A clock that jumps ends leases, and so who counts on whom.
    if told > 0 && !missing && !world.shape.short && !faults.contains(&Fault::Clock) {
        findings.bad("NEEDLESS_BREAK", format!("{told} times with {faults:?}"));
    }
}

fn judge_losses(world: &World, logged: &BTreeMap<Id, i32>, findings: &mut Findings) {
    let faults = &world.book.faults;
    let may_go = faults.iter().any(|fault| fault.loses_data())
        && faults.iter().any(|fault| fault.takes_a_gateway());
    let held = |id: Id| {
        let mut holders = world.book.holders.get(&id).into_iter().flatten();
        holders.any(|(node, process)| world.hosts[*node].process == *process)
    };
    for_each_missing(world, |client, witness, id, appended| {
        let text = format!("c{client} never got {}, appended at {appended:.3}", name(id));
        if !witness.breaks.iter().any(|time| *time >= appended) {
            findings.bad("SILENT_LOSS", text);
        } else if logged.contains_key(&id) || world.shape.short {
            findings.count("missed by one, told", 1);
        } else if may_go && !held(id) {
            findings.count("gone with its holders, told", 1);
        } else {
            findings.bad("GONE", text);
        }
    });
    if !findings.violations.contains_key("SILENT_LOSS") {
        for text in &world.book.silent_before {
            findings.bad("SILENT_TAIL", text.clone());
        }
    }
}

/// A position names one message, whoever asks; one client sees a message once.
fn judge_positions(world: &World, findings: &mut Findings) {
    let mut at: BTreeMap<(usize, String, u64), Id> = BTreeMap::new();
    for client in &world.clients {
        for place in &client.places {
            let witness = &place.witness;
            let who = format!("c{} in {}", client.number, room(place.room));
            let mut first: BTreeMap<Id, &Seen> = BTreeMap::new();
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
                    findings.bad("DIVERGE", text);
                }
                if let Some(first) = first.get(&seen.id) {
                    if witness.broke_between(first.time, seen.time) {
                        findings.count("a second time after a break", 1);
                    } else {
                        let text = format!(
                            "{who}: {} at {} and {}",
                            name(seen.id),
                            first.position,
                            seen.position
                        );
                        findings.bad("DUP_ID", text);
                    }
                }
                first.insert(seen.id, seen);
            }
        }
    }
    judge_named(world, &at, findings);
}

/// What an answer said is at a position is what members got there, unless its sender was told of a
/// break since.
fn judge_named(world: &World, at: &BTreeMap<(usize, String, u64), Id>, findings: &mut Findings) {
    for client in &world.clients {
        for place in &client.places {
            for (id, acks) in &place.witness.acks {
                for (time, Position { epoch, seq }) in acks {
                    let Some(there) = at.get(&(place.room, epoch.as_str().to_owned(), *seq)) else {
                        continue;
                    };
                    let (who, is_told) =
                        (client.number, place.witness.breaks.iter().any(|b| b >= time));
                    if there != id && is_told {
                        findings.count("another at an acknowledged number, told", 1);
                    } else if there != id {
                        let text =
                            format!("c{who}: {epoch}:{seq} is {} and {}", name(*id), name(*there));
                        findings.bad("ACK_TAKEN", text);
                    }
                }
            }
        }
    }
}

fn judge_acks(who: &str, witness: &Witness, findings: &mut Findings) {
    for (id, acks) in &witness.acks {
        if acks.iter().any(|(_, position)| *position != acks[0].1) {
            let text = format!("{who}: {} at {acks:?}", name(*id));
            if witness.breaks.is_empty() {
                findings.bad("ACK_TWO_POSITIONS", text);
            } else {
                findings.count("acknowledged anew after a break", 1);
            }
        }
    }
}

/// What a client sent once has its numbers in the order of sending.
fn judge_sender_order(who: &str, client: usize, witness: &Witness, findings: &mut Findings) {
    let mut known = BTreeSet::new();
    let mut last: Option<&Seen> = None;
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
            findings
                .bad("SENDER_ORDER", format!("{who}: {} before {}", name(last.id), name(seen.id)));
        }
        last = Some(seen);
    }
}
