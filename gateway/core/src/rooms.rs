//! Rules for rooms: durability, creation by a join, and [`passwords`].

use skein_protocol::ids::{RoomId, RoomKind};

pub mod passwords;
mod fair_queue;

/// Rules that apply to rooms by name.
#[derive(Clone, Debug)]
pub struct RoomRules {
    /// Rooms without a log: names, or prefixes that end in `*`.
    pub ephemeral: Vec<String>,
    /// Whether joining a nonexistent room creates it.
    pub create_on_join: bool,
    /// Whether there is an archive, which keeps the entries of logs.
    pub archived: bool,
}

impl Default for RoomRules {
    fn default() -> Self {
        Self { ephemeral: Vec::new(), create_on_join: true, archived: false }
    }
}

impl RoomRules {
    /// Whether a room keeps a log.
    pub fn is_durable(&self, room: &RoomId) -> bool {
        if room.kind() != RoomKind::Room {
            return room.kind() == RoomKind::Inbox;
        }
        let name = room.as_str();
        !self.ephemeral.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => pattern == name,
        })
    }

    /// Whether the archive keeps the entries of a room's log.
    pub fn is_archived(&self, room: &RoomId) -> bool {
        self.archived && room.kind() == RoomKind::Room && self.is_durable(room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ephemeral_patterns_match_names_and_prefixes() {
        let ephemeral = vec!["cursors".to_owned(), "live:*".to_owned()];
        let rules = RoomRules { ephemeral, ..RoomRules::default() };
        let is_durable = |room: &str| rules.is_durable(&room.parse().unwrap());
        assert!(!is_durable("cursors") && !is_durable("live:1"));
        assert!(is_durable("cursors2") && is_durable("live"));
    }
}
