//! Trails of the messages of the last minutes on this node: the position of each, the connections it
//! was delivered to, and those that did not get it at once, with the reason. They explain why a user
//! did not receive a message.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use serde_json::json;
use skein_protocol::{
    ids::{ConnectionId, MessageId, RoomId, RoomKind, UserId},
    position::Position,
};
use smallvec::SmallVec;
use tokio::time::Instant;

/// Bytes of trails that are kept; the oldest are dropped first. A trail of a message takes some 300.
const BYTES_MAX: usize = 16 << 20;
/// Connections per fan-out that are named because they did not get the entry at once.
pub const MISSED_MAX: usize = 16;
/// Logs per message whose trails are kept.
const LOGS_MAX: usize = 8;
/// Time for which trails are kept.
const RETENTION: Duration = Duration::from_secs(600);

/// Trails of the most recent messages.
#[derive(Debug, Default)]
pub struct MessageTrails {
    state: Mutex<TrailState>,
}

#[derive(Debug, Default)]
struct TrailState {
    order: VecDeque<(Instant, MessageId)>,
    bytes: usize,
    /// A direct message has a trail in two logs.
    by_id: HashMap<MessageId, SmallVec<[LogTrail; 1]>>,
}

/// A connection that did not get an entry at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissedDelivery {
    /// Its user.
    pub user: UserId,
    /// The connection.
    pub connection: ConnectionId,
    /// The reason.
    pub reason: MissReason,
}

/// The reason for which a connection did not get an entry at once. It reads the entry from the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissReason {
    /// Its outbox was full.
    OutboxFull,
    /// It was catching up already.
    CatchingUp,
}

impl MissReason {
    fn text(self) -> &'static str {
        match self {
            Self::OutboxFull => {
                "the outbox was full: the client reads too slowly, and gets the entry from the log"
            }
            Self::CatchingUp => "the connection was catching up, and gets the entry from the log",
        }
    }
}

/// Trail of a message in one log.
#[derive(Clone, Debug)]
pub struct LogTrail {
    /// Room or inbox.
    pub log: RoomId,
    /// Position in that log.
    pub position: Position,
    /// Time of the acknowledgement by the bus, if this node published the message.
    appended: Option<SystemTime>,
    /// Time and counts of the fan-out, once this node received the entry.
    fan_out: Option<(SystemTime, FanOutCounts)>,
    /// Connections that did not get the entry then, [`MISSED_MAX`] of them.
    missed: Box<[MissedDelivery]>,
}

/// Number of connections of this node by the way they get an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FanOutCounts {
    /// The entry was placed in the outbox.
    pub queued: u32,
    /// The outbox was full; the connection reads the entry from the log.
    pub lagged: u32,
    /// The connection was catching up already, and reads the entry from the log.
    pub behind: u32,
    /// The sender, which wants no copy: its `ack` takes the place of the entry.
    pub without_echo: u32,
}

impl MessageTrails {
    /// Records the acknowledgement of a message that this node published.
    pub fn appended(&self, log: &RoomId, id: MessageId, position: &Position) {
        let now = SystemTime::now();
        self.record(log, id, position, |trail| trail.appended = Some(now));
    }

    /// Records the fan-out of an entry.
    pub fn fanned_out(
        &self,
        log: &RoomId,
        id: MessageId,
        position: &Position,
        counts: FanOutCounts,
        missed: Vec<MissedDelivery>,
    ) {
        let now = SystemTime::now();
        self.record(log, id, position, |trail| {
            (trail.fan_out, trail.missed) = (Some((now, counts)), missed.into());
        });
    }

    fn record(
        &self,
        log: &RoomId,
        id: MessageId,
        position: &Position,
        update: impl FnOnce(&mut LogTrail),
    ) {
        let TrailState { order, bytes, by_id } = &mut *self.state.lock();
        let trails = by_id.entry(id).or_insert_with(|| {
            order.push_back((Instant::now(), id));
            SmallVec::new()
        });
        match trails.iter().position(|trail| trail.log == *log) {
            Some(at) => {
                let before = trails[at].bytes();
                update(&mut trails[at]);
                *bytes = (*bytes + trails[at].bytes()).saturating_sub(before);
            }
            None if trails.len() < LOGS_MAX => {
                let (log, position) = (log.clone(), position.clone());
                let mut trail = LogTrail {
                    log,
                    position,
                    appended: None,
                    fan_out: None,
                    missed: Box::default(),
                };
                update(&mut trail);
                *bytes += trail.bytes();
                trails.push(trail);
            }
            None => {}
        }
        while *bytes > BYTES_MAX
            || order.front().is_some_and(|(since, _)| since.elapsed() > RETENTION)
        {
            let Some((_, oldest)) = order.pop_front() else { break };
            let dropped = by_id.remove(&oldest).unwrap_or_default();
            *bytes = bytes.saturating_sub(dropped.iter().map(LogTrail::bytes).sum());
        }
    }

    /// Returns the trails of a message, one per log.
    pub fn of(&self, id: MessageId) -> Vec<LogTrail> {
        self.state.lock().by_id.get(&id).map(|trails| trails.to_vec()).unwrap_or_default()
    }
}

impl LogTrail {
    /// The approximate memory of the trail, with its places in the maps.
    fn bytes(&self) -> usize {
        const MAPS: usize = 100;
        let missed =
            self.missed.iter().map(|missed| size_of_val(missed) + missed.user.as_str().len());
        let names = self.log.as_str().len() + self.position.epoch.as_str().len();
        size_of::<Self>() + names + missed.sum::<usize>() + MAPS
    }

    /// Returns the trail as in the server API.
    pub fn to_json(&self) -> serde_json::Value {
        let log = match self.log.kind() {
            RoomKind::Inbox => "inbox_of",
            RoomKind::Room | RoomKind::Status => "room",
        };
        let mut trail = json!({
            log: self.log.without_prefix(),
            "epoch": self.position.epoch,
            "seq": self.position.seq,
            "appended_at": self.appended.map(skein_protocol::timestamp),
        });
        if let Some((at, counts)) = self.fan_out {
            trail["handed_out"] = json!({
                "at": skein_protocol::timestamp(at),
                "queued": counts.queued,
                "lagged": counts.lagged,
                "behind": counts.behind,
                "without_echo": counts.without_echo,
                "missed": self.missed.iter().map(|missed| json!({
                    "user": missed.user,
                    "connection_id": missed.connection,
                    "why": missed.reason.text(),
                })).collect::<Vec<_>>(),
            });
        }
        trail
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(seq: u64) -> Position {
        Position::new("e".parse().unwrap(), seq)
    }

    #[test]
    fn a_message_has_a_trail_in_each_log() {
        let (trails, id) = (MessageTrails::default(), MessageId::random());
        let (ann, bob) = ("ann".parse().unwrap(), "bob".parse().unwrap());
        let (ann, bob) = (RoomId::inbox_of(&ann), RoomId::inbox_of(&bob));
        trails.appended(&ann, id, &position(3));
        trails.fanned_out(
            &bob,
            id,
            &position(7),
            FanOutCounts { queued: 2, lagged: 1, ..FanOutCounts::default() },
            vec![MissedDelivery {
                user: "cat".parse().unwrap(),
                connection: ConnectionId::random(),
                reason: MissReason::OutboxFull,
            }],
        );
        trails.fanned_out(&ann, id, &position(3), FanOutCounts::default(), Vec::new());
        let json: Vec<_> = trails.of(id).iter().map(LogTrail::to_json).collect();
        assert_eq!((json[0]["inbox_of"].as_str(), json[0]["seq"].as_u64()), (Some("ann"), Some(3)));
        assert!(json[0]["appended_at"].is_string() && json[1]["appended_at"].is_null());
        assert_eq!(json[1]["handed_out"]["queued"], 2);
        let missed = &json[1]["handed_out"]["missed"][0];
        assert_eq!(missed["user"], "cat");
        assert!(missed["why"].as_str().unwrap().contains("outbox was full"), "{missed}");
        assert_eq!(json[0]["handed_out"]["missed"].as_array().map(Vec::len), Some(0));
        assert!(trails.of(MessageId::random()).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn trails_are_kept_by_time_within_their_bytes() {
        let (trails, room) = (MessageTrails::default(), "r".parse().unwrap());
        let first = MessageId::random();
        trails.appended(&room, first, &position(1));
        let each = trails.state.lock().bytes;
        let last = BYTES_MAX / each;
        for seq in 2..=last as u64 {
            trails.appended(&room, MessageId::random(), &position(seq));
        }
        assert!(last > 30_000 && !trails.of(first).is_empty(), "{last} messages");
        trails.appended(&room, MessageId::random(), &position(last as u64 + 1));
        assert!(trails.of(first).is_empty());
        assert_eq!(trails.state.lock().by_id.len(), last);
        tokio::time::advance(RETENTION + Duration::from_secs(1)).await;
        trails.appended(&room, first, &position(1));
        let state = trails.state.lock();
        assert_eq!((state.by_id.len(), state.bytes), (1, each));
    }
}
