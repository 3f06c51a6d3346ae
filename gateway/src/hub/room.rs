//! A room that this node follows: its order, its ring, its members, and how it gets what is
//! missing.
//!
//! A room is open when its log has been read once. From then on the order is what was passed on;
//! where arrivals do not continue it, they are held while the log is read from there, so that
//! members see no hole. Members that are behind are fed from the ring, else from the log, and
//! never beyond what was passed on.

use std::{collections::HashMap, sync::Arc};

use shared::{
    ids::{ConnectionId, RoomId},
    position::{Position, Seq},
    protocol::answer::NotRecovered,
};
use tokio::time::Instant;

use super::{
    join::Join,
    member::{Frames, Member, Pace, Subscriber, Turn},
};
use crate::{
    bus::Range,
    delivery::{
        Entry, Followed,
        order::{Order, Verdict},
        page::Page,
        ring::{Ring, RingMax},
    },
    telemetry::metrics::{Arrival, Metrics, Repair},
};

/// The most arrivals held while the log is read; what is above is read again.
const HELD_MAX: usize = 1024;
/// How many entries one read of a log brings.
pub(super) const READ_LEN: u32 = 256;

/// A room that is followed.
#[derive(Debug)]
pub(super) struct Room {
    pub(super) name: RoomId,
    /// Tells this following of the room from an earlier one, for answers that come late.
    pub(super) generation: u64,
    /// How far the log was followed; `None` until it was read once.
    order: Option<Order>,
    ring: Ring,
    /// Whether the ring holds all that the log holds.
    ring_is_whole: bool,
    /// Arrivals that wait for a read of the log, in the order of their coming.
    held: Vec<Entry>,
    pub(super) reading: Reading,
    /// Whether something has arrived since this was looked at last.
    pub(super) heard: bool,
    members: Vec<Member>,
    places: HashMap<ConnectionId, usize>,
    /// Joins that wait for a read of the log.
    waiting: Vec<Join>,
    /// Since when nobody is here.
    pub(super) idle_since: Option<Instant>,
}

/// Whether the log is being read from the top on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// It is not.
    No,
    /// It is.
    Yes,
    /// It is, and once more after that: doubt arose since it began.
    Again,
}

/// What became of a page that was read for a member.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fed {
    /// It may be given more at once.
    More,
    /// It is gone, or its outbox is full, and it asks when that has drained.
    Enough,
    /// The log is another one, and the room has to find out first.
    OtherLog,
}

/// What a room asks its shard to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Need {
    Nothing,
    /// Read the log from the top on.
    Read,
}

impl Room {
    pub(super) fn opening(name: RoomId, generation: u64) -> Self {
        Self {
            name,
            generation,
            order: None,
            ring: Ring::default(),
            ring_is_whole: false,
            held: Vec::new(),
            reading: Reading::Yes,
            heard: true,
            members: Vec::new(),
            places: HashMap::new(),
            waiting: Vec::new(),
            idle_since: None,
        }
    }

    /// The last entry passed on, once the room is open.
    pub(super) fn top(&self) -> Option<&Position> {
        self.order.as_ref().map(Order::top)
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    pub(super) fn ring_is_whole(&self) -> bool {
        self.ring_is_whole
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty() && self.waiting.is_empty()
    }

    /// What this node holds of the room's log, once it is open.
    pub(super) fn held_of_log(&self) -> Option<Followed> {
        Some(Followed {
            room: self.name.clone(),
            top: self.top()?.clone(),
            former: None,
            entries: self.ring.newest(usize::MAX).cloned().collect(),
            ids: Vec::new(),
        })
    }

    /// Whether everything up to `head`, the newest position of the log, was passed on. A head below
    /// the top may be older than an arrival that came while it was asked for.
    pub(super) fn has_reached(&self, head: Option<&Position>) -> bool {
        let (Some(top), Some(head)) = (self.top(), head) else { return false };
        top.epoch == head.epoch && top.seq >= head.seq
    }

    /// Which part of the log to read to go on.
    pub(super) fn next_range(&self) -> Range {
        match self.top() {
            None => Range::Newest { limit: READ_LEN },
            Some(top) => Range::After { seq: top.seq, limit: READ_LEN },
        }
    }

    /// Takes an entry that came from the bus.
    pub(super) fn arrive(
        &mut self,
        entry: Entry,
        ring_max: RingMax,
        turn: &mut Turn,
        metrics: &Metrics,
    ) -> Need {
        self.heard = true;
        if self.order.is_none() || self.reading != Reading::No {
            self.hold(entry);
            return Need::Nothing;
        }
        self.judge(entry, ring_max, turn, metrics)
    }

    fn hold(&mut self, entry: Entry) {
        if self.held.len() < HELD_MAX {
            self.held.push(entry);
        } else {
            self.reading = Reading::Again;
        }
    }

    fn judge(
        &mut self,
        entry: Entry,
        ring_max: RingMax,
        turn: &mut Turn,
        metrics: &Metrics,
    ) -> Need {
        let Some(order) = &self.order else { return Need::Nothing };
        let outcome = match order.judge(&entry.position) {
            Verdict::Deliver => {
                self.pass_on(entry, ring_max, turn);
                Arrival::Delivered
            }
            Verdict::Duplicate if self.is_other_than_held(&entry) => {
                self.restart_before(entry, ring_max, turn);
                Arrival::Restarted
            }
            Verdict::Duplicate => Arrival::Duplicate,
            Verdict::Gap => {
                self.hold(entry);
                Arrival::Gap
            }
            // It may be late from a server that is gone: the log tells.
            Verdict::Restarted => {
                self.hold(entry);
                Arrival::Restarted
            }
        };
        metrics.arrivals.of(outcome).inc();
        if self.held.is_empty() { Need::Nothing } else { Need::Read }
    }

    /// Gives the next entry to the members that are up to date, and keeps it.
    fn pass_on(&mut self, entry: Entry, ring_max: RingMax, turn: &mut Turn) {
        if let Some(order) = &mut self.order {
            order.advance(&entry.position);
        }
        let mut frames = Frames::live(&self.name, &entry);
        for member in self.members.iter_mut().filter(|member| member.pace == Pace::Live) {
            member.give(&mut frames, turn);
        }
        let first = self.ring.first();
        self.ring.push(entry, ring_max);
        self.ring_is_whole &= first.is_none() || self.ring.first() == first;
    }

    /// Whether the number is known here for another message: the log went back behind what it had
    /// acknowledged, as a Redis does that lost its tail.
    fn is_other_than_held(&self, entry: &Entry) -> bool {
        self.ring
            .after(entry.position.seq - 1)
            .and_then(|mut known| known.next())
            .is_some_and(|known| known.envelope.id() != entry.envelope.id())
    }

    fn restart_before(&mut self, entry: Entry, ring_max: RingMax, turn: &mut Turn) {
        tracing::error!(room = %self.name, position = %entry.position,
            "the log went back behind what was delivered; its members are told");
        let seq = entry.position.seq - 1;
        let base = Position::new(entry.position.epoch.clone(), seq);
        self.restart(base, NotRecovered::LogLost, turn);
        self.pass_on(entry, ring_max, turn);
    }

    /// Goes on behind `base`, which does not continue what members were given.
    fn restart(&mut self, base: Position, reason: NotRecovered, turn: &mut Turn) {
        for member in &mut self.members {
            member.reset(&self.name, &base, reason, turn);
            if member.pace == Pace::Behind {
                member.pace = Pace::Live;
            }
        }
        self.ring.clear();
        self.ring_is_whole = false;
        self.order = Some(Order::from(base));
    }

    /// Takes what was read of the log from the top on, and then what was held.
    pub(super) fn read(
        &mut self,
        mut page: Page,
        ring_max: RingMax,
        turn: &mut Turn,
        metrics: &Metrics,
    ) -> Need {
        let again = self.reading == Reading::Again;
        self.reading = Reading::No;
        page.keep_whole();
        let before_first = page.entries.first().map_or(page.top, |first| first.position.seq - 1);
        let base = Position::new(page.epoch.clone(), before_first);
        if self.order.is_none() {
            self.order = Some(Order::from(base));
            self.ring_is_whole = page.entries.first().map_or(0, |e| e.position.seq) == page.oldest;
        } else if let Some(top) = self.top() {
            // A read can be older than an arrival that came while it was under way; the log going
            // back is found when a number comes a second time.
            match page.continues(top) {
                Ok(()) | Err(NotRecovered::Ahead) => metrics.repairs.of(Repair::Whole).inc(),
                Err(reason) => {
                    metrics.repairs.of(Repair::Reset).inc();
                    tracing::warn!(room = %self.name, ?reason, from = %top, to = %base,
                        "a log cannot be continued; its members are told");
                    self.restart(base, reason, turn);
                }
            }
        }
        let top = page.top;
        for entry in page.entries {
            if self.order.as_ref().is_some_and(|o| o.judge(&entry.position) == Verdict::Deliver) {
                self.pass_on(entry, ring_max, turn);
            }
        }

        let mut need = Need::Nothing;
        for entry in std::mem::take(&mut self.held) {
            // Of an epoch that is gone, or of one that came after this read, which the next tells.
            let other = self.top().is_some_and(|now| now.epoch != entry.position.epoch);
            if other {
                metrics.arrivals.of(Arrival::Restarted).inc();
                need = Need::Read;
            } else if need == Need::Read {
                self.hold(entry);
            } else {
                need = self.judge(entry, ring_max, turn, metrics);
            }
        }
        let more = self.top().is_some_and(|now| now.epoch == page.epoch && now.seq < top);
        if more || again { Need::Read } else { need }
    }

    /// Has a join wait for a read of the log.
    pub(super) fn wait(&mut self, join: Join) {
        self.idle_since = None;
        self.forget_given_up();
        self.waiting.push(join);
    }

    /// Forgets joins that nobody waits for any more, and with them their connections.
    pub(super) fn forget_given_up(&mut self) {
        self.waiting.retain(|join| !join.done.is_closed());
    }

    /// The joins that waited.
    pub(super) fn take_waiting(&mut self) -> Vec<Join> {
        std::mem::take(&mut self.waiting)
    }

    pub(super) fn add(&mut self, member: Member) {
        self.places.insert(member.subscriber.connection, self.members.len());
        self.members.push(member);
        self.idle_since = None;
    }

    pub(super) fn member(&mut self, connection: ConnectionId) -> Option<&mut Member> {
        let place = *self.places.get(&connection)?;
        self.members.get_mut(place)
    }

    pub(super) fn is_member(&self, connection: ConnectionId) -> bool {
        self.places.contains_key(&connection)
    }

    pub(super) fn remove(&mut self, connection: ConnectionId) -> bool {
        let Some(place) = self.places.remove(&connection) else { return false };
        self.members.swap_remove(place);
        if let Some(moved) = self.members.get(place) {
            self.places.insert(moved.subscriber.connection, place);
        }
        true
    }

    /// Gives a member that is behind what the ring holds for it. Returns from where the log is to
    /// be read where the ring does not reach back so far.
    pub(super) fn feed(&mut self, connection: ConnectionId, turn: &mut Turn) -> Option<Position> {
        let top = self.top()?.clone();
        let place = *self.places.get(&connection)?;
        let member = self.members.get_mut(place).filter(|member| member.pace == Pace::Behind)?;
        if member.seq < top.seq {
            if !member.subscriber.outbox.has_room() {
                // A read for it would be in vain. It asks again when its socket has drained.
                member.subscriber.outbox.lag(self.name.clone());
                return None;
            }
            let Some(entries) = self.ring.after(member.seq) else {
                member.pace = Pace::Reading;
                return Some(Position::new(top.epoch, member.seq));
            };
            for entry in entries {
                if !member.give(&mut Frames::replay(&self.name, entry), turn) {
                    return None;
                }
            }
        }
        member.pace = Pace::Live;
        None
    }

    /// Gives a member what was read of the log behind `from` for it.
    pub(super) fn feed_page(
        &mut self,
        connection: ConnectionId,
        from: &Position,
        mut page: Page,
        turn: &mut Turn,
    ) -> Fed {
        let Some(top) = self.top().cloned() else { return Fed::Enough };
        let Some(place) = self.places.get(&connection).copied() else { return Fed::Enough };
        let Some(member) = self.members.get_mut(place) else { return Fed::Enough };
        if member.pace != Pace::Reading {
            return Fed::Enough;
        }
        member.pace = Pace::Behind;
        let cursor = Position::new(top.epoch.clone(), member.seq);
        if cursor != *from {
            // It was reset meanwhile, or has left and come back.
            return Fed::More;
        }
        page.keep_whole();
        match page.continues(&cursor) {
            // A log that went back has nothing for it, as one that has lost it.
            Ok(()) | Err(NotRecovered::Ahead) => {}
            Err(NotRecovered::LogTrimmed) => {
                let before = page.entries.first().map_or(page.top, |e| e.position.seq - 1);
                let base = Position::new(top.epoch.clone(), before.min(top.seq));
                member.reset(&self.name, &base, NotRecovered::LogTrimmed, turn);
            }
            Err(NotRecovered::LogLost) => return Fed::OtherLog,
        }
        for entry in page.entries.iter().filter(|entry| entry.position.seq <= top.seq) {
            if entry.position.seq > member.seq
                && !member.give(&mut Frames::replay(&self.name, entry), turn)
            {
                return Fed::Enough;
            }
        }
        if member.seq == cursor.seq && member.seq < top.seq {
            // The log has lost what this member misses, and the ring does not reach back to it.
            let before = self.ring.first().map_or(top.seq, |first| first - 1);
            let base = Position::new(top.epoch, before);
            member.reset(&self.name, &base, NotRecovered::LogLost, turn);
        }
        Fed::More
    }

    /// The members that are behind.
    pub(super) fn behind(&self) -> Vec<ConnectionId> {
        let behind = self.members.iter().filter(|member| member.pace == Pace::Behind);
        behind.map(|member| member.subscriber.connection).collect()
    }

    /// What the ring holds in bytes.
    pub(super) fn ring_bytes(&self) -> usize {
        self.ring.bytes()
    }

    /// How many members there are.
    pub(super) fn len(&self) -> usize {
        self.members.len()
    }
}

/// How much a ring may hold, given what all rings of a shard hold.
pub(super) fn ring_max(shard_bytes: usize, shard_bytes_max: usize) -> RingMax {
    if shard_bytes > shard_bytes_max { RingMax::UNDER_PRESSURE } else { RingMax::DEFAULT }
}

impl Member {
    /// A member that has been given everything up to `seq`.
    pub(super) fn at(subscriber: Arc<Subscriber>, seq: Seq, pace: Pace) -> Self {
        Self { subscriber, seq, pace }
    }
}
