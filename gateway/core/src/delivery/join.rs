//! Joins: the position from which a connection continues, and the history that it receives first.
//!
//! A [`JoinPlan`] returns its next step for a replica, or for a page of the log that it asked for.
//! The hub executes the step, and asks again after a read.

use serde_json::value::RawValue;
use skein_protocol::{
    position::{Position, Seq},
    protocol::{HISTORY_BYTES_MAX, client_frame::history_default, server_frame::RecoveryFailure},
};

use super::{
    Entry,
    cursor::{self, Resume},
    page::{LogPage, READ_LEN, ReadRange},
    replica::RoomReplica,
};
use crate::telemetry::metrics::ResumeSource;

/// The most bytes of missed entries in `joined`; the rest follows as entries. A reply cannot
/// overtake a frame that is being written, and at 96 kbit/s this many bytes take 2.7 s.
const RESUMED_BYTES_MAX: usize = 32 * 1024;

/// The position from which a connection continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JoinStart {
    /// From now, with the given number of newest entries as history.
    Newest(u32),
    /// From after a position.
    Since(Position),
    /// As `Since`, for an inbox: everything that follows is delivered as entries, without a
    /// `joined`. If the position cannot be resumed, the connection receives `reset` and continues
    /// after the given number.
    InboxSince {
        /// The position.
        since: Position,
        /// The number to continue after otherwise.
        or: Seq,
        /// Whether the client named the position; if not, the gateway remembered it.
        is_resume: bool,
    },
}

/// A join that has not been answered.
#[derive(Debug)]
pub struct JoinPlan {
    start: JoinStart,
    /// Whether the log was read anew for this join. Another node may have delivered entries that
    /// this node has not received yet, so an unknown position is rejected only after such a read.
    refreshed: bool,
    /// The reason why the connection cannot resume from its position, once known.
    lost: Option<RecoveryFailure>,
}

/// The next step of a join.
#[derive(Debug)]
pub enum JoinStep {
    /// Send `joined`, and deliver the entries after the cursor.
    Admit(JoinReply),
    /// Send no `joined`, but `reset` to the cursor if a reason is given, and deliver the entries
    /// after the cursor.
    AdmitToInbox(Position, Option<RecoveryFailure>),
    /// Read this part of the log, and continue with the page.
    Read(ReadRange),
    /// Read the log from the replica's top, and try again.
    Refresh,
}

/// The content of a `joined` frame, and the cursor after it.
#[derive(Debug)]
pub struct JoinReply {
    /// The position at which the connection joins. If it resumes, the end of what it missed within
    /// the epoch that it knows.
    pub at: Position,
    /// The position up to which it has received everything with this frame.
    pub cursor: Position,
    /// The entries in the frame, oldest first.
    pub history: Vec<Box<RawValue>>,
    /// The number of the first of them, or the one that follows if there are none.
    pub begins: Seq,
    /// Whether the log holds entries before those.
    pub more: bool,
    /// The source of the missed entries, if the connection resumes.
    pub resumed: Option<ResumeSource>,
    /// The reason why it does not resume from the position that it has.
    pub lost: Option<RecoveryFailure>,
}

impl JoinReply {
    /// The answer to a connection that is a member already, and has received everything up to
    /// `cursor`.
    pub fn again(cursor: Position) -> Self {
        let (history, resumed) = (Vec::new(), Some(ResumeSource::Ring));
        let begins = cursor.seq + 1;
        Self { at: cursor.clone(), cursor, history, begins, more: false, resumed, lost: None }
    }
}

impl JoinPlan {
    /// A join that begins.
    pub fn new(start: JoinStart) -> Self {
        Self { start, refreshed: false, lost: None }
    }

    /// Whether the client named a position.
    pub fn is_resume(&self) -> bool {
        match self.start {
            JoinStart::Newest(_) => false,
            JoinStart::Since(_) => true,
            JoinStart::InboxSince { is_resume, .. } => is_resume,
        }
    }

    /// The next step, from the replica of a room. A room that is not `durable` has no log.
    pub fn next(&mut self, replica: &RoomReplica, durable: bool) -> JoinStep {
        let Some(top) = replica.top() else { return JoinStep::Refresh };
        let since = match &self.start {
            JoinStart::InboxSince { since, or, .. } => {
                let (since, or) = (since.clone(), Position::new(top.epoch.clone(), *or));
                return self.next_of_inbox(replica, since, or);
            }
            JoinStart::Since(_) if !durable => {
                return self.give_up(RecoveryFailure::LogLost, replica);
            }
            _ => self.since(),
        };
        let Some(since) = since else { return self.newest(replica) };
        let until = match replica.resume(&since) {
            Resume::Until(until) => until,
            Resume::Unknown(_) if !self.refreshed => return self.refresh(),
            Resume::Unknown(reason) => return self.give_up(reason, replica),
        };
        let entries = match replica.ring().after(since.seq) {
            Some(entries) => cursor::within_epoch(entries, &since, until.seq),
            None if since.seq == top.seq => Some(vec![]),
            None => return JoinStep::Read(ReadRange::After { seq: since.seq, limit: READ_LEN }),
        };
        self.resume(replica, since, until, entries, ResumeSource::Ring)
    }

    /// The next step, from the page that the last step asked for.
    pub fn next_with_page(&mut self, replica: &RoomReplica, mut page: LogPage) -> JoinStep {
        let Some(top) = replica.top() else { return JoinStep::Refresh };
        if !replica.has_epoch_of(&page) {
            // The replica follows a log that no longer exists; the next read will show that.
            return JoinStep::Refresh;
        }
        page.keep_contiguous();
        let since = self.since();
        if since.is_none() && page.entries.last().is_some_and(|last| last.position.seq < page.top) {
            // The newest entry is unreadable, so the entries before it do not reach the top.
            page.entries.clear();
        }
        // Entries that were not delivered yet arrive live.
        page.entries.retain(|entry| entry.position.seq <= top.seq);
        let Some(since) = since else { return self.newest_of_page(replica, page) };
        let Resume::Until(until) = replica.resume(&since) else { return JoinStep::Refresh };
        if let Err(reason) = page.continues(since.seq)
            && since.seq < top.seq
        {
            return self.give_up(reason, replica);
        }
        let entries = cursor::within_epoch(page.entries.iter(), &since, until.seq);
        self.resume(replica, since, until, entries, ResumeSource::Log)
    }

    /// The position to resume from, unless recovery from it has failed.
    fn since(&self) -> Option<Position> {
        match &self.start {
            JoinStart::Since(since) if self.lost.is_none() => Some(since.clone()),
            _ => None,
        }
    }

    /// The number of newest entries to show if the join does not resume.
    fn count(&self) -> u32 {
        match self.start {
            JoinStart::Newest(count) => count,
            JoinStart::Since(_) | JoinStart::InboxSince { .. } => history_default(),
        }
    }

    /// Tries again after a read of the log for this join.
    fn refresh(&mut self) -> JoinStep {
        self.refreshed = true;
        JoinStep::Refresh
    }

    /// Continues from now, since recovery has failed.
    fn give_up(&mut self, reason: RecoveryFailure, replica: &RoomReplica) -> JoinStep {
        self.lost = Some(reason);
        self.newest(replica)
    }

    /// Everything after `since` follows as entries, or after `or` if `since` cannot be resumed.
    fn next_of_inbox(&mut self, replica: &RoomReplica, since: Position, or: Position) -> JoinStep {
        let lost = match replica.resume(&since) {
            Resume::Until(_) => return JoinStep::AdmitToInbox(since, None),
            Resume::Unknown(_) if !self.refreshed => return self.refresh(),
            Resume::Unknown(RecoveryFailure::LogTrimmed) => RecoveryFailure::LogTrimmed,
            Resume::Unknown(_) => RecoveryFailure::LogLost,
        };
        let top = replica.top().map_or(0, |top| top.seq);
        JoinStep::AdmitToInbox(Position::new(or.epoch, or.seq.min(top)), Some(lost))
    }

    /// Resumes after `since`, up to `until` within the epoch that the connection knows. `entries`
    /// are the first of the entries that it missed; `None` if they belong to another epoch.
    fn resume(
        &mut self,
        replica: &RoomReplica,
        since: Position,
        until: Position,
        entries: Option<Vec<Entry>>,
        source: ResumeSource,
    ) -> JoinStep {
        let Some(entries) = entries else {
            return self.give_up(RecoveryFailure::LogLost, replica);
        };
        let history = history_within(RESUMED_BYTES_MAX, entries.iter());
        let last = history.len().checked_sub(1).and_then(|last| entries.get(last));
        let begins = since.seq + 1;
        let cursor = last.map_or(since, |last| last.position.clone());
        let (more, resumed, lost) = (false, Some(source), None);
        JoinStep::Admit(JoinReply { at: until, cursor, history, begins, more, resumed, lost })
    }

    /// Continues from now, with the newest entries of the ring as history, or of the log if the
    /// ring holds too few.
    fn newest(&self, replica: &RoomReplica) -> JoinStep {
        let (count, ring) = (self.count(), replica.ring());
        if count as usize >= ring.len() && !replica.ring_is_complete() {
            // At least one, to find out whether older entries exist.
            return JoinStep::Read(ReadRange::Newest { limit: count.max(1) });
        }
        let entries: Vec<Entry> = ring.newest(count as usize).cloned().collect();
        self.admit_newest(replica, &entries, ring.first().unwrap_or(0))
    }

    /// Continues from now, with the entries of a page of the newest entries as history.
    fn newest_of_page(&mut self, replica: &RoomReplica, mut page: LogPage) -> JoinStep {
        let top = replica.top().map_or(0, |top| top.seq);
        if page.top < top {
            // Entries delivered since the page was read are in neither the page nor the live
            // stream.
            match replica.ring().after(page.top) {
                Some(since) => page.entries.extend(since.cloned()),
                None if !self.refreshed => {
                    self.refreshed = true;
                    return self.newest(replica);
                }
                // Twice in a row: the log ends below the replica's top. Comparing the two is not
                // the task of a join.
                None => page.entries.clear(),
            }
        }
        let oldest = if page.oldest == 0 { page.top.min(top) + 1 } else { page.oldest };
        self.admit_newest(replica, &page.entries, oldest)
    }

    /// Continues from now, with the newest of `entries` as history. `oldest` is the number of the
    /// oldest entry of the log.
    fn admit_newest(&self, replica: &RoomReplica, entries: &[Entry], oldest: Seq) -> JoinStep {
        let Some(top) = replica.top().cloned() else { return JoinStep::Refresh };
        let entries = &entries[entries.len().saturating_sub(self.count() as usize)..];
        let mut history = history(entries.iter().rev());
        history.reverse();
        let shown = entries.get(entries.len() - history.len());
        let first = shown.map_or(top.seq + 1, |entry| entry.position.seq);
        let more = oldest != 0 && oldest < first;
        let (cursor, resumed, lost) = (top.clone(), None, self.lost);
        let begins = first;
        JoinStep::Admit(JoinReply { at: top, cursor, history, begins, more, resumed, lost })
    }
}

/// The first entries that fit into a `joined` or `history` frame: 256 KiB, or one entry.
pub fn history<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<Box<RawValue>> {
    history_within(HISTORY_BYTES_MAX, entries)
}

/// As [`history`], with a given number of bytes.
fn history_within<'a>(
    bytes_max: usize,
    entries: impl Iterator<Item = &'a Entry>,
) -> Vec<Box<RawValue>> {
    let mut bytes = 0;
    entries
        .map(|entry| entry.envelope.to_json(&entry.position))
        .take_while(|json| {
            let first = bytes == 0;
            bytes += json.len();
            first || bytes <= bytes_max
        })
        .map(|json| RawValue::from_string(json).expect("an envelope holds JSON"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{super::samples::*, *};

    fn seqs(reply: &JoinReply) -> Vec<Seq> {
        let json = reply.history.iter().map(|json| serde_json::from_str(json.get()).unwrap());
        json.map(|json: serde_json::Value| json["seq"].as_u64().unwrap()).collect()
    }

    fn admitted(step: JoinStep) -> JoinReply {
        match step {
            JoinStep::Admit(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    fn since(epoch: &str, seq: Seq) -> JoinPlan {
        JoinPlan::new(JoinStart::Since(position(epoch, seq)))
    }

    #[test]
    fn newest_entries_come_from_the_ring() {
        let replica = replica("1-e", 1..=9);
        let joined = admitted(JoinPlan::new(JoinStart::Newest(3)).next(&replica, true));
        assert_eq!((seqs(&joined), joined.more), (vec![7, 8, 9], true));
        assert_eq!((&joined.at, &joined.cursor), (&position("1-e", 9), &position("1-e", 9)));
        let joined = admitted(JoinPlan::new(JoinStart::Newest(50)).next(&replica, true));
        assert_eq!((joined.history.len(), joined.more), (9, false));
        assert!(joined.resumed.is_none() && joined.lost.is_none());
    }

    #[test]
    fn entries_since_the_read_complete_its_page() {
        let mut replica = replica("1-e", 5..=7);
        let mut plan = JoinPlan::new(JoinStart::Newest(5));
        let step = plan.next(&replica, true);
        assert!(matches!(step, JoinStep::Read(ReadRange::Newest { limit: 5 })), "{step:?}");
        let _ = replica.receive(entry("1-e", 8), &retention(), &mut Ignored);
        let joined = admitted(plan.next_with_page(&replica, page("1-e", 3..=7, 7)));
        assert_eq!((seqs(&joined), joined.more), (vec![4, 5, 6, 7, 8], true));
        assert_eq!(joined.cursor, position("1-e", 8));
    }

    #[test]
    fn page_above_the_replica_shows_delivered_entries_only() {
        let replica = replica("1-e", 5..=7);
        let mut plan = JoinPlan::new(JoinStart::Newest(5));
        assert!(matches!(plan.next(&replica, true), JoinStep::Read(_)));
        let joined = admitted(plan.next_with_page(&replica, page("1-e", 5..=9, 9)));
        assert_eq!((seqs(&joined), joined.cursor), (vec![5, 6, 7], position("1-e", 7)));
    }

    #[test]
    fn resume_takes_missed_entries_from_the_ring_or_the_log() {
        let replica = replica("1-e", 5..=9);
        let joined = admitted(since("1-e", 6).next(&replica, true));
        assert_eq!((seqs(&joined), joined.resumed), (vec![7, 8, 9], Some(ResumeSource::Ring)));
        let joined = admitted(since("1-e", 9).next(&replica, true));
        assert_eq!((seqs(&joined), joined.cursor), (vec![], position("1-e", 9)));
        let mut plan = since("1-e", 2);
        let step = plan.next(&replica, true);
        assert!(matches!(step, JoinStep::Read(ReadRange::After { seq: 2, .. })), "{step:?}");
        let joined = admitted(plan.next_with_page(&replica, page("1-e", 3..=6, 9)));
        assert_eq!((seqs(&joined), joined.resumed), (vec![3, 4, 5, 6], Some(ResumeSource::Log)));
        assert_eq!((joined.at, joined.cursor), (position("1-e", 9), position("1-e", 6)));
    }

    #[test]
    fn resume_from_a_trimmed_log_continues_from_now() {
        let replica = replica("1-e", 5..=9);
        let mut plan = since("1-e", 2);
        assert!(matches!(plan.next(&replica, true), JoinStep::Read(_)));
        let step = plan.next_with_page(&replica, page("1-e", 4..=9, 9));
        assert!(matches!(step, JoinStep::Read(ReadRange::Newest { .. })), "{step:?}");
        let joined = admitted(plan.next_with_page(&replica, page("1-e", 4..=9, 9)));
        assert_eq!((joined.resumed, joined.lost), (None, Some(RecoveryFailure::LogTrimmed)));
        assert_eq!(joined.cursor, position("1-e", 9));
    }

    #[test]
    fn unknown_position_is_rejected_after_one_refresh() {
        let mut replica = replica("1-e", 1..=9);
        for (epoch, seq, reason) in
            [("1-e", 12, RecoveryFailure::Ahead), ("2-f", 3, RecoveryFailure::LogLost)]
        {
            let mut plan = since(epoch, seq);
            assert!(matches!(plan.next(&replica, true), JoinStep::Refresh));
            let joined = admitted(plan.next(&replica, true));
            assert_eq!((joined.resumed, joined.lost), (None, Some(reason)));
        }
        let mut plan = since("1-e", 10);
        assert!(matches!(plan.next(&replica, true), JoinStep::Refresh));
        let _ = replica.receive(entry("1-e", 10), &retention(), &mut Ignored);
        assert!(admitted(plan.next(&replica, true)).resumed.is_some());
    }

    #[test]
    fn page_of_another_epoch_waits_for_a_refresh() {
        let replica = replica("1-e", 5..=9);
        let mut plan = since("1-e", 2);
        assert!(matches!(plan.next(&replica, true), JoinStep::Read(_)));
        let step = plan.next_with_page(&replica, page("2-f", 3..=9, 9));
        assert!(matches!(step, JoinStep::Refresh), "{step:?}");
    }

    #[test]
    fn large_missed_entries_follow_joined() {
        let mut replica = RoomReplica::default();
        let mut page = page("1-e", 1..=9, 9);
        for entry in &mut page.entries {
            let fields = format!(r#""room":"r","content":"{}""#, "x".repeat(10_000));
            entry.envelope = with_fields(entry.position.seq, &fields);
        }
        let _ = replica.apply_page(page, &retention(), &mut Ignored);
        let joined = admitted(since("1-e", 2).next(&replica, true));
        assert_eq!((seqs(&joined), &joined.cursor), (vec![3, 4, 5], &position("1-e", 5)));
        assert_eq!(joined.at, position("1-e", 9));
    }

    #[test]
    fn inbox_continues_without_joined_or_is_reset() {
        let replica = replica("1-e", 1..=9);
        let inbox =
            |at, or| JoinPlan::new(JoinStart::InboxSince { since: at, or, is_resume: true });
        let step = inbox(position("1-e", 4), 9).next(&replica, true);
        let JoinStep::AdmitToInbox(cursor, None) = step else { panic!("{step:?}") };
        assert_eq!(cursor, position("1-e", 4));
        for (or, seq) in [(3, 3), (20, 9)] {
            let mut plan = inbox(position("1-e", 12), or);
            assert!(matches!(plan.next(&replica, true), JoinStep::Refresh));
            let step = plan.next(&replica, true);
            let JoinStep::AdmitToInbox(cursor, Some(RecoveryFailure::LogLost)) = step else {
                panic!("{step:?}")
            };
            assert_eq!(cursor, position("1-e", seq));
        }
    }

    #[test]
    fn room_without_a_log_resumes_nothing() {
        let mut replica = RoomReplica::default();
        let _ = replica.apply_page(LogPage::without_log(), &retention(), &mut Ignored);
        let joined = admitted(since("1-e", 4).next(&replica, false));
        assert_eq!((joined.resumed, joined.lost), (None, Some(RecoveryFailure::LogLost)));
        let joined = admitted(JoinPlan::new(JoinStart::Newest(5)).next(&replica, false));
        assert!(joined.history.is_empty() && joined.lost.is_none());
    }
}
