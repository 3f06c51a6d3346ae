//! Rows of the table: workloads and targets.
//!
//! Pure. A new row is one more entry of [`ROWS`].

use super::{
    measure::{BenchTarget, Measure},
    servers::Candidate,
};
use crate::args::RowName;

/// Size of every message's content: a timestamp and padding.
pub(crate) const CONTENT_BYTES: usize = 128;

/// A row.
#[derive(Debug)]
pub(crate) struct BenchRow {
    pub(crate) name: RowName,
    pub(crate) title: &'static str,
    pub(crate) workload: Workload,
    pub(crate) targets: &'static [(Measure, BenchTarget)],
}

/// The workload of a row.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Workload {
    /// Members of rooms send.
    Load(BenchLoad),
    /// Connections open, join, and are silent.
    Connect {
        connections: u32,
        per_second: u32,
        /// Whether they present a token, which is verified.
        token: bool,
    },
    /// One connection sends a message and waits for its echo.
    Echo,
    /// As `Load`; the baseline is the script alone.
    Publish(BenchLoad),
    /// As `Load`; the last node is killed during the load.
    Failover(BenchLoad),
}

/// Rooms, members and the load model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BenchLoad {
    /// Number of gateways; several are connected by Redis.
    pub(crate) nodes: usize,
    pub(crate) rooms: usize,
    /// Members of each room, spread over the nodes.
    pub(crate) members: usize,
    pub(crate) model: LoadModel,
}

/// When messages are sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LoadModel {
    /// As fast as possible: `senders` members of each room have `in_flight` messages pending, and
    /// send the next when they receive their own copy of one.
    ClosedLoop { senders: usize, in_flight: usize },
    /// So many messages a second, of all members in turn, whatever became of earlier ones.
    OpenLoop(u32),
}

/// All rows, in the order of the table.
pub(crate) const ROWS: &[BenchRow] = &[
    BenchRow {
        name: RowName::Fanout,
        title: "fan-out: 1 room of 1,000, saturated (8 senders with 8 messages in flight each)",
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
        title: "100 rooms of 10, all members send, saturated (each has 1 message in flight)",
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
        title: "the same, saturated with 1 message in flight per room",
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
        title: "3 nodes + Redis on one core, 100 rooms of 9, all members send, saturated",
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
        title: "10,000 connections, joined (rooms of 10) and idle",
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
    /// Whether the workload is measured for a candidate.
    pub(crate) fn has(self, candidate: Candidate) -> bool {
        match candidate {
            Candidate::Skein | Candidate::Previous => true,
            // The other candidates have no history to resume from.
            _ if matches!(self, Self::Failover(_)) => false,
            Candidate::Baseline => true,
            // There is no naive counterpart to the script.
            Candidate::Naive => !matches!(self, Self::Publish(_)),
            // With few messages in flight there is little to coalesce.
            Candidate::CoalescingBaseline => {
                matches!(
                    self,
                    Self::Load(BenchLoad { nodes: 1, model: LoadModel::ClosedLoop { .. }, .. })
                )
            }
        }
    }

    /// Whether messages are sent at fixed times.
    pub(crate) fn is_open_loop(self) -> bool {
        matches!(
            self,
            Self::Load(BenchLoad { model: LoadModel::OpenLoop(_), .. }) | Self::Failover(_)
        )
    }

    /// The workload with `by` times fewer connections and messages, for a trial.
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
