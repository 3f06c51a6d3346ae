//! `loadtest connect`: opens connections on a schedule, holds them, sums up.
//!
//! The schedule is open-loop: connection 700 starts when it is due, whatever became of the 699
//! before, as real clients do. Every wait has its end: a connection its timeout, the hold its
//! length, the farewell a few seconds.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::lookup_host,
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    args::ConnectArgs,
    connection::{self, Outcome, Plan},
    process::{self, Cost, CostError},
    report::{Costs, Report, Run, Tally},
};

/// Descriptors for everything that is no connection.
const SPARE_DESCRIPTORS: u64 = 64;
/// How long connections have to say goodbye.
const FAREWELL_WAIT: Duration = Duration::from_secs(5);
/// Outcomes on their way to be counted. Where it is full, connections wait to be counted.
const OUTCOMES_MAX: usize = 1024;

/// Why a run did not begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// There are fewer descriptors than connections.
    #[error(
        "{connections} connections need {needed} open files, and this process may have {have}: \
         raise the limit (`ulimit -Hn`, LimitNOFILE) or ask for fewer"
    )]
    Descriptors { connections: u32, needed: u64, have: u64 },
    /// The limit could not be read or raised.
    #[error("the limit of open files: {0}")]
    Limit(#[source] io::Error),
    /// There are fewer ports than connections.
    #[error(
        "{connections} connections from {addresses} address(es) of {ports} ports each are too \
         many: give more addresses, such as --sources 127.0.0.1-127.0.0.{enough}"
    )]
    Ports { connections: u32, addresses: u32, ports: u32, enough: u32 },
    /// The URL's host has no address.
    #[error("{authority}: {source}")]
    Lookup { authority: String, source: io::Error },
    /// The cost of a server process cannot be read.
    #[error("{0} (is the process there, and is it yours?)")]
    Process(#[from] CostError),
}

/// Runs the command to its report.
pub(crate) async fn run(args: ConnectArgs) -> Result<Report, ConnectError> {
    check_limits(&args)?;
    let address = lookup(&args).await?;
    let plan = Arc::new(Plan { args, address });
    let before = costs(&plan.args)?;
    let own_before = Cost::of(None).ok();
    let mut crowd = Crowd::new(plan);
    crowd.run().await;
    // What cannot be read at the end, because a server died, is reported as what it was.
    let held = costs(&crowd.plan.args).unwrap_or_else(|_| before.clone());
    let own_held = Cost::of(None).ok();
    let opened = crowd.costs_opened.take().unwrap_or_else(|| held.clone());
    let costs = |(index, pid): (usize, &u32)| Costs {
        pid: *pid,
        before: before[index],
        opened: opened[index],
        held: held[index],
    };
    let own = own_before.zip(own_held).map(|(before, held)| Costs {
        pid: std::process::id(),
        before,
        opened: crowd.own_opened.unwrap_or(held),
        held,
    });
    let run = Run {
        asked: crowd.plan.args.connections,
        started: crowd.started,
        opening: crowd.opened_at.unwrap_or_else(Instant::now) - crowd.began_at,
        holding: crowd.opened_at.map(|at| at.elapsed()).unwrap_or_default(),
        interrupted: crowd.interrupted,
        servers: crowd.plan.args.pid.iter().enumerate().map(costs).collect(),
        own,
    };
    let report = Report::new(std::mem::take(&mut crowd.tally), &run);
    crowd.farewell().await;
    Ok(report)
}

fn check_limits(args: &ConnectArgs) -> Result<(), ConnectError> {
    let connections = args.connections;
    let needed = u64::from(connections) + SPARE_DESCRIPTORS;
    let have = rlimit::increase_nofile_limit(needed).map_err(ConnectError::Limit)?;
    if have < needed {
        return Err(ConnectError::Descriptors { connections, needed, have });
    }
    let addresses = args.sources.as_ref().map_or(1, |sources| sources.count());
    let ports = process::local_ports();
    if u64::from(connections) > u64::from(ports) * u64::from(addresses) {
        let enough = connections.div_ceil(ports.max(1));
        return Err(ConnectError::Ports { connections, addresses, ports, enough });
    }
    Ok(())
}

async fn lookup(args: &ConnectArgs) -> Result<SocketAddr, ConnectError> {
    let authority = &args.url.authority;
    let failed = |source| ConnectError::Lookup { authority: authority.clone(), source };
    let mut addresses = lookup_host(authority).await.map_err(failed)?;
    addresses.next().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
}

fn costs(args: &ConnectArgs) -> Result<Vec<Cost>, CostError> {
    args.pid.iter().map(|pid| Cost::of(Some(*pid))).collect()
}

/// The connections: what was started, what became of it.
struct Crowd {
    plan: Arc<Plan>,
    connections: JoinSet<()>,
    outcomes: mpsc::Receiver<Outcome>,
    outcomes_in: mpsc::Sender<Outcome>,
    stop: watch::Sender<bool>,
    tally: Tally,
    started: u32,
    began_at: Instant,
    /// When the last connection had opened or failed.
    opened_at: Option<Instant>,
    costs_opened: Option<Vec<Cost>>,
    own_opened: Option<Cost>,
    interrupted: bool,
}

impl Crowd {
    fn new(plan: Arc<Plan>) -> Self {
        let (outcomes_in, outcomes) = mpsc::channel(OUTCOMES_MAX);
        Self {
            plan,
            connections: JoinSet::new(),
            outcomes,
            outcomes_in,
            stop: watch::Sender::new(false),
            tally: Tally::default(),
            started: 0,
            began_at: Instant::now(),
            opened_at: None,
            costs_opened: None,
            own_opened: None,
            interrupted: false,
        }
    }

    /// Opens and holds, until the hold is over, nothing is left to hold, or somebody presses
    /// Ctrl-C.
    async fn run(&mut self) {
        let mut interrupt = std::pin::pin!(tokio::signal::ctrl_c());
        loop {
            let next = self.next();
            // Every arm is cancel-safe, and no body awaits.
            tokio::select! {
                _ = &mut interrupt => {
                    self.interrupted = true;
                    return;
                }
                Some(outcome) = self.outcomes.recv() => self.tally.add(outcome),
                () = sleep_until(next.unwrap_or(self.began_at)), if next.is_some() => {
                    if self.opened_at.is_some() {
                        return;
                    }
                    self.start_due();
                }
            }
            if self.opened_at.is_none() && self.tally.settled() == self.plan.args.connections {
                self.opened_at = Some(Instant::now());
                self.costs_opened = costs(&self.plan.args).ok();
                self.own_opened = Cost::of(None).ok();
            }
            if self.opened_at.is_some() && self.tally.held() == 0 {
                return;
            }
        }
    }

    /// When the next connection is due, or the hold over.
    fn next(&self) -> Option<Instant> {
        match self.opened_at {
            Some(at) => Some(at + self.plan.args.hold),
            None if self.started < self.plan.args.connections => Some(self.due(self.started)),
            None => None,
        }
    }

    fn due(&self, index: u32) -> Instant {
        self.began_at + self.plan.args.rate.due(index)
    }

    fn start_due(&mut self) {
        let now = Instant::now();
        while self.started < self.plan.args.connections && self.due(self.started) <= now {
            let (plan, index) = (Arc::clone(&self.plan), self.started);
            let (outcomes, stop) = (self.outcomes_in.clone(), self.stop.subscribe());
            let life = connection::live(plan, index, self.due(index), outcomes, stop);
            self.connections.spawn(life);
            self.started += 1;
        }
    }

    /// Closes what is open.
    async fn farewell(mut self) {
        self.stop.send_replace(true);
        self.outcomes.close();
        let all = async { while self.connections.join_next().await.is_some() {} };
        // Those that are still opening are cut off.
        let _ = timeout(FAREWELL_WAIT, all).await;
        self.connections.abort_all();
    }
}

#[cfg(test)]
mod tests;
