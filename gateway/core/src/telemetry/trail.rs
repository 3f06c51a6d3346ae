//! Trails of the most recent messages on this node: the position of each, and the connections it
//! was delivered to. They explain why a user did not receive a message.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use serde_json::json;
use skein_protocol::{
    ids::{MessageId, RoomId, RoomKind},
    position::Position,
};
use smallvec::SmallVec;
use tokio::time::Instant;

/// Messages whose trails are kept, about 200 bytes each.
const MESSAGES_MAX: usize = 4096;
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
    /// A direct message has a trail in two logs.
    by_id: HashMap<MessageId, SmallVec<[LogTrail; 1]>>,
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
    ) {
        let now = SystemTime::now();
        self.record(log, id, position, |trail| trail.fan_out = Some((now, counts)));
    }

    fn record(
        &self,
        log: &RoomId,
        id: MessageId,
        position: &Position,
        update: impl FnOnce(&mut LogTrail),
    ) {
        let TrailState { order, by_id } = &mut *self.state.lock();
        let trails = by_id.entry(id).or_insert_with(|| {
            order.push_back((Instant::now(), id));
            SmallVec::new()
        });
        match trails.iter().position(|trail| trail.log == *log) {
            Some(at) => update(&mut trails[at]),
            None if trails.len() < LOGS_MAX => {
                let (log, position) = (log.clone(), position.clone());
                let mut trail = LogTrail { log, position, appended: None, fan_out: None };
                update(&mut trail);
                trails.push(trail);
            }
            None => {}
        }
        while order.len() > MESSAGES_MAX
            || order.front().is_some_and(|(since, _)| since.elapsed() > RETENTION)
        {
            if let Some((_, oldest)) = order.pop_front() {
                by_id.remove(&oldest);
            }
        }
    }

    /// Returns the trails of a message, one per log.
    pub fn of(&self, id: MessageId) -> Vec<LogTrail> {
        self.state.lock().by_id.get(&id).map(|trails| trails.to_vec()).unwrap_or_default()
    }
}

impl LogTrail {
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
            FanOutCounts { queued: 2, ..FanOutCounts::default() },
        );
        trails.fanned_out(&ann, id, &position(3), FanOutCounts::default());
        let json: Vec<_> = trails.of(id).iter().map(LogTrail::to_json).collect();
        assert_eq!((json[0]["inbox_of"].as_str(), json[0]["seq"].as_u64()), (Some("ann"), Some(3)));
        assert!(json[0]["appended_at"].is_string() && json[1]["appended_at"].is_null());
        assert_eq!(json[1]["handed_out"]["queued"], 2);
        assert!(trails.of(MessageId::random()).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_trails_are_dropped() {
        let (trails, room) = (MessageTrails::default(), "r".parse().unwrap());
        let first = MessageId::random();
        trails.appended(&room, first, &position(1));
        for seq in 2..MESSAGES_MAX as u64 + 2 {
            trails.appended(&room, MessageId::random(), &position(seq));
        }
        assert!(trails.of(first).is_empty());
        assert_eq!(trails.state.lock().by_id.len(), MESSAGES_MAX);
        tokio::time::advance(RETENTION + Duration::from_secs(1)).await;
        trails.appended(&room, first, &position(1));
        assert_eq!(trails.state.lock().by_id.len(), 1);
    }
}
