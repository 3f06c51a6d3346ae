//! A room that this node is subscribed to: its members and its [`RoomReplica`].
//!
//! A room is open once its log has been read. From then on, up-to-date members receive each entry
//! that the replica delivers. Members that are behind are caught up from the ring or from the log
//! ([`catch_up`](super::catch_up)), and never beyond the replica's top.

use skein_protocol::{
    close::CloseCode,
    ids::{ConnectionId, RoomId, RoomKind, SessionId, UserId},
    position::{Epoch, Position, Seq},
    protocol::server_frame::{JoinedFrame, ReadFrame, RecoveryFailure, ServerFrame},
};

use super::{
    catch_up::{CatchUp, CatchUpOutcome},
    join::{JoinOutcome, JoinProgress, Joins, PendingJoin},
    member::{MemberState, RoomMember, ShardBatch},
    members::Members,
    presence::RoomPresence,
};
use crate::{
    bus::presence_store::{EphemeralEvent, PresenceSnapshot},
    connection::{encoding::SharedFrame, outbox::Close, signals::Signal},
    delivery::{
        Entry, ReplicaSnapshot, ServerId,
        join::{JoinReply, JoinStep},
        ordinal,
        page::LogPage,
        replica::{DeliverySink, NextAction, ReplicaEntryClass, RoomReplica},
    },
    presence::PresenceOptions,
    rooms::RoomRules,
    telemetry::{
        metrics::{EntryResult, JoinResult, LogRepairResult, ResumeSource},
        trail::{FanOutCounts, MISSED_MAX, MissReason, MissedDelivery},
    },
};

/// A room that this node is subscribed to.
#[derive(Debug)]
pub(super) struct Room {
    pub(super) name: RoomId,
    /// The number of this subscription, which tells it from an earlier one, for late results.
    pub(super) subscription: u64,
    pub(super) replica: RoomReplica,
    /// Whether the room keeps a log.
    pub(super) durable: bool,
    /// Whether the archive keeps the entries of its log.
    archived: bool,
    /// The ordinal of the epoch that the last known deletion of the room began.
    deleted: u64,
    pub(super) presence: RoomPresence,
    /// Whether an entry was received since the last comparison of idle rooms.
    received: bool,
    /// Whether the last read followed a log restore.
    restoring: bool,
    pub(super) members: Members,
    pub(super) joins: Joins,
    pub(super) catch_up: CatchUp,
}

/// Delivers to the members what the replica decides.
struct RoomFanOut<'a> {
    name: &'a RoomId,
    members: &'a mut Members,
    batch: &'a mut ShardBatch,
    reset: bool,
}

impl DeliverySink for RoomFanOut<'_> {
    fn classified(&mut self, class: ReplicaEntryClass) {
        let arrival = match class {
            ReplicaEntryClass::Next => EntryResult::Delivered,
            ReplicaEntryClass::Duplicate => EntryResult::Duplicate,
            ReplicaEntryClass::Gap => EntryResult::Gap,
            ReplicaEntryClass::Restarted | ReplicaEntryClass::Diverged => EntryResult::EpochChanged,
        };
        self.batch.metrics.bus_entries_received.of(arrival).inc();
    }

    fn entry(&mut self, entry: &Entry) {
        self.batch.node_state.confirm(entry);
        let mut frame = SharedFrame::live(self.name, entry);
        if let Some(peer) = peer_of_direct(self.name, entry) {
            for member in self.members.iter() {
                member.handle.outbox.signal(Signal::Watch(peer.clone()));
            }
        }
        // An entry without members is read when a room opens, long after its publish perhaps.
        let span = match self.members.is_empty() {
            true => None,
            false => self.batch.begin_fan_out(self.name, entry),
        };
        let mut counts = FanOutCounts::default();
        let silent = entry.envelope.sender_without_echo();
        let mut missed = Vec::new();
        for member in self.members.iter_mut() {
            if member.state != MemberState::Live {
                counts.behind += 1;
                note_missed(&mut missed, member, MissReason::CatchingUp);
            } else if !member.deliver(self.name, entry, &mut frame, self.batch) {
                counts.lagged += 1;
                note_missed(&mut missed, member, MissReason::OutboxFull);
            } else if silent == Some(member.handle.connection) {
                counts.without_echo += 1;
            } else {
                counts.queued += 1;
            }
        }
        self.batch.end_fan_out(self.name, entry, counts, missed, span);
    }

    fn epoch_changed(&mut self, to: &Position) {
        if !self.members.is_empty() {
            tracing::warn!(room = %self.name, %to,
                "the log of a room continues in a new epoch; no entry is lost");
        }
        for member in self.members.iter_mut().filter(|member| member.state == MemberState::Live) {
            member.change_epoch(self.name, to, self.batch);
        }
    }

    fn reset(&mut self, to: &Position, reason: RecoveryFailure) {
        tracing::warn!(room = %self.name, %to, ?reason,
            "the log of a room cannot be continued: its members are reset");
        self.reset = true;
        for member in self.members.iter_mut() {
            member.reset(self.name, to, reason, self.batch);
            // The entries that the member was behind with are obsolete.
            member.state = MemberState::Live;
        }
    }

    fn lost(&mut self, entry: &Entry) {
        self.batch.lost.push((self.name.clone(), entry.envelope.clone()));
    }
}

/// Names a member that does not get an entry at once, unless enough are named.
fn note_missed(missed: &mut Vec<MissedDelivery>, member: &RoomMember, reason: MissReason) {
    if missed.len() < MISSED_MAX
        && let Some(owner) = member.handle.owner()
    {
        let (user, connection) = (owner.user.clone(), member.handle.connection);
        missed.push(MissedDelivery { user, connection, reason });
    }
}

/// The sender of a direct in an inbox. `None` if the inbox's own user sent it, or if the entry is
/// not a direct.
fn peer_of_direct(inbox: &RoomId, entry: &Entry) -> Option<UserId> {
    let (sender, _) = entry.envelope.direct_users()?;
    (inbox.without_prefix() != sender.as_str()).then_some(sender)
}

impl Room {
    pub(super) fn opening(name: RoomId, subscription: u64, rules: &RoomRules) -> Self {
        let mut replica = RoomReplica::default();
        replica.begin_read();
        Self {
            durable: rules.is_durable(&name),
            archived: rules.is_archived(&name),
            name,
            subscription,
            replica,
            deleted: 0,
            presence: RoomPresence::default(),
            received: true,
            restoring: false,
            members: Members::default(),
            joins: Joins::default(),
            catch_up: CatchUp::default(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty() && self.joins.is_empty()
    }

    /// Whether an entry was received since the last call.
    pub(super) fn take_received(&mut self) -> bool {
        std::mem::take(&mut self.received)
    }

    /// Begins a log restore: returns the snapshot to restore from, and whether the last read
    /// followed a log restore too.
    pub(super) fn begin_restore(&mut self, batch: &ShardBatch) -> Option<(ReplicaSnapshot, bool)> {
        let snapshot = self.snapshot(batch)?;
        self.replica.begin_read();
        Some((snapshot, std::mem::replace(&mut self.restoring, true)))
    }

    /// The replica's snapshot, once the room is open.
    pub(super) fn snapshot(&self, batch: &ShardBatch) -> Option<ReplicaSnapshot> {
        self.durable.then_some(())?;
        self.replica.snapshot(&self.name, &batch.retention)
    }

    /// Handles an entry from the bus.
    pub(super) fn receive(&mut self, entry: Entry, batch: &mut ShardBatch) -> NextAction {
        self.received = true;
        let retention = batch.retention;
        let Self { name, members, .. } = self;
        self.replica.receive(
            entry,
            &retention,
            &mut RoomFanOut { name, members, batch, reset: false },
        )
    }

    /// Whether the room was deleted since this node subscribed to it. A deleted inbox is only
    /// emptied: its connections are reset.
    pub(super) fn was_deleted(&self, page: &LogPage) -> bool {
        self.name.kind() == RoomKind::Room
            && self.replica.top().is_some_and(|top| ordinal(&top.epoch) < page.deleted)
    }

    /// Applies a page that was read from the top on, then the entries buffered meanwhile.
    pub(super) fn apply_page(&mut self, page: LogPage, batch: &mut ShardBatch) -> NextAction {
        let retention = batch.retention;
        self.deleted = self.deleted.max(page.deleted);
        let before = self.replica.top().cloned();
        let Self { name, members, .. } = self;
        let mut fan_out = RoomFanOut { name, members, batch, reset: false };
        let next = self.replica.apply_page(page, &retention, &mut fan_out);
        let reset = fan_out.reset;
        let outcome = match (next, reset) {
            (NextAction::Restore, _) => Some(LogRepairResult::Reconciled),
            (_, true) => Some(LogRepairResult::Reset),
            // The room opens, or lacked nothing: a client asked for an unknown position.
            _ if before.is_none() || self.replica.top() == before.as_ref() => None,
            _ => Some(LogRepairResult::Complete),
        };
        if let Some(outcome) = outcome {
            batch.metrics.log_repairs.of(outcome).inc();
        }
        self.restoring &= next == NextAction::Restore;
        next
    }

    /// Catches up a member that is behind, as far as its outbox and the ring allow.
    pub(super) fn catch_up(&mut self, connection: ConnectionId, batch: &mut ShardBatch) {
        let Self { name, replica, members, .. } = self;
        self.catch_up.serve(connection, name, replica, members, batch);
    }

    /// Delivers a page, read from after `from`, to the members that wait for it.
    pub(super) fn catch_up_with_page(
        &mut self,
        from: Seq,
        page: LogPage,
        batch: &mut ShardBatch,
    ) -> CatchUpOutcome {
        let Self { name, replica, members, .. } = self;
        self.catch_up.apply_page(from, page, name, replica, members, batch)
    }

    /// Answers a join from the replica, or returns what it needs first.
    pub(super) fn join(&mut self, mut join: PendingJoin, batch: &mut ShardBatch) -> JoinProgress {
        if join.done.is_closed() || !join.grant.holds(self.deleted) {
            // Dropping the join notifies the session.
            return JoinProgress::Done;
        }
        if let Some(member) = self.members.get(join.handle.connection) {
            self.send_joined(&join, JoinReply::again(member.cursor.clone()));
            batch.flush_later(&join.handle);
            // A caller that has gone is a member nevertheless; it cancels the join itself.
            let _ = join.done.send(JoinOutcome::Member { bytes_read: join.bytes_read });
            return JoinProgress::Done;
        }
        let step = join.plan.next(&self.replica, self.durable);
        self.run_join(join, step, batch)
    }

    /// Answers a join with a page read from the log for it.
    pub(super) fn join_with_page(
        &mut self,
        mut join: PendingJoin,
        page: LogPage,
        batch: &mut ShardBatch,
    ) -> JoinProgress {
        if join.done.is_closed() || !join.grant.holds(self.deleted) {
            return JoinProgress::Done;
        }
        join.bytes_read += page.bytes();
        let step = join.plan.next_with_page(&self.replica, page);
        self.run_join(join, step, batch)
    }

    /// Executes a step of a join.
    fn run_join(
        &mut self,
        join: PendingJoin,
        step: JoinStep,
        batch: &mut ShardBatch,
    ) -> JoinProgress {
        let new = |cursor| RoomMember::new(join.handle.clone(), cursor, MemberState::Live);
        let is_resume = join.plan.is_resume();
        let result = |continues| match (is_resume, continues) {
            (false, _) => JoinResult::New,
            (true, true) => JoinResult::Resumed,
            (true, false) => JoinResult::NotResumed,
        };
        let mut member = match step {
            JoinStep::Read(range) => return JoinProgress::Read(join, range),
            JoinStep::Refresh => {
                self.joins.wait(join);
                return JoinProgress::Refresh;
            }
            JoinStep::Admit(reply) => {
                if let Some(source) = reply.resumed {
                    batch.metrics.resumes.of(source).inc();
                }
                batch.metrics.joins.of(result(reply.lost.is_none())).inc();
                let member = new(reply.cursor.clone());
                self.send_joined(&join, reply);
                member
            }
            JoinStep::AdmitToInbox(cursor, lost) => {
                // Every connection joins the inbox of its user, most of them without a position.
                if is_resume {
                    batch.metrics.joins.of(result(lost.is_none())).inc();
                    if lost.is_none() {
                        batch.metrics.resumes.of(ResumeSource::Ring).inc();
                    }
                }
                let mut member = new(cursor.clone());
                if let Some(reason) = lost {
                    member.reset(&self.name, &cursor, reason, batch);
                }
                member
            }
        };
        member.presence_version = join.grant.snapshot.version;
        if self.replica.top() != Some(&member.cursor) {
            member.state = MemberState::Behind;
            member.handle.outbox.signal(Signal::CatchUp(self.name.clone()));
        }
        batch.flush_later(&member.handle);
        self.members.add(member);
        // A caller that has gone meanwhile sends a later command that cancels the join.
        let _ = join.done.send(JoinOutcome::Member { bytes_read: join.bytes_read });
        JoinProgress::Done
    }

    fn send_joined(&self, join: &PendingJoin, reply: JoinReply) {
        let JoinReply { at, cursor, history, begins, more, resumed, lost } = reply;
        let snapshot = join.grant.snapshot;
        let joined = ServerFrame::Joined(Box::new(JoinedFrame {
            reference: join.reference.clone(),
            room: self.name.clone(),
            epoch: at.epoch,
            seq: at.seq,
            members: self.presence.count_for(snapshot),
            recovered: resumed.is_some(),
            reason: lost,
            history,
            // Numbers begin at 1, and the archive has what the log has forgotten.
            more: more || self.archived && resumed.is_none() && begins > 1,
            read: snapshot.read,
            durable: self.durable,
        }));
        join.handle.send_shared(&mut SharedFrame::of(&joined).moving_to(&self.name, &cursor));
    }

    /// Applies an ephemeral event. Returns whether the roster must be read.
    pub(super) fn apply_event(
        &mut self,
        event: EphemeralEvent,
        options: &PresenceOptions,
        batch: &mut ShardBatch,
    ) -> bool {
        let Self { name, members, presence, .. } = self;
        match event {
            EphemeralEvent::Presence(change) => {
                return presence.apply(change, options, name, members, batch);
            }
            EphemeralEvent::Typing { user, is_typing } => {
                presence.apply_typing(user, is_typing, name, members, batch);
            }
            EphemeralEvent::Read { user, seq, by } => {
                let read = ServerFrame::Read(ReadFrame { room: name.clone(), user, seq });
                members.send(&read, |handle| handle.connection == by, batch);
            }
            // In a room with a log, messages arrive as entries only.
            EphemeralEvent::Message(_) if self.durable => {}
            EphemeralEvent::Message(envelope) => {
                let position = Position::new(Epoch::none(), 0);
                let entry = Entry { position, origin: ServerId::default(), envelope };
                let span = batch.begin_fan_out(name, &entry);
                let mut frame = SharedFrame::live(name, &entry);
                let silent = entry.envelope.sender_without_echo();
                for member in members.iter() {
                    if silent != Some(member.handle.connection) {
                        member.send_ephemeral(&mut frame, batch);
                    }
                }
                batch.fan_out_spans.extend(span);
            }
            EphemeralEvent::Replaced { session, by } => self.close_replaced(session, by),
            // The shard handles these.
            EphemeralEvent::Closed { .. } | EphemeralEvent::Status | EphemeralEvent::LogDeleted => {
            }
        }
        false
    }

    /// Sends the presence changes and typing states that are due.
    pub(super) fn send_due_presence(&mut self, options: &PresenceOptions, batch: &mut ShardBatch) {
        self.presence.send_due(options, &self.name, &self.members, batch);
    }

    /// Applies a roster that was read. Returns whether it must be read again.
    pub(super) fn apply_roster(
        &mut self,
        snapshot: PresenceSnapshot,
        options: &PresenceOptions,
        batch: &mut ShardBatch,
    ) -> bool {
        self.presence.apply_snapshot(snapshot, options, &self.name, &mut self.members, batch)
    }

    /// Closes the connection whose session another connection has taken over.
    fn close_replaced(&self, session: SessionId, by: ConnectionId) {
        for RoomMember { handle, .. } in self.members.iter() {
            let has_it = handle.owner().is_some_and(|owner| owner.session == session);
            if has_it && handle.connection != by {
                let (code, reason) = (CloseCode::SessionReplaced.number(), String::new());
                handle.outbox.close(Close { code, reason });
            }
        }
    }
}
