//! Options of rooms and of the presence of users.

use std::str::FromStr;

use humantime::Duration;
use skein_core::{bus::room_store::RoomStoreOptions, presence::PresenceOptions, rooms::RoomRules};
use skein_protocol::token::is_room_pattern;

use super::{
    reader::options,
    values::{Bounds, CommaList},
};

options! {
    /// Rooms.
    RoomsSection in "rooms" {
        /// Whether a `join` creates a room that does not exist. `false`: such a `join` fails with
        /// `not_found`.
        create_on_join: bool = "true";
        /// How long a managed room without members is kept.
        empty_ttl: Duration = "24h", within Bounds::usual_times();
        /// Managed rooms per owner. Above it: `limit_reached`. 0: no limit.
        managed_per_owner: usize = "100", within 0..=1_000_000;
        /// Users per room whose read marks are kept. Above it: read marks of further users are
        /// dropped.
        read_marks_max: u32 = "10000", within 1..=10_000_000;
        /// Rooms without a log, by name or prefix, such as `cursors,live:*`: messages are delivered
        /// once and not stored. Must be the same on all nodes.
        ephemeral: CommaList<RoomPattern> = "";
    }
}

options! {
    /// Presence of users.
    PresenceSection in "presence" {
        /// How long a user stays present after their last connection has closed, so that reloading
        /// a page causes no event. At most 1h.
        grace: Duration = "3s", within Bounds::up_to_an_hour();
        /// Members up to which a room gets one event per user who joins or leaves. Above it:
        /// `presence_diff`, at most every 250 ms.
        event_members_max: usize = "100", within 0..=10_000;
        /// Members up to which `presence_diff` names users. Above it: only `count`, since otherwise
        /// every member would receive every name.
        diff_members_max: usize = "1000", within 0..=100_000;
        /// Whether clients may list the users who are connected to the cluster. `false`: only their
        /// number.
        public: bool = "true";
    }
}

impl RoomsSection {
    /// Retention of managed rooms.
    pub(super) fn store(&self) -> RoomStoreOptions {
        RoomStoreOptions { empty_ttl: *self.empty_ttl }
    }

    /// Rules that depend on the name of a room.
    pub(super) fn rules(self) -> RoomRules {
        let ephemeral = self.ephemeral.0.into_iter().map(|RoomPattern(text)| text).collect();
        // The server knows whether the archive can be used.
        RoomRules { ephemeral, create_on_join: self.create_on_join, archived: false }
    }
}

impl PresenceSection {
    /// Options of the presence of users.
    pub(super) fn presence(&self) -> PresenceOptions {
        PresenceOptions {
            grace: *self.grace,
            event_members_max: self.event_members_max,
            diff_members_max: self.diff_members_max,
            public: self.public,
        }
    }
}

/// Name of a room, or a prefix that ends in `*`.
pub(super) struct RoomPattern(String);

impl FromStr for RoomPattern {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !is_room_pattern(text) {
            return Err("is neither the name of a room nor a prefix that ends in `*`");
        }
        Ok(Self(text.to_owned()))
    }
}
