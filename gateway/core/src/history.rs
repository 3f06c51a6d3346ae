//! History: pages of a room, from its log and, behind the oldest entry of the log, from the archive.

use std::{sync::Arc, time::SystemTime};

use serde_json::value::RawValue;
use skein_protocol::{
    ids::RoomId,
    position::{Epoch, Seq},
};

use crate::{
    archive::{Archive, ArchivedEntry, PAGE_BYTES_MAX, TimeRange},
    bus::{Bus, BusError, ReadRange},
    delivery::{
        Entry, ServerId,
        join::history as whole_frames,
        page::{LogPage, READ_LEN},
    },
};

/// The most reads of a log for one page. A log has some thousand entries, and only a page of a time
/// range is read in several parts.
const READS_MAX: usize = 64;

/// The page of a room that a client or the application requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryQuery {
    /// The direction and the most entries.
    pub range: HistoryRange,
    /// When the entries were accepted.
    pub time: TimeRange,
}

/// The part of a history that a page shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HistoryRange {
    /// A page in one direction.
    Read(ReadRange),
    /// The entries around a number: half of them below it.
    Around {
        /// The number in the middle.
        seq: Seq,
        /// The most entries.
        limit: u32,
    },
}

/// A page of a room.
#[derive(Clone, Debug)]
pub struct HistoryPage {
    /// The epoch of the log.
    pub epoch: Epoch,
    /// The entries, oldest first.
    pub entries: Vec<Entry>,
    /// Whether more exist in the requested direction; around a number, below the first one.
    pub more: bool,
    /// Whether the page is cut at its oldest end, if it is too large for one reply.
    keeps_newest: bool,
}

impl HistoryPage {
    /// The page of a room without a log.
    pub fn without_log() -> Self {
        Self { epoch: Epoch::none(), entries: Vec::new(), more: false, keeps_newest: true }
    }

    /// The size of the envelopes, in bytes.
    pub fn bytes(&self) -> usize {
        self.entries.iter().map(Entry::bytes).sum()
    }

    /// The frames that fit into one reply, and whether more exist in the requested direction.
    pub fn frames(&self) -> (Vec<Box<RawValue>>, bool) {
        let entries = &self.entries;
        let frames = if self.keeps_newest {
            let mut frames = whole_frames(entries.iter().rev());
            frames.reverse();
            frames
        } else {
            whole_frames(entries.iter())
        };
        let more = self.more || frames.len() < entries.len();
        (frames, more)
    }
}

/// Reads history from a bus, and from the archive if there is one.
#[derive(Clone)]
pub struct HistoryReader {
    bus: Arc<dyn Bus>,
    archive: Option<Arc<dyn Archive>>,
}

impl HistoryReader {
    /// A reader of the logs of `bus` and of `archive`.
    pub fn new(bus: Arc<dyn Bus>, archive: Option<Arc<dyn Archive>>) -> Self {
        Self { bus, archive }
    }

    /// The archive, if there is one.
    pub fn archive(&self) -> Option<&Arc<dyn Archive>> {
        self.archive.as_ref()
    }

    /// Reads a page of a room that has a log. Cancel-safe.
    ///
    /// # Errors
    ///
    /// The error of the bus; [`BusError::Unavailable`] if the page needs an archive that is away.
    pub async fn page(&self, room: &RoomId, query: HistoryQuery) -> Result<HistoryPage, BusError> {
        match query.range {
            HistoryRange::Read(ReadRange::After { seq, limit }) => {
                self.newer(room, seq, limit, query.time).await
            }
            HistoryRange::Read(ReadRange::Before { seq, limit }) => {
                self.older(room, Some(seq), limit, query.time).await
            }
            HistoryRange::Read(ReadRange::Newest { limit }) => {
                self.older(room, None, limit, query.time).await
            }
            HistoryRange::Around { seq, limit } => {
                let mut page = self.older(room, Some(seq), limit / 2, query.time).await?;
                let rest = limit - page.entries.len() as u32;
                let newer = self.newer(room, seq.saturating_sub(1), rest, query.time).await?;
                page.entries.extend(newer.entries);
                Ok(page)
            }
        }
    }

    /// The newest `limit` entries below `before`: first of the log, then of the archive.
    async fn older(
        &self,
        room: &RoomId,
        before: Option<Seq>,
        limit: u32,
        time: TimeRange,
    ) -> Result<HistoryPage, BusError> {
        let wanted = limit as usize;
        // Newest first.
        let mut found: Vec<Entry> = Vec::new();
        let (mut below, mut is_complete) = (before, false);
        let mut log = LogPage::without_log();
        for _ in 0..READS_MAX {
            let count = if time == TimeRange::default() { limit } else { READ_LEN };
            let range = match below {
                Some(seq) => ReadRange::Before { seq, limit: count.max(1) },
                None => ReadRange::Newest { limit: count.max(1) },
            };
            log = self.bus.read(room.clone(), range).await?;
            let first = log.entries.first().map(|entry| entry.position.seq);
            is_complete = has_earlier_than(&log.entries, time.since);
            found.extend(log.entries.drain(..).rev().filter(|entry| is_within(entry, time)));
            let log_goes_on = first.is_some_and(|first| log.oldest < first);
            below = first.or_else(|| lowest(before, &log)).or(below);
            if found.len() > wanted || is_complete || !log_goes_on || is_full(&found) {
                break;
            }
            if time == TimeRange::default() && found.len() == wanted {
                break;
            }
        }
        let is_cut = found.len() > wanted;
        found.truncate(wanted);
        let mut more = is_cut || below.is_some_and(|below| log.oldest != 0 && log.oldest < below);
        if is_complete && !is_cut {
            more = false;
        } else if !more && let Some(archive) = &self.archive {
            let below = below.unwrap_or(log.top + 1);
            if found.len() == wanted || is_full(&found) {
                // Numbers begin at 1, so that there are entries below.
                more = below > 1;
            } else if below > 1 {
                let range = ReadRange::Before { seq: below, limit: (wanted - found.len()) as u32 };
                let page = archive.read(room.clone(), range, time).await.map_err(unavailable)?;
                more = page.more;
                let known: Vec<_> = found.iter().map(|entry| entry.envelope.dedup_key()).collect();
                let archived = page.entries.into_iter().rev().map(entry_of);
                found.extend(archived.filter(|entry| !known.contains(&entry.envelope.dedup_key())));
            }
        }
        found.reverse();
        Ok(HistoryPage { epoch: log.epoch, entries: found, more, keeps_newest: true })
    }

    /// The oldest `limit` entries above `after`: first of the archive, then of the log.
    async fn newer(
        &self,
        room: &RoomId,
        after: Seq,
        limit: u32,
        time: TimeRange,
    ) -> Result<HistoryPage, BusError> {
        let (wanted, mut after) = (limit as usize, after);
        let mut found: Vec<Entry> = Vec::new();
        let mut log = self.bus.read(room.clone(), ReadRange::After { seq: after, limit }).await?;
        let log_begins = if log.oldest == 0 { log.top + 1 } else { log.oldest };
        if let Some(archive) = &self.archive
            && after + 1 < log_begins
        {
            let range = ReadRange::After { seq: after, limit };
            let page = archive.read(room.clone(), range, time).await.map_err(unavailable)?;
            let below = page.entries.into_iter().filter(|entry| entry.position.seq < log_begins);
            found.extend(below.map(entry_of));
            // A page that is full, or large, ends before the log begins.
            let reached = found.last().map_or(after, |last| last.position.seq);
            if page.more && reached + 1 < log_begins {
                let epoch = log.epoch;
                return Ok(HistoryPage { epoch, entries: found, more: true, keeps_newest: false });
            }
            after = log_begins - 1;
            log = self.bus.read(room.clone(), ReadRange::After { seq: after, limit }).await?;
        }
        let mut more = false;
        for _ in 0..READS_MAX {
            let Some(last) = log.entries.last().map(|entry| entry.position.seq) else { break };
            let is_past = |entry: &Entry| {
                let accepted = || entry.envelope.accepted_at();
                time.until.is_some_and(|until| accepted().is_some_and(|at| at >= until))
            };
            let ends = log.entries.iter().any(is_past);
            found.extend(log.entries.drain(..).filter(|entry| is_within(entry, time)));
            more = !ends && last < log.top;
            after = last;
            if !more || found.len() >= wanted || is_full(&found) {
                break;
            }
            log = self.bus.read(room.clone(), ReadRange::After { seq: after, limit }).await?;
        }
        more |= found.len() > wanted;
        found.truncate(wanted);
        Ok(HistoryPage { epoch: log.epoch, entries: found, more, keeps_newest: false })
    }
}

/// Whether entries fill a reply, so that no more need be read.
fn is_full(entries: &[Entry]) -> bool {
    entries.iter().map(Entry::bytes).sum::<usize>() >= PAGE_BYTES_MAX
}

/// The number below which an empty page of a log ends.
fn lowest(before: Option<Seq>, log: &LogPage) -> Option<Seq> {
    let begins = if log.oldest == 0 { log.top + 1 } else { log.oldest };
    Some(before.map_or(begins, |before| before.min(begins)))
}

fn is_within(entry: &Entry, TimeRange { since, until }: TimeRange) -> bool {
    if since.is_none() && until.is_none() {
        return true;
    }
    let Some(accepted) = entry.envelope.accepted_at() else { return false };
    since.is_none_or(|since| since <= accepted) && until.is_none_or(|until| accepted < until)
}

fn has_earlier_than(entries: &[Entry], since: Option<SystemTime>) -> bool {
    let Some(since) = since else { return false };
    let first = entries.first().and_then(|entry| entry.envelope.accepted_at());
    first.is_some_and(|first| first < since)
}

fn entry_of(archived: ArchivedEntry) -> Entry {
    let ArchivedEntry { position, envelope, .. } = archived;
    Entry { position, origin: ServerId::default(), envelope }
}

fn unavailable(error: crate::archive::ArchiveError) -> BusError {
    tracing::debug!(%error, "cannot read a page of the archive");
    BusError::Unavailable
}
