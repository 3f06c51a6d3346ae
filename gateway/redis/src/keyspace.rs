//! Keys and channels in Redis, and which of them share a slot of a Redis Cluster.
//!
//! Keys carry a partition as hash tag, so that all keys of a room are in one slot:
//! `gw:{p}:r:<room>:log`, `:meta`, `:ids0`, `:ids1`, `:unheard`, and the channel `gw:{p}:r:<room>`.
//! The room's presence has keys beside those ([`ScopeKeys`]), and the cluster's presence has one
//! set of keys per placement group. Keys of one user have the same form under `gw:{p}:u:<user>`:
//! the log of the inbox, and sessions. In a Redis Cluster each partition is a [placement
//! group](skein_core::bus::placement) with a barrier of its own, since a script may use keys of one
//! slot only; keys of the whole cluster are in partition 0.

use skein_protocol::ids::{RoomId, RoomKind, UserId};

use skein_core::bus::{
    placement::{crc16, partition_of},
    presence_store::PresenceScope,
};

/// The number of slots of a Redis Cluster.
const SLOTS: u16 = 16_384;

/// Builds the keys and channels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keyspace {
    pub(super) partitions: u16,
    /// Whether this is a Redis Cluster, with pub/sub per slot.
    pub(super) sharded: bool,
    /// The most entries of a group that wait for the archive; 0 without an archive.
    pub(super) archive_backlog_max: u32,
}

impl Keyspace {
    /// The number of placement groups.
    pub(super) fn groups(self) -> u16 {
        if self.sharded { self.partitions } else { 1 }
    }

    pub(super) fn group_of(self, room: &RoomId) -> u16 {
        partition_of(room, self.groups())
    }

    /// The group of a user or another name that is not a room.
    pub(super) fn group_of_text(self, text: &str) -> u16 {
        crc16(text.as_bytes()) % self.groups()
    }

    /// The slot of a group.
    pub(super) fn slot_of_group(group: u16) -> u16 {
        crc16(group.to_string().as_bytes()) % SLOTS
    }

    /// The barrier, where the nodes agree on a server for a group.
    pub(super) fn barrier(self, group: u16) -> String {
        self.key(group, "barrier")
    }

    /// The leases of all processes.
    pub(super) fn leases(self) -> String {
        self.key(0, "leases")
    }

    /// The channel in which a new process wakes the others up, so that they renew their leases and
    /// have seen it.
    pub(super) fn wake_up_channel(self) -> String {
        self.key(0, "pokes")
    }

    /// The channel of the canaries of all nodes.
    pub(super) fn canary_channel(self) -> String {
        self.key(0, "canary")
    }

    /// The key that records the number of partitions.
    pub(super) fn partition_count(self) -> String {
        self.key(0, "partitions")
    }

    /// The key that records the schema of the stored data.
    pub(super) fn schema(self) -> String {
        self.key(0, "schema")
    }

    /// The channel of one process' probes, which belongs to no room.
    pub(super) fn probe(self, group: u16, process: &str) -> String {
        self.key(group, &format!("probe:{process}"))
    }

    pub(super) fn key(self, group: u16, name: &str) -> String {
        if self.sharded { format!("gw:{{{group}}}:{name}") } else { format!("gw:{name}") }
    }

    /// The channel of a room, with which its keys begin. The channel of a status room has a form
    /// that a script which changes presence can build: see `presence.lua`.
    pub(super) fn channel(self, room: &RoomId) -> String {
        let (partition, name) = (partition_of(room, self.partitions), room.without_prefix());
        match room.kind() {
            RoomKind::Room => format!("gw:{{{partition}}}:r:{name}"),
            RoomKind::Inbox => format!("gw:{{{partition}}}:u:{name}"),
            RoomKind::Status => format!("{}{name}", self.statuses(self.group_of(room))),
        }
    }

    /// The common start of the channels of the status rooms of a group.
    pub(super) fn statuses(self, group: u16) -> String {
        self.key(group, "s:")
    }

    /// The keys of a room's scripts, in their order: log, meta, both hashes of ids, the barrier of
    /// its group, unconfirmed publishes, and the archive stream of its group.
    pub(super) fn keys(self, room: &RoomId) -> [String; 7] {
        let (channel, group) = (self.channel(room), self.group_of(room));
        let key = |part| format!("{channel}:{part}");
        let (barrier, archive) = (self.barrier(group), self.archive(group));
        [key("log"), key("meta"), key("ids0"), key("ids1"), barrier, key("unheard"), archive]
    }

    /// The stream of entries that wait for the archive.
    pub(super) fn archive(self, group: u16) -> String {
        self.key(group, "archive")
    }

    /// The channels of the rooms that have entries for which the archive stream had no space.
    pub(super) fn archive_behind(self, group: u16) -> String {
        self.key(group, "archive:behind")
    }

    /// The keys that tell whether the user of an inbox was ever connected: when offline users were
    /// last active, and the online users.
    pub(super) fn last_seen_and_online(self, inbox: &RoomId) -> [String; 2] {
        let online = self.online(self.group_of(inbox));
        [format!("{online}:seen"), format!("{online}:who")]
    }

    /// The managed rooms of an owner.
    pub(super) fn owned(self, owner: &UserId) -> String {
        format!("{}:rooms", self.channel(&RoomId::inbox_of(owner)))
    }

    /// The room of a channel, which only gateways publish to.
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

    /// A script preceded by the shared prelude. A first line that begins with `#!`, the flags of
    /// the script, stays the first.
    pub(super) fn script(self, text: &str) -> redis::Script {
        let is_flags = |line: &&str| line.starts_with("#!");
        let flags = text.split_inclusive('\n').next().filter(is_flags).unwrap_or_default();
        let text = &text[flags.len()..];
        // The body of every script is a function, which `run` of the prelude calls.
        let shared = include_str!("scripts/prelude.lua");
        let backlog_max = self.archive_backlog_max;
        let text = format!(
            "{flags}local archive_backlog_max = {backlog_max}\n{shared}\nreturn run(function()\n{text}\nend)\n"
        );
        #[cfg(debug_assertions)]
        let text = skein_core::fault_injection::script(text);
        redis::Script::new(&text.replace("'PUBLISH'", &format!("'{}'", self.publish())))
    }
}

/// The keys and names of a scope for one call.
pub(super) struct ScopeKeys {
    present: String,
    own: String,
    scopes: String,
    record: String,
    index: String,
    last_seen: String,
    marks: String,
    meta: String,
    pub(super) channel: String,
    pub(super) name: String,
}

impl Keyspace {
    pub(super) fn group_of_scope(self, scope: &PresenceScope, user: &UserId) -> u16 {
        match scope {
            PresenceScope::Room(room) => self.group_of(room),
            PresenceScope::Cluster => self.group_of_text(user.as_str()),
        }
    }

    /// The scopes in which an incarnation has presence entries.
    pub(super) fn scopes(self, group: u16, incarnation: &str) -> String {
        self.key(group, &format!("places:{incarnation}"))
    }

    /// The index of rooms.
    pub(super) fn rooms(self, group: u16) -> String {
        self.key(group, "rooms")
    }

    /// The index of online users.
    pub(super) fn users(self, group: u16) -> String {
        self.key(group, "users")
    }

    /// The common start of the keys of the cluster's presence.
    pub(super) fn online(self, group: u16) -> String {
        self.key(group, "online")
    }

    /// The queue of control commands, and keys that belong to it.
    pub(super) fn commands(self, name: &str) -> String {
        self.key(0, &format!("orders{name}"))
    }

    /// The announcements of nodes.
    pub(super) fn nodes(self) -> String {
        self.key(0, "nodes")
    }

    /// The incarnations and their processes.
    pub(super) fn incarnations(self) -> String {
        self.key(0, "incarnations")
    }

    /// The processes that have announced all their presence entries, with the agreements they did
    /// so under.
    pub(super) fn announced(self) -> String {
        self.key(0, "told")
    }

    /// The keys of a scope; `None` if `scope` is not a valid name of a room.
    pub(super) fn keys_of(self, group: u16, scope: &str, incarnation: &str) -> Option<ScopeKeys> {
        let (base, index, channel) = if scope == CLUSTER {
            (self.online(group), self.users(group), self.statuses(group))
        } else {
            let channel = self.channel(&scope.parse().ok()?);
            (channel.clone(), self.rooms(group), channel)
        };
        Some(ScopeKeys {
            present: format!("{base}:who"),
            own: format!("{base}:on:{incarnation}"),
            scopes: self.scopes(group, incarnation),
            record: format!("{base}:record"),
            index,
            last_seen: format!("{base}:seen"),
            marks: format!("{base}:marks"),
            meta: format!("{base}:meta"),
            channel,
            name: scope.to_owned(),
        })
    }
}

/// The name of the cluster as a scope; no room has it.
const CLUSTER: &str = "*";

pub(super) fn scope_name(scope: &PresenceScope) -> &str {
    match scope {
        PresenceScope::Room(room) => room.as_str(),
        PresenceScope::Cluster => CLUSTER,
    }
}

impl ScopeKeys {
    /// All keys in the order of the scripts; `presence.lua` uses the first
    /// [`ScopeKeys::SHARED_COUNT`].
    pub(super) fn all(&self) -> [&str; 8] {
        let Self { present, own, scopes, record, index, last_seen, marks, meta, .. } = self;
        [present, own, scopes, record, index, last_seen, marks, meta]
    }

    /// The number of keys that every script of a scope has.
    pub(super) const SHARED_COUNT: usize = 6;
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Keyspace = Keyspace { partitions: 256, sharded: false, archive_backlog_max: 0 };
    const SHARDED: Keyspace = Keyspace { sharded: true, ..ALONE };

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
    fn all_keys_of_a_user_are_in_one_group() {
        let user: UserId = "bob|1".parse().unwrap();
        let group = SHARDED.group_of_scope(&PresenceScope::Cluster, &user);
        let tag = format!("{{{group}}}");
        for room in [RoomId::inbox_of(&user), RoomId::status_of(&user)] {
            assert_eq!(SHARDED.group_of(&room), group);
            assert!(SHARDED.channel(&room).contains(&tag));
        }
    }

    #[test]
    fn all_keys_of_a_script_share_a_slot() {
        let room: RoomId = "lobby".parse().unwrap();
        let group = SHARDED.group_of(&room);
        let tag = format!("{{{group}}}");
        for key in [SHARDED.channel(&room), SHARDED.barrier(group), SHARDED.probe(group, "x")] {
            assert!(key.contains(&tag), "{key}");
        }
        assert_eq!((ALONE.group_of(&room), ALONE.barrier(0).as_str()), (0, "gw:barrier"));
        assert!(SHARDED.leases().contains("{0}") && SHARDED.wake_up_channel().contains("{0}"));
        // As `CLUSTER KEYSLOT {7}` replies.
        assert_eq!(Keyspace::slot_of_group(7), 1716);
    }

    #[test]
    fn faults_can_be_injected_into_every_script() {
        for fault in skein_core::fault_injection::ProtocolFault::ALL {
            skein_core::fault_injection::inject(Some(fault));
            // It panics if the line that a fault replaces is gone.
            ALONE.script("return 1");
            skein_core::fault_injection::inject(None);
        }
    }
}
