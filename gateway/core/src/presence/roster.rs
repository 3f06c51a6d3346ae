//! The users present in a room, as the members on this node were told. Pure.
//!
//! Changes are numbered. A change that does not continue the known version causes a read of the
//! roster, and the members receive the differences: they never see a state that their events do not
//! lead to.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
};

use skein_protocol::{
    ids::{DisplayName, UserId},
    protocol::server_frame::UserInfo,
};

use crate::bus::presence_store::{PresenceChange, PresenceSnapshot, PresenceVersion};

/// The most changes buffered during a read; above it, the roster is read again.
const BUFFERED_MAX: usize = 1024;

/// The users present in a room.
#[derive(Debug, Default)]
pub struct Roster {
    users: BTreeMap<UserId, DisplayName>,
    version: PresenceVersion,
    reading: RosterRead,
    buffered: Vec<PresenceChange>,
    /// Whether every node has reported its users.
    complete: bool,
}

/// The state of the read of the roster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum RosterRead {
    /// Never read.
    #[default]
    Never,
    InProgress,
    /// A read is under way and must be repeated, since its result will be too old.
    Again,
    Idle,
}

/// A user who joined or left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RosterChange {
    /// The user.
    pub user: UserInfo,
    /// Whether the user joined.
    pub joined: bool,
    /// The number of users afterwards.
    pub count: u64,
    /// The version of the change.
    pub version: PresenceVersion,
}

impl Roster {
    /// The number of users.
    pub fn len(&self) -> usize {
        self.users.len()
    }

    /// Whether the roster is empty.
    pub fn is_empty(&self) -> bool {
        self.users.is_empty()
    }

    /// The known version.
    pub fn version(&self) -> PresenceVersion {
        self.version
    }

    /// Whether the roster was read and every node had reported its users.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether the roster was read.
    pub fn is_known(&self) -> bool {
        !matches!(self.reading, RosterRead::Never) && self.version != PresenceVersion::default()
            || self.complete
    }

    /// The users whose ids follow `after`.
    pub fn after<'a>(&'a self, after: &str) -> impl Iterator<Item = (&'a UserId, &'a DisplayName)> {
        use std::ops::Bound::{Excluded, Unbounded};
        self.users.range::<str, _>((Excluded(after), Unbounded))
    }

    /// Whether the roster has reached `version`.
    pub fn has_reached(&self, version: PresenceVersion) -> bool {
        self.is_known()
            && (self.version.epoch == version.epoch && self.version.number >= version.number
                || version == PresenceVersion::default())
    }

    /// Begins a read. `false`: a read is under way, and will be repeated.
    #[must_use]
    pub fn begin_read(&mut self) -> bool {
        let begins = matches!(self.reading, RosterRead::Never | RosterRead::Idle);
        self.reading = if begins { RosterRead::InProgress } else { RosterRead::Again };
        begins
    }

    /// Applies a published change. Returns the changes to send to members, and whether the roster
    /// must be read.
    pub fn apply(&mut self, change: PresenceChange) -> (Vec<RosterChange>, bool) {
        let mut changes = Vec::new();
        if !matches!(self.reading, RosterRead::Idle) {
            self.buffer(change);
            return (changes, self.reading == RosterRead::Never);
        }
        let PresenceVersion { epoch, number } = change.version;
        let next = self.version.epoch == epoch && number == self.version.number + 1;
        let begins = self.users.is_empty() && number == 1;
        if self.version.epoch == epoch && number <= self.version.number {
            return (changes, false);
        }
        if next || begins {
            self.apply_next(change, &mut changes);
            return (changes, false);
        }
        self.buffer(change);
        (changes, true)
    }

    /// Whether a read shows that the store has lost changes that the roster knows, for example
    /// because a Redis restarted from its file. The numbers of lost changes are used again.
    pub fn has_lost_changes(&self, snapshot: &PresenceSnapshot) -> bool {
        let differs = || {
            let ids = snapshot.users.iter().map(|user| &user.id).collect::<BTreeSet<_>>();
            !ids.into_iter().eq(self.users.keys())
        };
        self.version.epoch == snapshot.version.epoch
            && match self.version.number.cmp(&snapshot.version.number) {
                Ordering::Greater => true,
                Ordering::Equal => snapshot.complete && differs(),
                Ordering::Less => false,
            }
    }

    /// Applies a read. Returns the changes to send to members, and whether the roster must be read
    /// again.
    pub fn apply_snapshot(&mut self, snapshot: PresenceSnapshot) -> (Vec<RosterChange>, bool) {
        let mut changes = Vec::new();
        let again = self.reading == RosterRead::Again;
        self.reading = RosterRead::Idle;
        self.version = snapshot.version;
        self.complete = snapshot.complete;
        if snapshot.complete {
            let there: BTreeSet<&UserId> = snapshot.users.iter().map(|user| &user.id).collect();
            let gone = self.users.keys().filter(|user| !there.contains(user));
            for user in gone.cloned().collect::<Vec<_>>() {
                self.remove(&user, &mut changes);
            }
        }
        for user in snapshot.users {
            self.add(user, &mut changes);
        }
        let mut missed = false;
        for change in std::mem::take(&mut self.buffered) {
            let (more, read) = self.apply(change);
            changes.extend(more);
            missed |= read;
        }
        // Changes still ahead, or of another epoch, are part of the next read.
        self.buffered.clear();
        (changes, again || missed)
    }

    fn buffer(&mut self, change: PresenceChange) {
        if self.buffered.len() >= BUFFERED_MAX {
            self.buffered.clear();
            if self.reading == RosterRead::InProgress {
                self.reading = RosterRead::Again;
            }
        }
        self.buffered.push(change);
    }

    fn apply_next(&mut self, change: PresenceChange, changes: &mut Vec<RosterChange>) {
        self.version = change.version;
        for user in &change.left {
            self.remove(user, changes);
        }
        for user in change.joined {
            self.add(user, changes);
        }
    }

    fn add(&mut self, user: UserInfo, changes: &mut Vec<RosterChange>) {
        if self.users.insert(user.id.clone(), user.name.clone()).is_none() {
            let count = self.users.len() as u64;
            changes.push(RosterChange { user, joined: true, count, version: self.version });
        }
    }

    fn remove(&mut self, user: &UserId, changes: &mut Vec<RosterChange>) {
        if let Some((id, name)) = self.users.remove_entry(user) {
            let (user, count) = (UserInfo { id, name }, self.users.len() as u64);
            changes.push(RosterChange { user, joined: false, count, version: self.version });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn person(id: &str) -> UserInfo {
        UserInfo { id: id.parse().unwrap(), name: id.parse().unwrap() }
    }

    fn version(epoch: u64, number: u64) -> PresenceVersion {
        PresenceVersion { epoch, number }
    }

    fn joined(epoch: u64, number: u64, id: &str) -> PresenceChange {
        PresenceChange { version: version(epoch, number), joined: vec![person(id)], left: vec![] }
    }

    fn left(epoch: u64, number: u64, id: &str) -> PresenceChange {
        let left = vec![id.parse().unwrap()];
        PresenceChange { version: version(epoch, number), joined: vec![], left }
    }

    fn snapshot(epoch: u64, number: u64, ids: &[&str]) -> PresenceSnapshot {
        let users = ids.iter().copied().map(person).collect();
        PresenceSnapshot { version: version(epoch, number), users, complete: true }
    }

    fn names(changes: &[RosterChange]) -> Vec<String> {
        let sign = |change: &RosterChange| if change.joined { '+' } else { '-' };
        changes.iter().map(|change| format!("{}{}", sign(change), change.user.id)).collect()
    }

    /// A roster after one read.
    fn roster(ids: &[&str]) -> Roster {
        let mut roster = Roster::default();
        assert!(roster.begin_read());
        let (_, again) = roster.apply_snapshot(snapshot(1, 5, ids));
        assert!(!again);
        roster
    }

    #[test]
    fn changes_are_reported_once_and_in_order() {
        let mut roster = roster(&["ann"]);
        let (changes, read) = roster.apply(joined(1, 6, "bob"));
        assert_eq!((names(&changes), changes[0].count, read), (vec!["+bob".into()], 2, false));
        assert_eq!(roster.apply(joined(1, 6, "bob")), (vec![], false));
        assert_eq!(names(&roster.apply(left(1, 7, "ann")).0), ["-ann"]);
        assert!(roster.has_reached(version(1, 7)) && !roster.has_reached(version(1, 8)));
    }

    #[test]
    fn missed_change_causes_a_read_and_reports_the_difference() {
        let mut roster = roster(&["ann", "bob"]);
        let (changes, read) = roster.apply(joined(1, 8, "dan"));
        assert!(changes.is_empty() && read && roster.begin_read());
        assert_eq!(roster.apply(left(1, 9, "dan")), (vec![], false));
        let (changes, again) = roster.apply_snapshot(snapshot(1, 8, &["ann", "cat", "dan"]));
        assert_eq!(
            (names(&changes), again),
            (vec!["-bob".into(), "+cat".into(), "+dan".into(), "-dan".into()], false)
        );
        assert_eq!(roster.version(), version(1, 9));
    }

    #[test]
    fn changes_during_the_first_read_are_reported_after_it() {
        let mut roster = Roster::default();
        assert!(!roster.is_known() && roster.begin_read() && !roster.begin_read());
        assert_eq!(roster.apply(joined(1, 6, "bob")), (vec![], false));
        let (changes, again) = roster.apply_snapshot(snapshot(1, 5, &["ann"]));
        assert_eq!((names(&changes), again), (vec!["+ann".into(), "+bob".into()], true));
    }

    #[test]
    fn a_store_that_lost_changes_is_noticed() {
        let roster = roster(&["ann", "bob"]);
        assert!(roster.has_lost_changes(&snapshot(1, 4, &["ann", "bob"])));
        assert!(roster.has_lost_changes(&snapshot(1, 5, &["ann", "cat"])));
        assert!(!roster.has_lost_changes(&snapshot(1, 5, &["ann", "bob"])));
        assert!(!roster.has_lost_changes(&snapshot(1, 6, &["ann"])));
        assert!(!roster.has_lost_changes(&snapshot(2, 1, &["ann"])));
    }

    #[test]
    fn incomplete_read_removes_no_user() {
        let mut roster = roster(&["ann", "bob"]);
        assert!(roster.begin_read());
        let partial = PresenceSnapshot { complete: false, ..snapshot(2, 1, &["ann", "cat"]) };
        let (changes, _) = roster.apply_snapshot(partial);
        assert_eq!(names(&changes), ["+cat"]);
        assert!(!roster.is_complete() && roster.begin_read());
        let (changes, _) = roster.apply_snapshot(snapshot(2, 2, &["ann", "cat"]));
        assert_eq!(names(&changes), ["-bob"]);
    }

    #[test]
    fn empty_room_restarts_without_a_read() {
        let mut roster = roster(&["ann"]);
        assert_eq!(names(&roster.apply(left(1, 6, "ann")).0), ["-ann"]);
        let (changes, read) = roster.apply(joined(2, 1, "bob"));
        assert_eq!((names(&changes), read), (vec!["+bob".into()], false));
        let (_, read) = roster.apply(joined(3, 1, "cat"));
        assert!(read, "another epoch, and the room is not empty");
    }
}
