//! Searches for messages: their checks, their statement and their entries.

use std::time::Duration;

use skein_core::archive::{ArchiveError, ArchivePage, PAGE_BYTES_MAX, SearchQuery};
use skein_protocol::ids::{RoomId, RoomKind};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

use crate::{
    ArchiveOptions,
    batch::{clamp, report_invalid},
    page::{RawRow, push_time},
    sql::{self, Dialect, Scope, Sql},
    text,
};

/// The most rooms of a search.
pub const SEARCH_ROOMS_MAX: usize = 500;
/// The most words of a search.
pub const SEARCH_WORDS_MAX: usize = 16;
/// The most messages that a search looks at without an index: the newest of each room, the same
/// number of all rooms.
pub const SEARCH_CANDIDATES_MAX: usize = 50_000;
/// The fewest such messages of a room.
const ROOM_CANDIDATES_MIN: usize = 100;
/// The most messages of a page.
const PAGE_MESSAGES_MAX: u32 = 1_000;

/// Bounds the searches that run at the same time to half of the connections, so that long ones
/// leave some for pages and applies.
pub(crate) struct SearchPermits {
    permits: Semaphore,
    wait_max: Duration,
}

impl SearchPermits {
    pub(crate) fn new(options: &ArchiveOptions) -> Self {
        let permits = Semaphore::new((options.connections_max as usize / 2).max(1));
        Self { permits, wait_max: options.connect_timeout }
    }

    /// Waits as long as for a connection.
    pub(crate) async fn acquire(&self) -> Result<SemaphorePermit<'_>, ArchiveError> {
        match timeout(self.wait_max, self.permits.acquire()).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(ArchiveError::Unavailable("too many searches at the same time".to_owned())),
        }
    }
}

/// The index that finds words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TextIndex {
    /// The table `messages_text` of SQLite.
    Fts,
    /// Trigrams of PostgreSQL.
    Trigrams,
    /// Words of PostgreSQL.
    Words,
}

impl TextIndex {
    fn dialect(self) -> Dialect {
        match self {
            Self::Fts => Dialect::Sqlite,
            Self::Trigrams | Self::Words => Dialect::Postgres,
        }
    }

    fn finds(self, word: &str) -> bool {
        match self {
            Self::Fts | Self::Trigrams => text::has_trigrams(word),
            Self::Words => word.chars().all(char::is_alphanumeric),
        }
    }
}

/// A search with its words.
#[derive(Debug)]
pub(crate) struct Search {
    query: SearchQuery,
    rooms: Vec<String>,
    words: Vec<String>,
}

impl Search {
    /// Checks a query. `None` if nothing can be found.
    pub(crate) fn new(query: SearchQuery) -> Result<Option<Self>, ArchiveError> {
        if query.rooms.len() > SEARCH_ROOMS_MAX {
            let text = format!("a search has at most {SEARCH_ROOMS_MAX} rooms");
            return Err(ArchiveError::Rejected(text));
        }
        let words = text::words(&query.text);
        if words.len() > SEARCH_WORDS_MAX || query.text.len() > text::TEXT_BYTES_MAX {
            let text = format!("a search has at most {SEARCH_WORDS_MAX} words and 8192 bytes");
            return Err(ArchiveError::Rejected(text));
        }
        let is_room = |room: &&RoomId| room.kind() == RoomKind::Room;
        let rooms: Vec<String> =
            query.rooms.iter().filter(is_room).map(|room| room.as_str().to_owned()).collect();
        let is_some = !rooms.is_empty() && query.limit > 0;
        Ok(is_some.then_some(Self { query, rooms, words }))
    }

    /// The statement.
    pub(crate) fn sql(&self, index: TextIndex) -> Sql {
        let dialect = index.dialect();
        let limit = i64::from(self.query.limit.min(PAGE_MESSAGES_MAX));
        let (columns, source, join) = sql::page_source(dialect, Scope::Rooms);
        let columns = match dialect {
            Dialect::Sqlite => {
                format!("{columns}, entries.time, entries.room, entries.seq, entries.bytes")
            }
            Dialect::Postgres => columns.to_owned(),
        };
        let mut sql = Sql::new(dialect);
        sql.push("SELECT ").push(&sql::entry_columns(Scope::Rooms, source));
        sql.push(
            " FROM (SELECT entries.*, row_number() OVER page AS place, sum(bytes) OVER page AS \
             total, count(*) OVER () AS found FROM (SELECT ",
        );
        sql.push(&columns);
        self.push_source(&mut sql, index);
        self.push_words(&mut sql, index);
        sql.push(" ORDER BY entries.time DESC, entries.room DESC, entries.seq DESC LIMIT ");
        sql.int(limit + 1);
        sql.push(
            ") AS entries WINDOW page AS (ORDER BY time DESC, room DESC, seq DESC \
             ROWS UNBOUNDED PRECEDING)) AS sized",
        );
        sql.push(&join).push(" WHERE sized.place <= ").int(limit);
        sql.push(" AND (sized.place = 1 OR sized.total <= ").int(PAGE_BYTES_MAX as i64);
        sql.push(") ORDER BY sized.place");
        sql
    }

    /// Appends the messages in which words are looked for: those that an index finds, else the
    /// newest of each room.
    fn push_source(&self, sql: &mut Sql, index: TextIndex) {
        if !self.words.iter().any(|word| index.finds(word)) {
            return self.push_candidates(sql);
        }
        if index == TextIndex::Fts {
            sql.push(
                " FROM messages_text CROSS JOIN messages AS entries \
                 ON entries.entry = messages_text.rowid WHERE messages_text MATCH ",
            );
            sql.text(self.fts_query()).push(" AND entries.room IN (SELECT value FROM ");
        } else {
            sql.push(" FROM messages AS entries WHERE entries.room IN (SELECT value FROM ");
        }
        sql.relation(self.rooms.clone(), "wanted").push(")");
        self.push_conditions(sql, "entries");
    }

    fn push_candidates(&self, sql: &mut Sql) {
        let each = (SEARCH_CANDIDATES_MAX / self.rooms.len()).max(ROOM_CANDIDATES_MIN) as i64;
        sql.push(" FROM ").relation(self.rooms.clone(), "wanted");
        let columns = match sql.dialect {
            Dialect::Sqlite => {
                sql.push(" CROSS JOIN messages AS entries WHERE entries.entry IN (");
                "newest.entry"
            }
            Dialect::Postgres => {
                sql.push(" CROSS JOIN LATERAL (");
                "newest.*"
            }
        };
        sql.push(&format!(
            "SELECT {columns} FROM messages AS newest WHERE newest.room = wanted.value"
        ));
        self.push_conditions(sql, "newest");
        sql.push(" ORDER BY newest.seq DESC, newest.ordinal DESC LIMIT ").int(each);
        sql.push(match sql.dialect {
            Dialect::Sqlite => ")",
            Dialect::Postgres => ") AS entries WHERE true",
        });
    }

    /// Appends sender, time and the place of the earlier page.
    fn push_conditions(&self, sql: &mut Sql, table: &str) {
        let time = format!("{table}.time");
        if let Some(sender) = &self.query.sender {
            sql.push(&format!(" AND {table}.sender = ")).text(sender.as_str());
        }
        push_time(sql, &time, self.query.time);
        if let Some(before) = &self.query.before {
            sql.push(&format!(" AND {time} <= ")).time(before.time_ms);
            sql.push(&format!(" AND ({time}, {table}.room, {table}.seq) < (")).time(before.time_ms);
            sql.push(", ").text(before.room.as_str());
            sql.push(", ").int(clamp(before.seq)).push(")");
        }
    }

    /// Appends the words that the source has not selected yet.
    fn push_words(&self, sql: &mut Sql, index: TextIndex) {
        for word in &self.words {
            match index {
                TextIndex::Fts if index.finds(word) => {}
                TextIndex::Fts => {
                    sql.push(" AND (false");
                    for spelling in text::spellings(word) {
                        sql.push(" OR entries.text LIKE ").text(text::like_pattern(&spelling));
                        sql.push(" ESCAPE '\\'");
                    }
                    sql.push(")");
                }
                TextIndex::Words if index.finds(word) => {
                    sql.push(" AND to_tsvector('simple', coalesce(entries.text, ''))");
                    sql.push(" @@ plainto_tsquery('simple', ").text(word).push(")");
                }
                TextIndex::Trigrams | TextIndex::Words => {
                    sql.push(" AND entries.text ILIKE ").text(text::like_pattern(word));
                }
            }
        }
    }

    /// The words as strings of FTS5, which have no operators.
    fn fts_query(&self) -> String {
        let found = self.words.iter().filter(|word| TextIndex::Fts.finds(word));
        let quoted: Vec<_> =
            found.map(|word| format!("\"{}\"", word.replace('"', "\"\""))).collect();
        quoted.join(" AND ")
    }

    /// The page of these rows, newest first.
    pub(crate) fn take(&self, rows: Vec<RawRow>) -> ArchivePage {
        let more = rows.first().map_or(0, |row| row.found) > rows.len() as i64;
        let mut entries = Vec::with_capacity(rows.len());
        for row in rows {
            let name = row.entry.as_ref().map(|entry| entry.name.as_str());
            let room = self.query.rooms.iter().find(|room| Some(room.as_str()) == name);
            let Some(room) = room.or(self.query.rooms.first()) else { continue };
            match row.entry(room) {
                Some(entry) => entries.push(entry),
                None => report_invalid("row", room),
            }
        }
        // Without an entry there is no place to continue from.
        let more = more && !entries.is_empty();
        ArchivePage { entries, more }
    }
}
