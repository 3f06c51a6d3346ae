//! The rows of the table: what is measured, and what is wanted of it.
//!
//! Pure. A further row is one more entry of [`ROWS`].

use clap::ValueEnum;

use super::{measure::Measure, servers::Candidate};

/// The name of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RowName {
    /// One room of 1,000, saturated.
    Fanout,
    /// Rooms of 10 in which everybody talks, saturated.
    Rooms,
    /// The same, one message at a time in each room.
    RoomsOne,
    /// The same at 10,000 deliveries a second.
    Paced,
    /// Three nodes and Redis, rooms of 9, 1,000 messages a second.
    Cluster,
    /// The same, saturated.
    ClusterSaturated,
    /// Three nodes and Redis, a room of 30, 100 messages a second.
    ClusterLatency,
    /// Memory of a connection that is joined and silent.
    Idle,
    /// To connect with a token and to join.
    Connect,
    /// The echo endpoint, one message at a time.
    Echo,
    /// Publishes through one Redis, beside the script alone.
    Redis,
    /// One of three nodes is killed.
    Kill,
}

/// A row.
#[derive(Debug)]
pub(crate) struct BenchRow {
    pub(crate) name: RowName,
    pub(crate) title: &'static str,
    pub(crate) workload: Workload,
    pub(crate) targets: &'static [(Measure, BenchTarget)],
}

/// What happens in a row.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Workload {
    /// Members of rooms talk.
    Load(BenchLoad),
    /// So many connections open, join, and are silent.
    Connect {
        connections: u32,
        per_second: u32,
        /// Whether they show a token that is checked.
        token: bool,
    },
    /// One connection says something and waits until it comes back.
    Echo,
    /// As `Load`, and the baseline is the script alone.
    Publish(BenchLoad),
    /// As `Load`, and the last of the nodes is killed meanwhile.
    Failover(BenchLoad),
}

/// Who talks how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BenchLoad {
    /// Gateways; where there are several, Redis is between them.
    pub(crate) nodes: usize,
    pub(crate) rooms: usize,
    /// In each room, spread over the nodes.
    pub(crate) members: usize,
    pub(crate) model: LoadModel,
}

/// How fast.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LoadModel {
    /// As fast as it goes: so many members of each room have so many messages under way, and send
    /// the next when their own copy of one has come.
    ClosedLoop { senders: usize, in_flight: usize },
    /// So many messages a second, of all members in turn, whatever became of earlier ones.
    OpenLoop(u32),
}

/// What a measure should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum BenchTarget {
    Max(f64),
    Min(f64),
    /// So many times the baseline's of the same round.
    MaxTimesBaseline(f64),
    MinTimesBaseline(f64),
}

/// All rows, in the order of the table.
pub(crate) const ROWS: &[BenchRow] = &[
    BenchRow {
        name: RowName::Fanout,
        title: "fan-out: 1 room of 1,000, saturated (8 senders, 8 messages each under way)",
        workload: Workload::Load(BenchLoad {
            nodes: 1,
            rooms: 1,
            members: 1000,
            model: LoadModel::ClosedLoop { senders: 8, in_flight: 8 },
        }),
        targets: &[(Measure::Cpu, BenchTarget::MaxTimesBaseline(0.25))],
    },
    BenchRow {
        name: RowName::Rooms,
        title: "100 rooms of 10, everybody talks, saturated (each member 1 message under way)",
        workload: Workload::Load(BenchLoad {
            nodes: 1,
            rooms: 100,
            members: 10,
            model: LoadModel::ClosedLoop { senders: 10, in_flight: 1 },
        }),
        targets: &[(Measure::Cpu, BenchTarget::MaxTimesBaseline(1.2))],
    },
    BenchRow {
        name: RowName::RoomsOne,
        title: "the same, saturated with 1 message under way in each room",
        workload: Workload::Load(BenchLoad {
            nodes: 1,
            rooms: 100,
            members: 10,
            model: LoadModel::ClosedLoop { senders: 1, in_flight: 1 },
        }),
        targets: &[(Measure::Cpu, BenchTarget::MaxTimesBaseline(1.2))],
    },
    BenchRow {
        name: RowName::Paced,
        title: "100 rooms of 10 at 10,000 deliveries/s",
        workload: Workload::Load(BenchLoad {
            nodes: 1,
            rooms: 100,
            members: 10,
            model: LoadModel::OpenLoop(1000),
        }),
        targets: &[
            (Measure::Cpu, BenchTarget::MaxTimesBaseline(1.15)),
            (Measure::P50, BenchTarget::MaxTimesBaseline(1.1)),
            (Measure::P99, BenchTarget::MaxTimesBaseline(1.3)),
        ],
    },
    BenchRow {
        name: RowName::Cluster,
        title: "3 nodes + Redis, 100 rooms of 9 at 1,000 messages/s",
        workload: Workload::Load(BenchLoad {
            nodes: 3,
            rooms: 100,
            members: 9,
            model: LoadModel::OpenLoop(1000),
        }),
        targets: &[(Measure::Cpu, BenchTarget::Max(45.0))],
    },
    BenchRow {
        name: RowName::ClusterSaturated,
        title: "3 nodes + Redis on one core, 100 rooms of 9, everybody talks, saturated",
        workload: Workload::Load(BenchLoad {
            nodes: 3,
            rooms: 100,
            members: 9,
            model: LoadModel::ClosedLoop { senders: 9, in_flight: 1 },
        }),
        targets: &[(Measure::Deliveries, BenchTarget::Min(60_000.0))],
    },
    BenchRow {
        name: RowName::ClusterLatency,
        title: "3 nodes + Redis, 1 room of 30 at 100 messages/s",
        workload: Workload::Load(BenchLoad {
            nodes: 3,
            rooms: 1,
            members: 30,
            model: LoadModel::OpenLoop(100),
        }),
        targets: &[
            (Measure::P50, BenchTarget::Max(800.0)),
            (Measure::P99, BenchTarget::Max(5_000.0)),
        ],
    },
    BenchRow {
        name: RowName::Idle,
        title: "10,000 connections, joined (rooms of 10) and silent",
        workload: Workload::Connect { connections: 10_000, per_second: 3_000, token: false },
        targets: &[(Measure::Memory, BenchTarget::Max(4.0))],
    },
    BenchRow {
        name: RowName::Connect,
        title: "connect and join (rooms of 10), with a token checked, saturated",
        workload: Workload::Connect { connections: 10_000, per_second: 20_000, token: true },
        targets: &[
            (Measure::CpuPerConnection, BenchTarget::Max(80.0)),
            (Measure::Connections, BenchTarget::Min(8_000.0)),
        ],
    },
    BenchRow {
        name: RowName::Echo,
        title: "echo round trip, 1 connection",
        workload: Workload::Echo,
        targets: &[(Measure::P50, BenchTarget::MaxTimesBaseline(1.2))],
    },
    BenchRow {
        name: RowName::Redis,
        title: "publishes through one Redis, log and dedup on (baseline: the script alone)",
        workload: Workload::Publish(BenchLoad {
            nodes: 3,
            rooms: 99,
            members: 1,
            model: LoadModel::ClosedLoop { senders: 1, in_flight: 8 },
        }),
        targets: &[(Measure::Publishes, BenchTarget::MinTimesBaseline(0.8))],
    },
    BenchRow {
        name: RowName::Kill,
        title: "3 nodes + Redis, 1,500 rooms of 10 at 500 messages/s, one node gets SIGKILL",
        workload: Workload::Failover(BenchLoad {
            nodes: 3,
            rooms: 1500,
            members: 10,
            model: LoadModel::OpenLoop(500),
        }),
        targets: &[
            (Measure::Reconnected, BenchTarget::Max(5_000.0)),
            (Measure::OthersP99Ratio, BenchTarget::Max(2.0)),
        ],
    },
];

impl Workload {
    /// Whether somebody is measured in it.
    pub(crate) fn has(self, candidate: Candidate) -> bool {
        match candidate {
            Candidate::Skein | Candidate::Previous => true,
            // Who comes back there has nothing to go on from.
            _ if matches!(self, Self::Failover(_)) => false,
            Candidate::Baseline => true,
            // A script has no other that does the same.
            Candidate::Naive => !matches!(self, Self::Publish(_)),
            // Where little is under way, little gathers.
            Candidate::CoalescingBaseline => {
                matches!(
                    self,
                    Self::Load(BenchLoad { nodes: 1, model: LoadModel::ClosedLoop { .. }, .. })
                )
            }
        }
    }

    /// Whether messages go out at set times.
    pub(crate) fn is_open_loop(self) -> bool {
        matches!(
            self,
            Self::Load(BenchLoad { model: LoadModel::OpenLoop(_), .. }) | Self::Failover(_)
        )
    }

    /// The same with so many times fewer connections and messages, to try it out.
    pub(crate) fn divided(self, by: u32) -> Self {
        let few = |many: usize| many.div_ceil(by as usize);
        let load = |load: BenchLoad| {
            let rooms = few(load.rooms);
            let members = if load.rooms == 1 { few(load.members) } else { load.members };
            let model = match load.model {
                LoadModel::ClosedLoop { senders, in_flight } => {
                    LoadModel::ClosedLoop { senders: senders.min(members), in_flight }
                }
                LoadModel::OpenLoop(rate) => LoadModel::OpenLoop(rate.div_ceil(by)),
            };
            BenchLoad { rooms, members, model, ..load }
        };
        match self {
            Self::Load(one) => Self::Load(load(one)),
            Self::Publish(one) => Self::Publish(load(one)),
            Self::Failover(one) => Self::Failover(load(one)),
            Self::Connect { connections, per_second, token } => {
                Self::Connect { connections: connections.div_ceil(by), per_second, token }
            }
            Self::Echo => Self::Echo,
        }
    }
}
