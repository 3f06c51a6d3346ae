//! How a join is answered: from where the connection goes on, and what it is shown first.

use std::sync::Arc;

use serde_json::value::RawValue;
use shared::{
    position::{Position, Seq},
    protocol::{
        HISTORY_BYTES_MAX, Ref,
        answer::{Answer, Joined, NotRecovered},
        request::history_default,
    },
};
use tokio::sync::oneshot;

use super::{
    member::{Member, Pace, Subscriber, Turn},
    room::{READ_LEN, Room},
};
use crate::{
    bus::Range,
    delivery::{Entry, page::Page},
    telemetry::metrics::{Metrics, ResumeSource},
};

/// A connection that wants to take part in a room.
#[derive(Debug)]
pub(super) struct Join {
    pub(super) subscriber: Arc<Subscriber>,
    pub(super) reference: Option<Ref>,
    pub(super) start: Start,
    /// Hears when `joined` has been sent; dropped where the room cannot be followed.
    pub(super) done: oneshot::Sender<()>,
    /// Whether the log was read anew for this join: another node may have delivered what this one
    /// has not heard yet, so that a position is judged only then.
    pub(super) refreshed: bool,
    /// Why it cannot go on from its position, once that is known.
    pub(super) lost: Option<NotRecovered>,
}

/// From where a connection wants to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// From now, and shown so many of the newest entries.
    Newest(u32),
    /// From behind a position.
    Since(Position),
}

/// What is to be done for a join.
#[derive(Debug)]
pub(super) enum Step {
    /// It was answered, or nobody waits for it any more.
    Done,
    /// The log is to be read for it.
    Read(Join, Range),
    /// It is to be looked at again when the room has read its log from the top on.
    Wait(Join),
}

impl Join {
    /// The position to go on from, unless that is not to be had.
    fn since(&self) -> Option<&Position> {
        match &self.start {
            Start::Since(since) if self.lost.is_none() => Some(since),
            _ => None,
        }
    }

    /// How many of the newest entries to show otherwise.
    fn newest(&self) -> u32 {
        match self.start {
            Start::Newest(count) => count,
            Start::Since(_) => history_default(),
        }
    }
}

impl Room {
    /// Answers a join from what the room holds, or says what it takes.
    pub(super) fn join(&mut self, mut join: Join, turn: &mut Turn, metrics: &Metrics) -> Step {
        let Some(top) = self.top().cloned() else { return Step::Wait(join) };
        if join.done.is_closed() {
            return Step::Done;
        }
        if let Some(seq) = self.member(join.subscriber.connection).map(|member| member.seq) {
            self.send_joined(&join, Position::new(top.epoch, seq), vec![], false);
            turn.touch(&join.subscriber);
            // Who has given up waiting is a member all the same.
            let _ = join.done.send(());
            return Step::Done;
        }
        let Some(since) = join.since().cloned() else { return self.join_newest(join, turn) };
        if since.epoch != top.epoch || since.seq > top.seq {
            if !join.refreshed {
                return Step::Wait(Join { refreshed: true, ..join });
            }
            let ahead = since.epoch == top.epoch;
            join.lost = Some(if ahead { NotRecovered::Ahead } else { NotRecovered::LogLost });
            return self.join_newest(join, turn);
        }
        let entries: Vec<Entry> = match self.ring().after(since.seq) {
            Some(entries) => entries.cloned().collect(),
            None if since.seq == top.seq => vec![],
            None => return Step::Read(join, Range::After { seq: since.seq, limit: READ_LEN }),
        };
        metrics.resumes.of(ResumeSource::Ring).inc();
        self.enter_since(join, since.seq, &entries, turn)
    }

    /// Answers a join with what was read of the log for it.
    pub(super) fn join_with_page(
        &mut self,
        mut join: Join,
        mut page: Page,
        turn: &mut Turn,
        metrics: &Metrics,
    ) -> Step {
        let Some(top) = self.top().cloned() else { return Step::Wait(join) };
        if page.epoch != top.epoch {
            // The room follows a log that is no more, which it finds out by reading.
            return Step::Wait(join);
        }
        if join.done.is_closed() {
            return Step::Done;
        }
        page.keep_whole();
        let Some(since) = join.since().cloned() else {
            // What was not passed on yet comes live; what was passed on since the page was read is
            // neither in it nor to come.
            page.entries.retain(|entry| entry.position.seq <= top.seq);
            let last = page.entries.last().map_or(page.top, |last| last.position.seq);
            if last < top.seq {
                let Some(since) = self.ring().after(last) else {
                    return self.join_newest(join, turn);
                };
                page.entries.extend(since.cloned());
            }
            let oldest = if page.oldest == 0 { last + 1 } else { page.oldest };
            return self.enter_newest(join, &page.entries, oldest, turn);
        };
        if let Err(reason) = page.continues(&since) {
            join.lost = Some(reason);
            return self.join_newest(join, turn);
        }
        page.entries.retain(|entry| entry.position.seq <= top.seq);
        metrics.resumes.of(ResumeSource::Log).inc();
        self.enter_since(join, since.seq, &page.entries, turn)
    }

    fn join_newest(&mut self, join: Join, turn: &mut Turn) -> Step {
        let count = join.newest();
        let held = self.ring().len();
        if count as usize >= held && !self.ring_is_whole() {
            // One at least, to know whether there are older ones.
            return Step::Read(join, Range::Newest { limit: count.max(1) });
        }
        let entries: Vec<Entry> = self.ring().newest(count as usize).cloned().collect();
        let oldest = self.ring().first().unwrap_or(0);
        self.enter_newest(join, &entries, oldest, turn)
    }

    /// Lets a connection in that goes on behind `given`; `entries` follow that.
    fn enter_since(
        &mut self,
        join: Join,
        mut given: Seq,
        entries: &[Entry],
        turn: &mut Turn,
    ) -> Step {
        let history = history(entries.iter());
        if let Some(last) = history.len().checked_sub(1) {
            given = entries[last].position.seq;
        }
        self.enter(join, given, history, false, turn)
    }

    /// Lets a connection in that goes on from now; the newest of `entries` are shown.
    fn enter_newest(
        &mut self,
        join: Join,
        entries: &[Entry],
        oldest: Seq,
        turn: &mut Turn,
    ) -> Step {
        let count = join.newest() as usize;
        let entries = &entries[entries.len().saturating_sub(count)..];
        let mut history = history(entries.iter().rev());
        history.reverse();
        let top = self.top().map_or(0, |top| top.seq);
        let first = entries.get(entries.len() - history.len()).map_or(top + 1, |e| e.position.seq);
        let more = oldest != 0 && oldest < first;
        self.enter(join, top, history, more, turn)
    }

    fn enter(
        &mut self,
        join: Join,
        given: Seq,
        history: Vec<Box<RawValue>>,
        more: bool,
        turn: &mut Turn,
    ) -> Step {
        let Some(top) = self.top().cloned() else { return Step::Wait(join) };
        let pace = if given == top.seq { Pace::Live } else { Pace::Behind };
        self.send_joined(&join, top, history, more);
        let subscriber = join.subscriber;
        turn.touch(&subscriber);
        // Who has given up meanwhile sends a call behind this one that takes it back.
        let _ = join.done.send(());
        if pace == Pace::Behind {
            subscriber.outbox.lag(self.name.clone());
        }
        self.add(Member::at(subscriber, given, pace));
        Step::Done
    }

    fn send_joined(&self, join: &Join, at: Position, history: Vec<Box<RawValue>>, more: bool) {
        let again = self.is_member(join.subscriber.connection);
        join.subscriber.answer(&Answer::Joined(Box::new(Joined {
            reference: join.reference.clone(),
            room: self.name.clone(),
            epoch: at.epoch,
            seq: at.seq,
            recovered: again || join.since().is_some(),
            reason: join.lost.filter(|_| !again),
            history,
            more,
            durable: true,
        })));
    }
}

/// As many entries, from the first on, as a `joined` or a `history` holds: 256 KiB, or one.
pub fn history<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<Box<RawValue>> {
    let mut bytes = 0;
    entries
        .map(|entry| entry.envelope.json(&entry.position))
        .take_while(|json| {
            let first = bytes == 0;
            bytes += json.len();
            first || bytes <= HISTORY_BYTES_MAX
        })
        .map(|json| RawValue::from_string(json).expect("an envelope holds JSON members"))
        .collect()
}
