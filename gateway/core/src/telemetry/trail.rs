//! What became of each of the last messages on this node: where it was appended, and to how many
//! connections it went. For who asks why somebody did not get one.

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

/// How many messages are remembered, some 200 bytes each.
const MESSAGES_MAX: usize = 4096;
/// In how many logs one is followed: one that goes to many is a trail of the first.
const LOGS_MAX: usize = 8;
/// For how long.
const KEPT_FOR: Duration = Duration::from_secs(600);

/// What this node remembers of messages.
#[derive(Debug, Default)]
pub struct MessageTrails {
    state: Mutex<TrailState>,
}

#[derive(Debug, Default)]
struct TrailState {
    order: VecDeque<(Instant, MessageId)>,
    /// A direct is in two logs.
    by_id: HashMap<MessageId, SmallVec<[LogTrail; 1]>>,
}

/// What became of a message in one log.
#[derive(Clone, Debug)]
pub struct LogTrail {
    /// The room, or an inbox.
    pub log: RoomId,
    /// Where it stands there.
    pub position: Position,
    /// When this node was told that it was appended, where this node had sent it.
    appended: Option<SystemTime>,
    /// What was done with it, once it was passed on to this node.
    fan_out: Option<(SystemTime, FanOutCounts)>,
}

/// To how many connections of this node an entry went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FanOutCounts {
    /// Into whose outboxes it was put.
    pub queued: u32,
    /// Whose outboxes had no room, so that they get it from the log.
    pub lagged: u32,
    /// Who were behind already, and get it from the log.
    pub behind: u32,
    /// Who had sent it and wanted no copy: it got its `ack` in that place.
    pub without_echo: u32,
}

impl MessageTrails {
    /// This node was told that a message it sent was appended.
    pub fn appended(&self, log: &RoomId, id: MessageId, position: &Position) {
        let now = SystemTime::now();
        self.record(log, id, position, |trail| trail.appended = Some(now));
    }

    /// An entry has been handed out.
    pub fn fanned_out(
        &self,
        log: &RoomId,
        id: MessageId,
        position: &Position,
        handed: FanOutCounts,
    ) {
        let now = SystemTime::now();
        self.record(log, id, position, |trail| trail.fan_out = Some((now, handed)));
    }

    fn record(
        &self,
        log: &RoomId,
        id: MessageId,
        position: &Position,
        note: impl FnOnce(&mut LogTrail),
    ) {
        let TrailState { order, by_id } = &mut *self.state.lock();
        let trails = by_id.entry(id).or_insert_with(|| {
            order.push_back((Instant::now(), id));
            SmallVec::new()
        });
        match trails.iter().position(|trail| trail.log == *log) {
            Some(place) => note(&mut trails[place]),
            None if trails.len() < LOGS_MAX => {
                let (log, position) = (log.clone(), position.clone());
                let mut trail = LogTrail { log, position, appended: None, fan_out: None };
                note(&mut trail);
                trails.push(trail);
            }
            None => {}
        }
        while order.len() > MESSAGES_MAX
            || order.front().is_some_and(|(since, _)| since.elapsed() > KEPT_FOR)
        {
            if let Some((_, oldest)) = order.pop_front() {
                by_id.remove(&oldest);
            }
        }
    }

    /// What is remembered of a message.
    pub fn of(&self, id: MessageId) -> Vec<LogTrail> {
        self.state.lock().by_id.get(&id).map(|trails| trails.to_vec()).unwrap_or_default()
    }
}

impl LogTrail {
    /// As the server API tells it.
    pub fn to_json(&self) -> serde_json::Value {
        let log = match self.log.kind() {
            RoomKind::Inbox => "inbox_of",
            RoomKind::Room | RoomKind::Status => "room",
        };
        let mut told = json!({
            log: self.log.without_prefix(),
            "epoch": self.position.epoch,
            "seq": self.position.seq,
            "appended_at": self.appended.map(skein_protocol::timestamp),
        });
        if let Some((at, handed)) = self.fan_out {
            told["handed_out"] = json!({
                "at": skein_protocol::timestamp(at),
                "queued": handed.queued,
                "lagged": handed.lagged,
                "behind": handed.behind,
                "without_echo": handed.without_echo,
            });
        }
        told
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
        let told: Vec<_> = trails.of(id).iter().map(LogTrail::to_json).collect();
        assert_eq!((told[0]["inbox_of"].as_str(), told[0]["seq"].as_u64()), (Some("ann"), Some(3)));
        assert!(told[0]["appended_at"].is_string() && told[1]["appended_at"].is_null());
        assert_eq!(told[1]["handed_out"]["queued"], 2);
        assert!(trails.of(MessageId::random()).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_are_forgotten() {
        let (trails, room) = (MessageTrails::default(), "r".parse().unwrap());
        let first = MessageId::random();
        trails.appended(&room, first, &position(1));
        for seq in 2..MESSAGES_MAX as u64 + 2 {
            trails.appended(&room, MessageId::random(), &position(seq));
        }
        assert!(trails.of(first).is_empty());
        assert_eq!(trails.state.lock().by_id.len(), MESSAGES_MAX);
        tokio::time::advance(KEPT_FOR + Duration::from_secs(1)).await;
        trails.appended(&room, first, &position(1));
        assert_eq!(trails.state.lock().by_id.len(), 1);
    }
}
