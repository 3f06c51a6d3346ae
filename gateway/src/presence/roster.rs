//! Who is present in a room, as the members of this node were told. Pure.
//!
//! Changes are numbered. One that does not continue what is known has the roster read anew, and what
//! differs is told: members never see a state that their notices do not lead to.

use std::collections::{BTreeMap, BTreeSet};

use shared::{
    ids::{DisplayName, UserId},
    protocol::server_frame::UserInfo,
};

use crate::bus::registry::{PresenceChange, PresenceSnapshot, PresenceVersion};

/// How many changes are held while the roster is read; above it, it is read once more.
const HELD_MAX: usize = 1024;

/// Who is present.
#[derive(Debug, Default)]
pub struct Roster {
    users: BTreeMap<UserId, DisplayName>,
    version: PresenceVersion,
    reading: Reading,
    held: Vec<PresenceChange>,
    /// Whether every node has told who it has.
    settled: bool,
}

/// Whether the roster is being read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Reading {
    /// Not yet, ever.
    #[default]
    Never,
    Yes,
    /// And once more, since what is being read is too old.
    Again,
    No,
}

/// A user who came or left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// Who.
    pub user: UserInfo,
    /// Whether the user came.
    pub joined: bool,
    /// How many are present after it.
    pub count: u64,
    /// The state that it belongs to.
    pub version: PresenceVersion,
}

impl Roster {
    /// How many users are present.
    pub fn len(&self) -> usize {
        self.users.len()
    }

    /// Whether nobody is.
    pub fn is_empty(&self) -> bool {
        self.users.is_empty()
    }

    /// The state that is known.
    pub fn version(&self) -> PresenceVersion {
        self.version
    }

    /// Whether the roster has been read, and every node has told who it has.
    pub fn is_settled(&self) -> bool {
        self.settled
    }

    /// Whether it was read at all.
    pub fn is_known(&self) -> bool {
        !matches!(self.reading, Reading::Never) && self.version != PresenceVersion::default()
            || self.settled
    }

    /// Who is present and comes behind `after`.
    pub fn behind<'a>(
        &'a self,
        after: &str,
    ) -> impl Iterator<Item = (&'a UserId, &'a DisplayName)> {
        use std::ops::Bound::{Excluded, Unbounded};
        self.users.range::<str, _>((Excluded(after), Unbounded))
    }

    /// Whether this state has come to pass here.
    pub fn has_reached(&self, version: PresenceVersion) -> bool {
        self.is_known()
            && (self.version.epoch == version.epoch && self.version.number >= version.number
                || version == PresenceVersion::default())
    }

    /// The roster is to be read. `false`: it is being read, and will be once more.
    #[must_use]
    pub fn begin_read(&mut self) -> bool {
        let begins = matches!(self.reading, Reading::Never | Reading::No);
        self.reading = if begins { Reading::Yes } else { Reading::Again };
        begins
    }

    /// Takes a change that was passed on. Returns what to tell, and whether the roster is to be
    /// read.
    pub fn hear(&mut self, change: PresenceChange) -> (Vec<Move>, bool) {
        let mut moves = Vec::new();
        if !matches!(self.reading, Reading::No) {
            self.hold(change);
            return (moves, self.reading == Reading::Never);
        }
        let PresenceVersion { epoch, number } = change.version;
        let next = self.version.epoch == epoch && number == self.version.number + 1;
        let begins = self.users.is_empty() && number == 1;
        if self.version.epoch == epoch && number <= self.version.number {
            return (moves, false);
        }
        if next || begins {
            self.apply(change, &mut moves);
            return (moves, false);
        }
        self.hold(change);
        (moves, true)
    }

    /// Takes what was read. Returns what to tell, and whether it is to be read again.
    pub fn read(&mut self, snapshot: PresenceSnapshot) -> (Vec<Move>, bool) {
        let mut moves = Vec::new();
        let again = self.reading == Reading::Again;
        self.reading = Reading::No;
        self.version = snapshot.version;
        self.settled = snapshot.complete;
        if snapshot.complete {
            let there: BTreeSet<&UserId> = snapshot.users.iter().map(|user| &user.id).collect();
            let gone = self.users.keys().filter(|user| !there.contains(user));
            for user in gone.cloned().collect::<Vec<_>>() {
                self.remove(&user, &mut moves);
            }
        }
        for user in snapshot.users {
            self.add(user, &mut moves);
        }
        let mut missed = false;
        for change in std::mem::take(&mut self.held) {
            let (more, read) = self.hear(change);
            moves.extend(more);
            missed |= read;
        }
        // What is still ahead, or of another epoch, is in the next read.
        self.held.clear();
        (moves, again || missed)
    }

    fn hold(&mut self, change: PresenceChange) {
        if self.held.len() >= HELD_MAX {
            self.held.clear();
            if self.reading == Reading::Yes {
                self.reading = Reading::Again;
            }
        }
        self.held.push(change);
    }

    fn apply(&mut self, change: PresenceChange, moves: &mut Vec<Move>) {
        self.version = change.version;
        for user in &change.left {
            self.remove(user, moves);
        }
        for user in change.joined {
            self.add(user, moves);
        }
    }

    fn add(&mut self, user: UserInfo, moves: &mut Vec<Move>) {
        if self.users.insert(user.id.clone(), user.name.clone()).is_none() {
            let count = self.users.len() as u64;
            moves.push(Move { user, joined: true, count, version: self.version });
        }
    }

    fn remove(&mut self, user: &UserId, moves: &mut Vec<Move>) {
        if let Some((id, name)) = self.users.remove_entry(user) {
            let (user, count) = (UserInfo { id, name }, self.users.len() as u64);
            moves.push(Move { user, joined: false, count, version: self.version });
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

    fn names(moves: &[Move]) -> Vec<String> {
        let sign = |moved: &Move| if moved.joined { '+' } else { '-' };
        moves.iter().map(|moved| format!("{}{}", sign(moved), moved.user.id)).collect()
    }

    /// A roster that was read.
    fn roster(ids: &[&str]) -> Roster {
        let mut roster = Roster::default();
        assert!(roster.begin_read());
        let (_, again) = roster.read(snapshot(1, 5, ids));
        assert!(!again);
        roster
    }

    #[test]
    fn changes_are_told_once_and_in_their_order() {
        let mut roster = roster(&["ann"]);
        let (moves, read) = roster.hear(joined(1, 6, "bob"));
        assert_eq!((names(&moves), moves[0].count, read), (vec!["+bob".into()], 2, false));
        assert_eq!(roster.hear(joined(1, 6, "bob")), (vec![], false));
        assert_eq!(names(&roster.hear(left(1, 7, "ann")).0), ["-ann"]);
        assert!(roster.has_reached(version(1, 7)) && !roster.has_reached(version(1, 8)));
    }

    #[test]
    fn a_missed_change_has_the_roster_read_and_the_difference_told() {
        let mut roster = roster(&["ann", "bob"]);
        let (moves, read) = roster.hear(joined(1, 8, "dan"));
        assert!(moves.is_empty() && read && roster.begin_read());
        assert_eq!(roster.hear(left(1, 9, "dan")), (vec![], false));
        let (moves, again) = roster.read(snapshot(1, 8, &["ann", "cat", "dan"]));
        assert_eq!(
            (names(&moves), again),
            (vec!["-bob".into(), "+cat".into(), "+dan".into(), "-dan".into()], false)
        );
        assert_eq!(roster.version(), version(1, 9));
    }

    #[test]
    fn what_comes_while_it_is_read_first_is_told_behind_it() {
        let mut roster = Roster::default();
        assert!(!roster.is_known() && roster.begin_read() && !roster.begin_read());
        assert_eq!(roster.hear(joined(1, 6, "bob")), (vec![], false));
        let (moves, again) = roster.read(snapshot(1, 5, &["ann"]));
        assert_eq!((names(&moves), again), (vec!["+ann".into(), "+bob".into()], true));
    }

    #[test]
    fn until_every_node_has_told_nobody_is_taken_for_gone() {
        let mut roster = roster(&["ann", "bob"]);
        assert!(roster.begin_read());
        let partial = PresenceSnapshot { complete: false, ..snapshot(2, 1, &["ann", "cat"]) };
        let (moves, _) = roster.read(partial);
        assert_eq!(names(&moves), ["+cat"]);
        assert!(!roster.is_settled() && roster.begin_read());
        let (moves, _) = roster.read(snapshot(2, 2, &["ann", "cat"]));
        assert_eq!(names(&moves), ["-bob"]);
    }

    #[test]
    fn an_empty_room_begins_anew_without_being_read() {
        let mut roster = roster(&["ann"]);
        assert_eq!(names(&roster.hear(left(1, 6, "ann")).0), ["-ann"]);
        let (moves, read) = roster.hear(joined(2, 1, "bob"));
        assert_eq!((names(&moves), read), (vec!["+bob".into()], false));
        let (_, read) = roster.hear(joined(3, 1, "cat"));
        assert!(read, "another epoch, and somebody is there");
    }
}
