//! `loadtest fanout`, `rooms` and `slow`: members of rooms send at a rate, and each counts its
//! deliveries.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use tokio::time::Instant;

use super::{ScenarioError, ScenarioOutput, ScenarioRun, run_scenario};
use crate::{
    args::{ArrivalRate, FanoutArgs, ProcessArgs, RoomsArgs, SlowArgs, TrafficArgs},
    phase::ScenarioPhase,
    report::{Report, StepResult},
    virtual_users::RoomAssignment,
};

/// Time limit for pending messages to be answered, and then to be delivered.
const ARRIVE_MAX: Duration = Duration::from_secs(5);
/// Time limit for stalled readers to catch up.
const CATCH_UP_MAX: Duration = Duration::from_secs(10);
/// Interval at which a condition is checked.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Messages to send.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traffic {
    /// Number of connections that send in turn: the first ones.
    pub(crate) senders: u64,
    /// Messages per second of all senders together.
    pub(crate) rate: ArrivalRate,
    pub(crate) duration: Duration,
    /// Size of a content, bytes.
    pub(crate) bytes: usize,
}

impl Traffic {
    fn of(args: &TrafficArgs, senders: u32) -> Self {
        let TrafficArgs { rate, duration, bytes } = *args;
        Self { senders: senders.into(), rate, duration, bytes }
    }
}

/// Runs `loadtest fanout`.
pub(crate) async fn fanout(args: FanoutArgs) -> Result<Option<Report>, ScenarioError> {
    let (common, process, members) = (args.common.clone(), args.process, args.members);
    let body = move |stop: Arc<AtomicBool>| {
        let run = ScenarioRun::open(
            &args.common,
            process.worker,
            RoomAssignment::RoundRobin(1),
            members,
            true,
            &stop,
        )?;
        run_traffic(run, Traffic::of(&args.traffic, 1))
    };
    run_scenario("fanout", common, process, members, true, body).await
}

/// Runs `loadtest rooms`.
pub(crate) async fn rooms(args: RoomsArgs) -> Result<Option<Report>, ScenarioError> {
    let (common, process, connections) =
        (args.common.clone(), args.process, args.size.connections());
    let body = move |stop: Arc<AtomicBool>| {
        let rooms = RoomAssignment::RoundRobin(args.size.rooms);
        let run = ScenarioRun::open(&args.common, process.worker, rooms, connections, true, &stop)?;
        run_traffic(run, Traffic::of(&args.traffic, connections))
    };
    run_scenario("rooms", common, process, connections, true, body).await
}

fn run_traffic(mut run: ScenarioRun, traffic: Traffic) -> Result<ScenarioOutput, ScenarioError> {
    run.send_traffic(traffic)?;
    run.end(Vec::new())
}

/// Runs `loadtest slow`.
pub(crate) async fn slow(args: SlowArgs) -> Result<Option<Report>, ScenarioError> {
    let (common, connections) = (args.common.clone(), args.size.connections());
    // Members of a room have indices that differ by the number of rooms. The last ones of each room
    // stall, and do not send.
    let silent = (f64::from(args.size.members) * args.stalled_percent / 100.0).round() as u32;
    let readers = args.size.members.saturating_sub(silent.max(1)).max(1) * args.size.rooms;
    let body = move |stop: Arc<AtomicBool>| {
        let rooms = RoomAssignment::RoundRobin(args.size.rooms);
        let mut run = ScenarioRun::open(&args.common, None, rooms, connections, true, &stop)?;
        let own = 0..run.users.plan.local_count() as usize;
        let number = |run: &ScenarioRun, own: usize| run.users.plan.share.global_index(own);
        let stalled: Vec<usize> = own.filter(|own| number(&run, *own) >= readers).collect();
        stalled.iter().for_each(|member| run.users.stall(*member, true));
        run.send_traffic(Traffic::of(&args.traffic, readers))?;
        let steps = run.resume_reading(&stalled)?;
        run.end(steps)
    };
    let report = run_scenario("slow", common, ProcessArgs::SINGLE, connections, true, body).await?;
    Ok(report.map(|mut report| {
        // A server may close a stalled reader; that is no failure.
        report.failures.retain(|failure| !failure.ends_with("connections were held"));
        report.passed = report.failures.is_empty() && report.invalid.is_none();
        report
    }))
}

impl ScenarioRun {
    /// Sends messages, and waits until the acknowledged ones are delivered everywhere.
    pub(crate) fn send_traffic(&mut self, traffic: Traffic) -> Result<(), ScenarioError> {
        self.usage.start();
        let began = Instant::now();
        let end = began + traffic.duration;
        let mut next: u64 = 0;
        loop {
            let now = Instant::now();
            if now >= end || self.users.is_stopped() {
                break;
            }
            let mut due = began + traffic.rate.due(next);
            while due <= now {
                let sender = next % traffic.senders;
                if let Some(member) = self.users.plan.share.local_index(sender as u32) {
                    self.users.send(member, due, traffic.bytes);
                }
                next += 1;
                due = began + traffic.rate.due(next);
            }
            self.users.step(due.min(end))?;
        }
        self.traffic_duration = began.elapsed();
        self.usage.stop();
        let unanswered = |run: &Self| {
            let counters = &run.users.metrics.counters;
            let answered = counters.acknowledged.iter().sum::<u64>() + counters.rejected;
            counters.sent.saturating_sub(answered)
        };
        self.wait(ARRIVE_MAX, |run| unanswered(run) == 0)?;
        self.users.metrics.counters.unanswered = unanswered(self);
        let sum = self.end_phase(ScenarioPhase::Traffic)?;
        let room_of = |run: &Self, member| sum.acknowledged[run.users.plan.room_of(member)];
        self.wait(ARRIVE_MAX, |run| {
            run.users.received().all(|(member, had)| had >= room_of(run, member))
        })?;
        let lost = |(member, had): (usize, u64)| room_of(self, member).saturating_sub(had);
        let lost = self.users.received().map(lost).sum();
        self.users.metrics.counters.lost = lost;
        Ok(())
    }

    /// Waits until a condition is true, at most for `max`.
    fn wait(&mut self, max: Duration, holds: impl Fn(&Self) -> bool) -> Result<(), ScenarioError> {
        let deadline = Instant::now() + max;
        while !holds(self) && Instant::now() < deadline && !self.users.is_stopped() {
            self.users.step(Instant::now() + POLL_INTERVAL)?;
        }
        Ok(())
    }

    /// Lets stalled readers read again, and counts how they end.
    fn resume_reading(&mut self, stalled: &[usize]) -> Result<Vec<StepResult>, ScenarioError> {
        let before = self.users.metrics.counters.signalled_discontinuities;
        for member in stalled {
            self.users.stall(*member, false);
        }
        let last_seqs = self.users.last_seqs();
        let caught_up = |run: &Self, member: usize| {
            run.users.seq(member) >= last_seqs[run.users.plan.room_of(member)]
        };
        let over = |run: &Self, member: usize| !run.users.is_open(member);
        self.wait(CATCH_UP_MAX, |run| {
            stalled.iter().all(|member| over(run, *member) || caught_up(run, *member))
        })?;
        let closed = stalled.iter().filter(|member| over(self, **member)).count();
        let back = stalled.iter().filter(|member| !over(self, **member));
        let back = back.filter(|member| caught_up(self, **member)).count();
        let stuck = stalled.len() - closed - back;
        let signalled = self.users.metrics.counters.signalled_discontinuities - before;
        let step = |name: &str, count: usize, passed| StepResult {
            name: format!("stalled, {name}"),
            result: count.to_string(),
            passed,
        };
        Ok(vec![
            step("all", stalled.len(), !stalled.is_empty()),
            step("closed", closed, true),
            step("caught up", back, true),
            step("with a signalled discontinuity", signalled as usize, true),
            step("neither", stuck, stuck == 0),
        ])
    }
}
