//! Where things lie in Redis: keys, channels, and which of them share a slot of Redis Cluster.
//!
//! Keys carry a partition as hash tag, so that all of a room is in one slot: `gw:{p}:r:<room>:log`,
//! `:meta`, `:ids0`, `:ids1`, `:unheard`, and the channel `gw:{p}:r:<room>`. Who is in it lies beside that
//! ([`ScopeKeys`]), and who is in the cluster in one place for each group. What is of one user lies the
//! same way under `gw:{p}:u:<user>`: the log of the inbox, and sessions. On Redis Cluster each partition is
//! a [placement group](skein_core::bus::placement) with a barrier of its own beside it, since a script may use keys of
//! one slot only; what there is once in all lies with partition 0.

use skein_protocol::ids::{RoomId, RoomKind, UserId};

use skein_core::bus::{
    placement::{crc16, partition_of},
    registry::PresenceScope,
};

/// How many slots a Redis Cluster has.
const SLOTS: u16 = 16_384;

/// Where a room lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keyspace {
    pub(super) partitions: u16,
    /// Whether this is a Redis Cluster, with pub/sub by slots.
    pub(super) sharded: bool,
}

impl Keyspace {
    /// How many groups there are.
    pub(super) fn groups(self) -> u16 {
        if self.sharded { self.partitions } else { 1 }
    }

    pub(super) fn group_of(self, room: &RoomId) -> u16 {
        partition_of(room, self.groups())
    }

    /// The group of what is named by something else than a room.
    pub(super) fn group_of_text(self, text: &str) -> u16 {
        crc16(text.as_bytes()) % self.groups()
    }

    /// The slot of a group.
    pub(super) fn slot_of_group(group: u16) -> u16 {
        crc16(group.to_string().as_bytes()) % SLOTS
    }

    /// Where the nodes agree on a server for a group.
    pub(super) fn barrier(self, group: u16) -> String {
        self.key(group, "barrier")
    }

    /// Who lives.
    pub(super) fn leases(self) -> String {
        self.key(0, "leases")
    }

    /// Where a new process asks the others to renew, so that all have seen it.
    pub(super) fn wake_up_channel(self) -> String {
        self.key(0, "pokes")
    }

    /// Where the number of partitions is recorded.
    pub(super) fn partition_count(self) -> String {
        self.key(0, "partitions")
    }

    /// The channel of one process' probes; of no room.
    pub(super) fn probe(self, group: u16, process: &str) -> String {
        self.key(group, &format!("probe:{process}"))
    }

    pub(super) fn key(self, group: u16, name: &str) -> String {
        if self.sharded { format!("gw:{{{group}}}:{name}") } else { format!("gw:{name}") }
    }

    /// The channel of a room, with which its keys begin. That of a user's status is named so that a
    /// script that changes who is connected knows it: see `presence.lua`.
    pub(super) fn channel(self, room: &RoomId) -> String {
        let (partition, name) = (partition_of(room, self.partitions), room.without_prefix());
        match room.kind() {
            RoomKind::Room => format!("gw:{{{partition}}}:r:{name}"),
            RoomKind::Inbox => format!("gw:{{{partition}}}:u:{name}"),
            RoomKind::Status => format!("{}{name}", self.statuses(self.group_of(room))),
        }
    }

    /// What the channels begin with in which it is told whether users of a group are connected.
    pub(super) fn statuses(self, group: u16) -> String {
        self.key(group, "s:")
    }

    /// What a room's scripts use, in their order: log, meta, both hashes of ids, the barrier of its
    /// group, and what was published and not heard.
    pub(super) fn keys(self, room: &RoomId) -> [String; 6] {
        let channel = self.channel(room);
        let key = |part| format!("{channel}:{part}");
        let barrier = self.barrier(self.group_of(room));
        [key("log"), key("meta"), key("ids0"), key("ids1"), barrier, key("unheard")]
    }

    /// What tells whether the user of an inbox was ever connected: when those who have left did something
    /// last, and who is connected.
    pub(super) fn last_seen_and_online(self, inbox: &RoomId) -> [String; 2] {
        let online = self.online(self.group_of(inbox));
        [format!("{online}:seen"), format!("{online}:who")]
    }

    /// The managed rooms of an owner.
    pub(super) fn owned(self, owner: &UserId) -> String {
        format!("{}:rooms", self.channel(&RoomId::inbox_of(owner)))
    }

    /// The room of a channel: only gateways publish there.
    pub(super) fn room(channel: &str) -> Option<RoomId> {
        let name = channel.strip_prefix("gw:")?;
        let name = match name.strip_prefix('{') {
            Some(tagged) => tagged.split_once("}:")?.1,
            None => name,
        };
        match name.split_once(':')? {
            ("r", room) => room.parse().ok(),
            ("u", user) => Some(RoomId::inbox_of(&user.parse().ok()?)),
            ("s", user) => Some(RoomId::status_of(&user.parse().ok()?)),
            _ => None,
        }
    }

    /// The command that publishes.
    pub(super) fn publish(self) -> &'static str {
        if self.sharded { "SPUBLISH" } else { "PUBLISH" }
    }

    /// A script behind what all of them share. A first line that begins with `#!`, by which a script
    /// says what Redis may let it do, stays the first.
    pub(super) fn script(self, text: &str) -> redis::Script {
        let is_flags = |line: &&str| line.starts_with("#!");
        let flags = text.split_inclusive('\n').next().filter(is_flags).unwrap_or_default();
        let text = &text[flags.len()..];
        // The function that every script is runs within `run` of what they share.
        let shared = include_str!("scripts/prelude.lua");
        let text = format!("{flags}{shared}\nreturn run(function()\n{text}\nend)\n");
        #[cfg(debug_assertions)]
        let text = skein_core::fault_injection::script(text);
        redis::Script::new(&text.replace("'PUBLISH'", &format!("'{}'", self.publish())))
    }
}

/// What a call needs to know of where a place lies.
pub(super) struct ScopeKeys {
    who: String,
    here: String,
    places: String,
    record: String,
    index: String,
    seen: String,
    marks: String,
    meta: String,
    pub(super) channel: String,
    pub(super) name: String,
}

impl Keyspace {
    pub(super) fn group_of_scope(self, place: &PresenceScope, user: &UserId) -> u16 {
        match place {
            PresenceScope::Room(room) => self.group_of(room),
            PresenceScope::Cluster => self.group_of_text(user.as_str()),
        }
    }

    /// The set of places where an incarnation has somebody.
    pub(super) fn scopes(self, group: u16, incarnation: &str) -> String {
        self.key(group, &format!("places:{incarnation}"))
    }

    /// The index of rooms.
    pub(super) fn rooms(self, group: u16) -> String {
        self.key(group, "rooms")
    }

    /// The index of users who are connected.
    pub(super) fn users(self, group: u16) -> String {
        self.key(group, "users")
    }

    /// What keys of who is connected begin with.
    pub(super) fn online(self, group: u16) -> String {
        self.key(group, "online")
    }

    /// What is ordered, and what belongs to that.
    pub(super) fn commands(self, name: &str) -> String {
        self.key(0, &format!("orders{name}"))
    }

    /// Whose incarnations there are.
    pub(super) fn incarnations(self) -> String {
        self.key(0, "incarnations")
    }

    /// Which processes have told all their seats, and under which agreements.
    pub(super) fn announced(self) -> String {
        self.key(0, "told")
    }

    /// What a call at a place uses; `None` where that is no name of a room.
    pub(super) fn keys_of(self, group: u16, place: &str, incarnation: &str) -> Option<ScopeKeys> {
        let (base, index, channel) = if place == CLUSTER {
            (self.online(group), self.users(group), self.statuses(group))
        } else {
            let channel = self.channel(&place.parse().ok()?);
            (channel.clone(), self.rooms(group), channel)
        };
        Some(ScopeKeys {
            who: format!("{base}:who"),
            here: format!("{base}:on:{incarnation}"),
            places: self.scopes(group, incarnation),
            record: format!("{base}:record"),
            index,
            seen: format!("{base}:seen"),
            marks: format!("{base}:marks"),
            meta: format!("{base}:meta"),
            channel,
            name: place.to_owned(),
        })
    }
}

/// The name of the cluster as a place; no room has it.
const CLUSTER: &str = "*";

pub(super) fn scope_name(place: &PresenceScope) -> &str {
    match place {
        PresenceScope::Room(room) => room.as_str(),
        PresenceScope::Cluster => CLUSTER,
    }
}

impl ScopeKeys {
    /// In the order of the scripts; the first [`ScopeKeys::SHARED_COUNT`] are those of presence.lua.
    pub(super) fn all(&self) -> [&str; 8] {
        let Self { who, here, places, record, index, seen, marks, meta, .. } = self;
        [who, here, places, record, index, seen, marks, meta]
    }

    /// How many keys every script of a place has.
    pub(super) const SHARED_COUNT: usize = 6;
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Keyspace = Keyspace { partitions: 256, sharded: false };
    const SHARDED: Keyspace = Keyspace { partitions: 256, sharded: true };

    #[test]
    fn a_channel_names_its_room() {
        let user: UserId = "u:bob|s:".parse().unwrap();
        let mut rooms = vec![RoomId::inbox_of(&user), RoomId::status_of(&user)];
        rooms.extend(["lobby", "a:r:b", "u:bob", ":r:"].map(|name| name.parse().unwrap()));
        for room in rooms {
            for keyspace in [ALONE, SHARDED] {
                let channel = keyspace.channel(&room);
                assert_eq!(Keyspace::room(&channel), Some(room.clone()), "{channel}");
            }
        }
        assert_eq!(Keyspace::room("gw:probe:x"), None);
    }

    #[test]
    fn all_of_a_user_is_in_one_home() {
        let user: UserId = "bob|1".parse().unwrap();
        let group = SHARDED.group_of_scope(&PresenceScope::Cluster, &user);
        let tag = format!("{{{group}}}");
        for room in [RoomId::inbox_of(&user), RoomId::status_of(&user)] {
            assert_eq!(SHARDED.group_of(&room), group);
            assert!(SHARDED.channel(&room).contains(&tag));
        }
    }

    #[test]
    fn all_that_a_script_uses_shares_a_slot() {
        let room: RoomId = "lobby".parse().unwrap();
        let group = SHARDED.group_of(&room);
        let tag = format!("{{{group}}}");
        for key in [SHARDED.channel(&room), SHARDED.barrier(group), SHARDED.probe(group, "x")] {
            assert!(key.contains(&tag), "{key}");
        }
        assert_eq!((ALONE.group_of(&room), ALONE.barrier(0).as_str()), (0, "gw:barrier"));
        assert!(SHARDED.leases().contains("{0}") && SHARDED.wake_up_channel().contains("{0}"));
        // As `CLUSTER KEYSLOT {7}` says.
        assert_eq!(Keyspace::slot_of_group(7), 1716);
    }

    #[test]
    fn faults_can_be_injected_into_every_script() {
        for fault in skein_core::fault_injection::ProtocolFault::ALL {
            skein_core::fault_injection::inject(Some(fault));
            // It panics where the line that a fault replaces is gone.
            ALONE.script("return 1");
            skein_core::fault_injection::inject(None);
        }
    }
}
