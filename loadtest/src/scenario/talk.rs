//! `loadtest fanout`, `rooms` and `slow`: members of rooms talk at a rate, and each counts what
//! arrives.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use tokio::time::Instant;

use super::{Played, ScenarioError, Stage, play};
use crate::{
    args::{FanoutArgs, ProcessArgs, Rate, RoomsArgs, SlowArgs, TalkArgs},
    report::{Report, StepResult},
    virtual_users::{RoomAssignment, workers::ScenarioPhase},
};

/// How long messages under way have to be answered, and to arrive.
const ARRIVE_MAX: Duration = Duration::from_secs(5);
/// How long who did not read has to catch up.
const CATCH_UP_MAX: Duration = Duration::from_secs(10);
/// How often it is looked whether something has come about.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Who talks, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Talk {
    /// How many of the connections send, the first ones, in turn.
    pub(crate) senders: u64,
    /// Messages of all together.
    pub(crate) rate: Rate,
    pub(crate) duration: Duration,
    /// The size of a content.
    pub(crate) bytes: usize,
}

impl Talk {
    fn of(args: &TalkArgs, senders: u32) -> Self {
        let TalkArgs { rate, duration, bytes } = *args;
        Self { senders: senders.into(), rate, duration, bytes }
    }
}

/// One publisher, and a room of members.
pub(crate) async fn fanout(args: FanoutArgs) -> Result<Option<Report>, ScenarioError> {
    let (common, process, members) = (args.common.clone(), args.process, args.members);
    let play_it = move |stop: Arc<AtomicBool>| {
        let stage = Stage::open(
            &args.common,
            process.worker,
            RoomAssignment::RoundRobin(1),
            members,
            true,
            &stop,
        )?;
        all_read(stage, Talk::of(&args.talk, 1))
    };
    play("fanout", common, process, members, true, play_it).await
}

/// Many rooms in which everybody talks.
pub(crate) async fn rooms(args: RoomsArgs) -> Result<Option<Report>, ScenarioError> {
    let (common, process, connections) =
        (args.common.clone(), args.process, args.size.connections());
    let play_it = move |stop: Arc<AtomicBool>| {
        let rooms = RoomAssignment::RoundRobin(args.size.rooms);
        let stage = Stage::open(&args.common, process.worker, rooms, connections, true, &stop)?;
        all_read(stage, Talk::of(&args.talk, connections))
    };
    play("rooms", common, process, connections, true, play_it).await
}

fn all_read(mut stage: Stage, talk: Talk) -> Result<Played, ScenarioError> {
    stage.talk(talk)?;
    stage.end(Vec::new())
}

/// The same, while some do not read.
pub(crate) async fn slow(args: SlowArgs) -> Result<Option<Report>, ScenarioError> {
    let (common, connections) = (args.common.clone(), args.size.connections());
    // Who is in a room are the numbers behind each other by as many as there are rooms: the last
    // of each room do not read, and do not talk.
    let silent = (f64::from(args.size.members) * args.stalled_percent / 100.0).round() as u32;
    let readers = args.size.members.saturating_sub(silent.max(1)).max(1) * args.size.rooms;
    let play_it = move |stop: Arc<AtomicBool>| {
        let rooms = RoomAssignment::RoundRobin(args.size.rooms);
        let mut stage = Stage::open(&args.common, None, rooms, connections, true, &stop)?;
        let own = 0..stage.users.plan.local_count() as usize;
        let number = |stage: &Stage, own: usize| stage.users.plan.share.global_index(own);
        let stalled: Vec<usize> = own.filter(|own| number(&stage, *own) >= readers).collect();
        stalled.iter().for_each(|member| stage.users.stall(*member, true));
        stage.talk(Talk::of(&args.talk, readers))?;
        let steps = stage.read_again(&stalled)?;
        stage.end(steps)
    };
    let report = play("slow", common, ProcessArgs::SINGLE, connections, true, play_it).await?;
    Ok(report.map(|mut report| {
        // That a reader who does not read is closed is no failure of the server.
        report.failures.retain(|failure| !failure.ends_with("connections were held"));
        report.passed = report.failures.is_empty() && report.invalid.is_none();
        report
    }))
}

impl Stage {
    /// Talks, and waits until what was acknowledged has arrived everywhere.
    pub(crate) fn talk(&mut self, talk: Talk) -> Result<(), ScenarioError> {
        self.usage.start();
        let began = Instant::now();
        let end = began + talk.duration;
        let mut next: u64 = 0;
        loop {
            let now = Instant::now();
            if now >= end || self.users.is_stopped() {
                break;
            }
            let mut due = began + talk.rate.due(next);
            while due <= now {
                let sender = next % talk.senders;
                if let Some(member) = self.users.plan.share.local_index(sender as u32) {
                    self.users.send(member, due, talk.bytes);
                }
                next += 1;
                due = began + talk.rate.due(next);
            }
            self.users.step(due.min(end))?;
        }
        self.traffic_duration = began.elapsed();
        self.usage.stop();
        let unanswered = |stage: &Self| {
            let counters = &stage.users.metrics.counters;
            let answered = counters.acknowledged.iter().sum::<u64>() + counters.refused;
            counters.sent.saturating_sub(answered)
        };
        self.wait(ARRIVE_MAX, |stage| unanswered(stage) == 0)?;
        self.users.metrics.counters.unanswered = unanswered(self);
        let sum = self.end_phase(ScenarioPhase::Traffic)?;
        let room_of = |stage: &Self, member| sum.acknowledged[stage.users.plan.room_of(member)];
        self.wait(ARRIVE_MAX, |stage| {
            stage.users.received().all(|(member, had)| had >= room_of(stage, member))
        })?;
        let lost = |(member, had): (usize, u64)| room_of(self, member).saturating_sub(had);
        let lost = self.users.received().map(lost).sum();
        self.users.metrics.counters.lost = lost;
        Ok(())
    }

    /// Waits until something holds, or for as long as it may take.
    fn wait(&mut self, max: Duration, holds: impl Fn(&Self) -> bool) -> Result<(), ScenarioError> {
        let deadline = Instant::now() + max;
        while !holds(self) && Instant::now() < deadline && !self.users.is_stopped() {
            self.users.step(Instant::now() + LOOK_EVERY)?;
        }
        Ok(())
    }

    /// Has those who did not read do so, and tells how far they come.
    fn read_again(&mut self, stalled: &[usize]) -> Result<Vec<StepResult>, ScenarioError> {
        let before = self.users.metrics.counters.signalled_discontinuities;
        for member in stalled {
            self.users.stall(*member, false);
        }
        let tops = self.users.tops();
        let caught_up = |stage: &Self, member: usize| {
            stage.users.seq(member) >= tops[stage.users.plan.room_of(member)]
        };
        let over = |stage: &Self, member: usize| !stage.users.is_open(member);
        self.wait(CATCH_UP_MAX, |stage| {
            stalled.iter().all(|member| over(stage, *member) || caught_up(stage, *member))
        })?;
        let closed = stalled.iter().filter(|member| over(self, **member)).count();
        let back = stalled.iter().filter(|member| !over(self, **member));
        let back = back.filter(|member| caught_up(self, **member)).count();
        let stuck = stalled.len() - closed - back;
        let told = self.users.metrics.counters.signalled_discontinuities - before;
        let step = |name: &str, count: usize, passed| StepResult {
            name: format!("stalled, {name}"),
            result: count.to_string(),
            passed,
        };
        Ok(vec![
            step("all", stalled.len(), !stalled.is_empty()),
            step("closed", closed, true),
            step("caught up", back, true),
            step("signalled a discontinuity", told as usize, true),
            step("neither", stuck, stuck == 0),
        ])
    }
}
