//! The shapes of a simulation: the size of the cluster, and its faults.

use std::{ops::RangeInclusive, time::Duration};

use skein_core::bus::Retention;

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimFault {
    /// Redis is killed and comes back with all its data, with none, or without its last steps.
    Restart,
    Empty,
    Truncated,
    /// A replica that lacks the last steps becomes the primary.
    Failover,
    /// A failover after which some gateways keep using the former primary for a while.
    Zombie,
    GatewayKill,
    Freeze,
    /// Connections of a gateway to Redis are closed.
    Cut,
    /// A gateway does not reach Redis for a while.
    Partition,
    /// A connection stays up but transmits nothing for a while.
    BlackHole,
    /// Pub/sub messages to one gateway are dropped, repeated or delayed.
    Mangle,
    /// The clock of Redis' host is moved forward or back.
    Clock,
    ClientCut,
    ClientAway,
    /// A client reads nothing for a while.
    Stall,
    /// A client leaves a room and joins it again.
    Leave,
    /// All gateways stop in order, then Redis does, and everything starts again.
    Planned,
    /// As `Planned`, but Redis is killed after the gateways have left, and loses its last steps.
    PlannedTruncated,
}

use SimFault::{
    BlackHole, ClientAway, ClientCut, Clock, Cut, Empty, Failover, Freeze, GatewayKill, Leave,
    Mangle, Partition, Planned, PlannedTruncated, Restart, Stall, Truncated, Zombie,
};

/// Faults of gateways, links and clients.
const AROUND: [SimFault; 10] =
    [GatewayKill, Freeze, Cut, Partition, BlackHole, Mangle, ClientCut, ClientAway, Stall, Leave];
const ALL: [SimFault; 16] = [
    Restart,
    Empty,
    Truncated,
    Failover,
    Zombie,
    GatewayKill,
    Freeze,
    Cut,
    Partition,
    BlackHole,
    Mangle,
    Clock,
    ClientCut,
    ClientAway,
    Stall,
    Leave,
];
/// Redis fails often, and gateways at the same time.
const HARD: [SimFault; 10] =
    [Empty, Truncated, Failover, Zombie, Zombie, GatewayKill, Freeze, Cut, Partition, ClientAway];

/// Everything is stopped and started; there are no other faults of gateways and Redis.
const PLANNED: [SimFault; 5] = [Planned, ClientCut, ClientAway, Stall, Leave];
/// Everything is stopped and started among many other faults.
const STOPPED: [SimFault; 8] =
    [Planned, Planned, PlannedTruncated, Truncated, Failover, GatewayKill, Freeze, ClientAway];

impl SimFault {
    /// Whether Redis may lose acknowledged messages.
    pub fn loses_data(self) -> bool {
        matches!(self, Empty | Truncated | Failover | Zombie | PlannedTruncated)
    }

    /// Whether another Redis answers afterwards, which gateways were not prepared for.
    pub fn changes_redis(self) -> bool {
        self == Restart || self.loses_data()
    }

    /// Whether a gateway may be missing when Redis comes back.
    pub fn takes_a_gateway(self) -> bool {
        matches!(
            self,
            GatewayKill
                | Freeze
                | Cut
                | Partition
                | BlackHole
                | Mangle
                | Zombie
                | Planned
                | PlannedTruncated
        )
    }
}

/// A shape of a simulation.
#[derive(Clone)]
pub struct SimShape {
    pub name: &'static str,
    pub gateways: RangeInclusive<usize>,
    pub clients: RangeInclusive<usize>,
    pub rooms: usize,
    pub faults: &'static [SimFault],
    pub fault_count: RangeInclusive<usize>,
    /// The mean pause between two messages of all clients together, ms.
    pub pause_ms: f64,
    pub ring_bytes_max: usize,
    /// The sizes of the clients' send queues, one of which is chosen for each: small ones make it
    /// lag.
    pub outbox_bytes: &'static [usize],
    pub partitions: u16,
    pub retention: Retention,
    /// Whether the log is so short that it drops acknowledged messages.
    pub short_log: bool,
}

impl SimShape {
    fn new(
        name: &'static str,
        faults: &'static [SimFault],
        fault_count: RangeInclusive<usize>,
    ) -> Self {
        Self {
            name,
            gateways: 3..=3,
            clients: 3..=5,
            rooms: 2,
            faults,
            fault_count,
            pause_ms: 120.0,
            ring_bytes_max: 64 << 20,
            outbox_bytes: &[1200, 4000, 1 << 20],
            partitions: 4,
            retention: Retention {
                entries_min: 1000,
                window: Duration::from_secs(120),
                bytes_max: 16 << 20,
                memory_bytes_max: 16 << 20,
                ttl: Duration::from_secs(24 * 60 * 60),
                dedup_window: Duration::from_secs(600),
                inboxes: Default::default(),
                limits: Default::default(),
            },
            short_log: false,
        }
    }

    /// Any fault.
    pub fn usual() -> Self {
        Self::new("usual", &ALL, 2..=4)
    }

    /// Rings and logs of a few entries.
    pub fn small() -> Self {
        let usual = Self::usual();
        let retention =
            Retention { entries_min: 24, window: Duration::from_secs(1), ..usual.retention };
        Self {
            name: "small",
            pause_ms: 50.0,
            ring_bytes_max: 1,
            retention,
            short_log: true,
            ..usual
        }
    }

    pub fn pair() -> Self {
        Self { gateways: 2..=2, ..Self::new("pair", &ALL, 2..=4) }
    }

    pub fn hard() -> Self {
        Self::new("hard", &HARD, 2..=5)
    }

    /// Redis keeps its data.
    pub fn calm() -> Self {
        Self::new("calm", &AROUND, 2..=5)
    }

    /// A single fault, of Redis.
    pub fn lone() -> Self {
        Self::new("lone", &[Restart, Empty, Truncated, Failover], 1..=1)
    }

    /// Redis loses data under heavy traffic: covers the moment between an acknowledgement and its
    /// delivery. No client lags, since a ring would be too short for that.
    pub fn abrupt() -> Self {
        let outbox_bytes = &[1 << 20];
        Self { pause_ms: 4.0, outbox_bytes, ..Self::new("abrupt", &[Empty, Truncated], 1..=2) }
    }

    /// As `abrupt`, in many rooms with similar numbers.
    pub fn abrupt_in_rooms() -> Self {
        Self { name: "abrupt in rooms", rooms: 6, ..Self::abrupt() }
    }

    /// Gateways restart while Redis loses data.
    pub fn reborn() -> Self {
        let faults = &[GatewayKill, GatewayKill, Partition, Empty, Truncated, Failover];
        Self::new("reborn", faults, 3..=6)
    }

    /// The whole cluster is stopped in order and started again, without a discontinuity.
    pub fn planned() -> Self {
        Self::new("planned", &PLANNED, 1..=3)
    }

    /// As `planned`, while gateways and Redis fail as well.
    pub fn stopped() -> Self {
        Self::new("stopped", &STOPPED, 2..=5)
    }

    pub fn all() -> [Self; 9] {
        [
            Self::usual(),
            Self::small(),
            Self::pair(),
            Self::hard(),
            Self::calm(),
            Self::lone(),
            Self::reborn(),
            Self::planned(),
            Self::stopped(),
        ]
    }

    /// The shape of a seed: every one in turn.
    pub fn of(seed: u64) -> Self {
        let shapes = Self::all();
        let place = (seed % shapes.len() as u64) as usize;
        shapes[place].clone()
    }
}
