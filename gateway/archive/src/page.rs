//! Pages of history: their statement, and their entries, which are checked as all that comes from a
//! database.

use skein_core::{
    archive::{ArchivePage, ArchivedEntry, PAGE_BYTES_MAX, TimeRange},
    bus::ReadRange,
    envelope::{AuthorHash, Envelope, EnvelopeParts, FrameType},
};
use skein_protocol::{
    ids::{ConnectionId, MessageId, RoomId},
    position::{Position, SEQ_MAX},
};
use uuid::Uuid;

use crate::{
    batch::{BINARY, NO_ECHO, clamp, milliseconds, report_invalid},
    sql::{self, Dialect, Scope, Sql},
};

/// The most entries of a page.
const PAGE_ENTRIES_MAX: u32 = 10_000;
/// Entries that are read beyond a page: those with the number of its last entry, and one more.
const BEYOND: i64 = 9;
/// The most pages without a single valid entry that are passed over.
const INVALID_PAGES_MAX: u32 = 100;

/// A row as it was read. A column that has another type is `None`.
#[derive(Debug, Default)]
pub(crate) struct RawRow {
    /// The rows that the page was taken from.
    pub(crate) found: i64,
    pub(crate) seq: Option<i64>,
    pub(crate) entry: Option<RawEntry>,
}

/// The columns of an entry.
#[derive(Debug)]
pub(crate) struct RawEntry {
    pub(crate) name: String,
    pub(crate) epoch: String,
    pub(crate) author: Vec<u8>,
    pub(crate) id: Uuid,
    pub(crate) connection: Uuid,
    pub(crate) flags: i64,
    pub(crate) frame: String,
    pub(crate) message: String,
    pub(crate) payload: Option<Vec<u8>>,
}

/// Reads a row of either database.
macro_rules! raw_row {
    ($row:expr) => {{
        use sqlx::Row as _;
        let row = $row;
        let entry = || {
            Some($crate::page::RawEntry {
                name: row.try_get("name").ok()?,
                epoch: row.try_get("epoch").ok()?,
                author: row.try_get("author").ok()?,
                id: row.try_get("id").ok()?,
                connection: row.try_get("connection").ok()?,
                flags: row.try_get("flags").ok()?,
                frame: row.try_get("frame").ok()?,
                message: row.try_get("message").ok()?,
                payload: row.try_get("payload").ok()?,
            })
        };
        $crate::page::RawRow {
            found: row.try_get("found").unwrap_or_default(),
            seq: row.try_get("seq").ok(),
            entry: entry(),
        }
    }};
}
pub(crate) use raw_row;

impl RawRow {
    /// The entry; `None` if no gateway wrote the row.
    pub(crate) fn entry(self, room: &RoomId) -> Option<ArchivedEntry> {
        let seq = u64::try_from(self.seq?).ok().filter(|seq| *seq <= SEQ_MAX)?;
        let raw = self.entry?;
        let fields = raw.message.strip_prefix('{')?.strip_suffix('}')?;
        let frames = [FrameType::Message, FrameType::Direct, FrameType::Notification];
        let is_binary = raw.flags & BINARY != 0;
        let envelope = Envelope::pack(EnvelopeParts {
            frame: frames.into_iter().find(|frame| frame.as_str() == raw.frame)?,
            author: AuthorHash::from_bytes(raw.author.try_into().ok()?),
            id: MessageId(raw.id),
            sender: ConnectionId(raw.connection),
            echo: raw.flags & NO_ECHO == 0,
            fields,
            binary_payload: is_binary.then(|| raw.payload.as_deref().unwrap_or_default()),
        });
        let envelope = Envelope::parse_for_room(envelope.as_bytes().clone(), room).ok()?;
        let position = Position::new(raw.epoch.parse().ok()?, seq);
        Some(ArchivedEntry { room: room.clone(), position, envelope })
    }
}

/// A page that is being read. Rows that no gateway wrote are passed over.
#[derive(Debug)]
pub(crate) struct PageRead {
    room: RoomId,
    scope: Scope,
    range: ReadRange,
    time: TimeRange,
    rounds: u32,
}

impl PageRead {
    /// `None` for a room without a log.
    pub(crate) fn new(room: RoomId, range: ReadRange, time: TimeRange) -> Option<Self> {
        let scope = Scope::of(&room)?;
        (range.limit() > 0).then_some(Self { room, scope, range, time, rounds: 0 })
    }

    /// The statement. It takes whole groups of entries with one number, at least one, as long as
    /// the limit is not reached before them and the bytes suffice.
    pub(crate) fn sql(&self, dialect: Dialect) -> Sql {
        let (order, _) = self.order();
        let limit = i64::from(self.range.limit().min(PAGE_ENTRIES_MAX));
        let (_, source, join) = sql::page_source(dialect, self.scope);
        let inner = match dialect {
            Dialect::Sqlite => "entry, seq, ordinal, bytes",
            Dialect::Postgres => "*",
        };
        let mut sql = Sql::new(dialect);
        sql.push("SELECT ").push(&sql::entry_columns(self.scope, source));
        sql.push(
            " FROM (SELECT entries.*, dense_rank() OVER page AS place, rank() OVER page AS before, \
             sum(bytes) OVER page AS total, count(*) OVER () AS found FROM (SELECT ",
        );
        sql.push(inner).push(" FROM ").push(self.scope.table()).push(" WHERE ");
        self.push_condition(&mut sql);
        sql.push(&format!(" ORDER BY seq {order}, ordinal {order} LIMIT ")).int(limit + BEYOND);
        sql.push(&format!(") AS entries WINDOW page AS (ORDER BY seq {order})) AS sized{join}"));
        sql.push(" WHERE sized.before <= ").int(limit);
        sql.push(" AND (sized.place = 1 OR sized.total <= ").int(PAGE_BYTES_MAX as i64);
        sql.push(") ORDER BY sized.seq, sized.ordinal");
        sql
    }

    fn push_condition(&self, sql: &mut Sql) {
        sql.push(self.scope.name()).push(" = ").text(self.room.without_prefix());
        match self.range {
            ReadRange::Newest { .. } => {}
            ReadRange::Before { seq, .. } => drop(sql.push(" AND seq < ").int(clamp(seq))),
            ReadRange::After { seq, .. } => drop(sql.push(" AND seq > ").int(clamp(seq))),
        }
        push_time(sql, "time", self.time);
    }

    /// The order in which entries are taken, and whether it is that of the page.
    fn order(&self) -> (&'static str, bool) {
        match self.range {
            ReadRange::After { .. } => ("ASC", true),
            ReadRange::Newest { .. } | ReadRange::Before { .. } => ("DESC", false),
        }
    }

    /// The page of these rows; `None` if none of them is valid, so that the next ones are to be
    /// read.
    pub(crate) fn take(&mut self, rows: Vec<RawRow>) -> Option<ArchivePage> {
        let found = rows.first().map_or(0, |row| row.found);
        let more = found > rows.len() as i64;
        let last = if self.order().1 { rows.last() } else { rows.first() };
        let last = last.and_then(|row| u64::try_from(row.seq?).ok());
        let mut entries = Vec::with_capacity(rows.len());
        for row in rows {
            match row.entry(&self.room) {
                Some(entry) => entries.push(entry),
                None => report_invalid("row", &self.room),
            }
        }
        self.rounds += 1;
        let Some(seq) = last.filter(|_| entries.is_empty() && more) else {
            return Some(ArchivePage { entries, more });
        };
        if self.rounds > INVALID_PAGES_MAX {
            return Some(ArchivePage { entries, more: false });
        }
        let limit = self.range.limit();
        self.range = match self.range {
            ReadRange::After { .. } => ReadRange::After { seq, limit },
            _ => ReadRange::Before { seq, limit },
        };
        None
    }
}

/// Appends the conditions of a time range.
pub(crate) fn push_time(sql: &mut Sql, column: &str, time: TimeRange) {
    if let Some(since) = time.since {
        sql.push(&format!(" AND {column} >= ")).time(milliseconds(since));
    }
    if let Some(until) = time.until {
        sql.push(&format!(" AND {column} < ")).time(milliseconds(until));
    }
}
