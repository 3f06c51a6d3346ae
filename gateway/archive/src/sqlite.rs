//! The archive of one node in a file of SQLite.
//!
//! One connection writes, so that transactions queue here and never meet a lock; a few others read
//! what is committed.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime},
};

use skein_core::{
    archive::{Archive, ArchiveError, ArchivePage, ArchiveRecord, SearchQuery, TimeRange},
    bus::{BoxFuture, ReadRange},
};
use skein_protocol::{ids::RoomId, position::Position};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Row as _, SqlSafeStr as _, Sqlite, SqliteConnection,
    SqlitePool,
    migrate::{Migration, MigrationType, Migrator},
    pool::PoolConnection,
    query::Query,
    sqlite::{
        SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow,
        SqliteSynchronous,
    },
};
use tokio::time::{Instant, error::Elapsed, timeout};

use crate::{
    ArchiveOptions, OpenError,
    batch::{Batch, Head, Row, milliseconds},
    error::{PrepareError, archive_error, describe},
    page::{PageRead, RawRow, raw_row},
    search::{Search, SearchPermits, TextIndex},
    sql::{Dialect, Scope, Sql, SqlValue},
};

/// How long a transaction waits for one of another process, such as `sqlite3`.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// The rows of one insert: a few sizes, so that their statements stay prepared. Rows in one
/// statement are inserted more than twice as fast as rows in one statement each.
const INSERT_ROWS: [usize; 4] = [100, 25, 5, 1];
/// The steps of SQLite's machine between two looks at the clock, some hundred microseconds.
const PROGRESS_STEPS: i32 = 10_000;
/// The rows that one transaction of [`Archive::expire`] removes, while applies wait.
const EXPIRE_ROWS: i64 = 2_000;

static MIGRATOR: LazyLock<Migrator> = LazyLock::new(|| {
    let sql = include_str!("../migrations/sqlite/0001_entries.sql").into_sql_str();
    let simple = MigrationType::Simple;
    Migrator::with_migrations(vec![Migration::new(1, "entries".into(), simple, sql, false)])
});

/// The archive in a file of SQLite. Cheap to clone.
#[derive(Clone)]
pub struct SqliteArchive(Arc<Connections>);

struct Connections {
    writer: SqlitePool,
    readers: SqlitePool,
    request_timeout: Duration,
    searches: SearchPermits,
}

impl SqliteArchive {
    /// Opens the file, which is created with its folder if it is missing, and prepares its schema.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub async fn open(path: &Path, options: &ArchiveOptions) -> Result<Self, OpenError> {
        create_folder(path)?;
        let connect = SqliteConnectOptions::new()
            .filename(path)
            .busy_timeout(BUSY_TIMEOUT)
            .disable_statement_logging();
        let writing = connect
            .clone()
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal);
        let pool = || SqlitePoolOptions::new().acquire_timeout(options.connect_timeout);
        let failed = |error: sqlx::Error| open_error(path, &error);
        // A connection that is never idle keeps its statements prepared.
        let writer = pool().max_connections(1).idle_timeout(None).max_lifetime(None);
        let writer = writer.connect_with(writing).await.map_err(failed)?;
        MIGRATOR.run(&writer).await.map_err(|error| match PrepareError::of(error, &MIGRATOR) {
            PrepareError::Schema(error) => OpenError::Schema(error),
            PrepareError::Database(error) => failed(error),
        })?;
        let readers = pool().max_connections(options.connections_max.max(1));
        let readers = readers.connect_lazy_with(connect.read_only(true));
        let (request_timeout, searches) = (options.request_timeout, SearchPermits::new(options));
        Ok(Self(Arc::new(Connections { writer, readers, request_timeout, searches })))
    }
}

/// Creates the folder of a file.
pub(crate) fn create_folder(path: &Path) -> Result<(), OpenError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let Some(folder) = folder else { return Ok(()) };
    let failed = |error| OpenError::Folder { folder: folder.to_owned(), error };
    fs::create_dir_all(folder).map_err(failed)
}

fn open_error(path: &Path, error: &sqlx::Error) -> OpenError {
    OpenError::Sqlite { path: PathBuf::from(path), reason: describe(error) }
}

impl Connections {
    async fn reader(&self) -> Result<PoolConnection<Sqlite>, ArchiveError> {
        self.readers.acquire().await.map_err(|error| archive_error(&error))
    }

    /// The result of a request. One that took too long keeps no connection of the pool.
    fn finish<T>(
        &self,
        mut connection: PoolConnection<Sqlite>,
        result: Result<Result<T, sqlx::Error>, Elapsed>,
    ) -> Result<T, ArchiveError> {
        if let Ok(result) = result {
            return result.map_err(|error| archive_error(&error));
        }
        connection.close_on_drop();
        let limit = self.request_timeout;
        Err(ArchiveError::Unavailable(format!("SQLite took longer than {limit:?}")))
    }

    async fn apply(&self, records: Vec<ArchiveRecord>) -> Result<(), ArchiveError> {
        let batch = Batch::of(records);
        if batch.is_empty() {
            return Ok(());
        }
        // No time limit: a write ends when the disk has it, and nothing else can be done before.
        apply(&self.writer, &batch).await.map_err(|error| archive_error(&error))
    }

    async fn read(
        &self,
        room: RoomId,
        range: ReadRange,
        time: TimeRange,
    ) -> Result<ArchivePage, ArchiveError> {
        let Some(reading) = PageRead::new(room, range, time) else {
            return Ok(ArchivePage::default());
        };
        let mut connection = self.reader().await?;
        let result = timeout(self.request_timeout, read(&mut connection, reading)).await;
        self.finish(connection, result)
    }

    async fn head(&self, room: RoomId) -> Result<Option<Position>, ArchiveError> {
        let Some(scope) = Scope::of(&room) else { return Ok(None) };
        let mut connection = self.reader().await?;
        let name = room.without_prefix();
        let result = timeout(self.request_timeout, head(&mut connection, scope, name)).await;
        self.finish(connection, result)
    }

    async fn heads(&self) -> Result<Vec<(RoomId, Position)>, ArchiveError> {
        let mut connection = self.reader().await?;
        let result = timeout(self.request_timeout, heads(&mut connection)).await;
        self.finish(connection, result)
    }

    async fn search(&self, query: SearchQuery) -> Result<ArchivePage, ArchiveError> {
        let Some(search) = Search::new(query)? else { return Ok(ArchivePage::default()) };
        let _permit = self.searches.acquire().await?;
        let mut connection = self.reader().await?;
        let rows = find(&mut connection, search.sql(TextIndex::Fts), self.request_timeout);
        let result = timeout(self.request_timeout * 2, rows).await;
        self.finish(connection, result).map(|rows| search.take(rows))
    }

    async fn expire(&self, before: SystemTime) -> Result<u64, ArchiveError> {
        let before = milliseconds(before);
        let mut removed = 0;
        for scope in Scope::ALL {
            loop {
                let some = expire_some(&self.writer, scope, before).await;
                let some = some.map_err(|error| archive_error(&error))?;
                removed += some;
                if some == 0 {
                    break;
                }
            }
        }
        Ok(removed)
    }
}

/// Removes some entries, so that applies between these transactions do not wait long.
async fn expire_some(pool: &SqlitePool, scope: Scope, before: i64) -> Result<u64, sqlx::Error> {
    let table = scope.table();
    let sql = format!(
        "DELETE FROM {table} WHERE entry IN \
         (SELECT entry FROM {table} WHERE time < $1 ORDER BY time LIMIT {EXPIRE_ROWS})"
    );
    Ok(sqlx::query(AssertSqlSafe(sql)).bind(before).execute(pool).await?.rows_affected())
}

async fn read(
    connection: &mut SqliteConnection,
    mut reading: PageRead,
) -> Result<ArchivePage, sqlx::Error> {
    loop {
        let rows = fetch(connection, reading.sql(Dialect::Sqlite)).await?;
        if let Some(page) = reading.take(rows) {
            return Ok(page);
        }
    }
}

/// The heads of rooms. A row that no gateway wrote is left out.
async fn heads(connection: &mut SqliteConnection) -> Result<Vec<(RoomId, Position)>, sqlx::Error> {
    let query = sqlx::query("SELECT room, epoch, seq FROM heads WHERE kind = $1");
    let rows = query.bind(Scope::Rooms.kind()).fetch_all(connection).await?;
    let head = |row: &SqliteRow| {
        let room = row.try_get::<String, _>("room").ok()?.parse().ok()?;
        let epoch = row.try_get::<String, _>("epoch").ok()?.parse().ok()?;
        let seq = u64::try_from(row.try_get::<i64, _>("seq").ok()?).ok()?;
        Some((room, Position::new(epoch, seq)))
    };
    Ok(rows.iter().filter_map(head).collect())
}

async fn head(
    connection: &mut SqliteConnection,
    scope: Scope,
    name: &str,
) -> Result<Option<Position>, sqlx::Error> {
    let query = sqlx::query("SELECT epoch, seq FROM heads WHERE room = $1 AND kind = $2");
    let query = query.bind(name.to_owned()).bind(scope.kind());
    let Some(row) = query.fetch_optional(connection).await? else { return Ok(None) };
    let epoch = row.try_get::<String, _>("epoch")?.parse();
    let seq = u64::try_from(row.try_get::<i64, _>("seq")?).unwrap_or_default();
    Ok(epoch.ok().map(|epoch| Position::new(epoch, seq)))
}

/// As [`fetch`], with a time limit that SQLite knows: its thread would work on for a request that
/// is gone.
async fn find(
    connection: &mut SqliteConnection,
    sql: Sql,
    limit: Duration,
) -> Result<Vec<RawRow>, sqlx::Error> {
    let deadline = Instant::now() + limit;
    let mut handle = connection.lock_handle().await?;
    handle.set_progress_handler(PROGRESS_STEPS, move || Instant::now() < deadline);
    drop(handle);
    let rows = fetch(connection, sql).await;
    connection.lock_handle().await?.remove_progress_handler();
    rows
}

async fn fetch(connection: &mut SqliteConnection, sql: Sql) -> Result<Vec<RawRow>, sqlx::Error> {
    let mut query = sqlx::query(AssertSqlSafe(sql.text));
    for value in sql.values {
        query = match value {
            SqlValue::Int(value) => query.bind(value),
            SqlValue::Text(value) => query.bind(value),
            SqlValue::Texts(values) => {
                query.bind(serde_json::to_string(&values).unwrap_or_default())
            }
        };
    }
    let rows = query.fetch_all(connection).await?;
    Ok(rows.iter().map(|row| raw_row!(row)).collect())
}

/// Applies a batch in one transaction.
async fn apply(pool: &SqlitePool, batch: &Batch) -> Result<(), sqlx::Error> {
    let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await?;
    for ((scope, name), ordinal) in &batch.deletions {
        let query = sqlx::query(
            "INSERT INTO deletions (room, kind, ordinal) VALUES ($1, $2, $3) \
             ON CONFLICT DO UPDATE SET ordinal = max(ordinal, excluded.ordinal)",
        );
        query.bind(name).bind(scope.kind()).bind(ordinal).execute(&mut *transaction).await?;
        let (table, column) = (scope.table(), scope.name());
        let sql = format!("DELETE FROM {table} WHERE {column} = $1 AND ordinal < $2");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(name).bind(ordinal);
        query.execute(&mut *transaction).await?;
    }
    for scope in Scope::ALL {
        for rows in batch.statements(scope, INSERT_ROWS[0]) {
            for rows in pieces(&rows) {
                insert(&mut transaction, scope, rows).await?;
            }
        }
    }
    update_heads(&mut transaction, batch).await?;
    transaction.commit().await
}

async fn update_heads(connection: &mut SqliteConnection, batch: &Batch) -> Result<(), sqlx::Error> {
    let row = |((scope, name), head): (&(Scope, String), &Head)| {
        serde_json::json!([name, scope.kind(), head.epoch, head.ordinal, head.seq])
    };
    let rows: Vec<_> = batch.heads.iter().map(row).collect();
    let query = sqlx::query(
        "INSERT INTO heads (room, kind, epoch, ordinal, seq) \
         SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4 \
         FROM json_each($1) WHERE true ON CONFLICT DO UPDATE SET seq = max(seq, excluded.seq), \
         epoch = CASE WHEN excluded.ordinal > ordinal THEN excluded.epoch ELSE epoch END, \
         ordinal = max(ordinal, excluded.ordinal)",
    );
    query.bind(serde_json::Value::from(rows).to_string()).execute(connection).await?;
    Ok(())
}

/// Splits rows into pieces of the sizes of [`INSERT_ROWS`].
fn pieces<T>(mut rows: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = INSERT_ROWS.into_iter().find(|size| *size <= rows.len())?;
        let (piece, rest) = rows.split_at(size);
        rows = rest;
        Some(piece)
    })
}

async fn insert(
    connection: &mut SqliteConnection,
    scope: Scope,
    rows: &[&Row],
) -> Result<(), sqlx::Error> {
    let mut query = sqlx::query(AssertSqlSafe(insert_sql(scope, rows.len())));
    for row in rows {
        query = bind_row(query, row);
    }
    query.bind(scope.kind()).execute(connection).await?;
    Ok(())
}

/// The insert of a number of rows, of which those stay out that were deleted before.
fn insert_sql(scope: Scope, rows: usize) -> String {
    let columns = scope.columns();
    let (table, name) = (scope.table(), scope.name());
    let count = columns.split(',').count();
    let row = format!("({})", vec!["?"; count].join(", "));
    let rows = vec![row; rows].join(", ");
    format!(
        "WITH new ({columns}) AS (VALUES {rows}) INSERT INTO {table} ({columns}) \
         SELECT {columns} FROM new WHERE NOT EXISTS (SELECT 1 FROM deletions WHERE kind = ? \
         AND room = new.{name} AND deletions.ordinal > new.ordinal) \
         ON CONFLICT ({name}, author, id, time) DO UPDATE SET epoch = excluded.epoch, \
         ordinal = excluded.ordinal, seq = excluded.seq WHERE excluded.ordinal > {table}.ordinal"
    )
}

type SqliteQuery<'q> = Query<'q, Sqlite, SqliteArguments>;

fn bind_row<'q>(query: SqliteQuery<'q>, row: &Row) -> SqliteQuery<'q> {
    query
        .bind(row.name.clone())
        .bind(row.epoch.as_str().to_owned())
        .bind(row.ordinal)
        .bind(row.seq)
        .bind(row.author.clone())
        .bind(row.id)
        .bind(row.connection)
        .bind(row.flags)
        .bind(row.sender.clone())
        .bind(row.kind.clone())
        .bind(row.time)
        .bind(row.message.clone())
        .bind(row.payload.clone())
        .bind(row.extra.clone())
        .bind(row.bytes)
}

impl Archive for SqliteArchive {
    fn apply(&self, records: Vec<ArchiveRecord>) -> BoxFuture<Result<(), ArchiveError>> {
        let connections = self.0.clone();
        Box::pin(async move { connections.apply(records).await })
    }

    fn read(
        &self,
        room: RoomId,
        range: ReadRange,
        time: TimeRange,
    ) -> BoxFuture<Result<ArchivePage, ArchiveError>> {
        let connections = self.0.clone();
        Box::pin(async move { connections.read(room, range, time).await })
    }

    fn head(&self, room: RoomId) -> BoxFuture<Result<Option<Position>, ArchiveError>> {
        let connections = self.0.clone();
        Box::pin(async move { connections.head(room).await })
    }

    fn heads(&self) -> BoxFuture<Result<Vec<(RoomId, Position)>, ArchiveError>> {
        let connections = self.0.clone();
        Box::pin(async move { connections.heads().await })
    }

    fn search(&self, query: SearchQuery) -> BoxFuture<Result<ArchivePage, ArchiveError>> {
        let connections = self.0.clone();
        Box::pin(async move { connections.search(query).await })
    }

    fn expire(&self, before: SystemTime) -> BoxFuture<Result<u64, ArchiveError>> {
        let connections = self.0.clone();
        Box::pin(async move { connections.expire(before).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_split_into_few_sizes() {
        let sizes =
            |rows: usize| -> Vec<usize> { pieces(&vec![(); rows]).map(<[()]>::len).collect() };
        assert!(sizes(0).is_empty());
        assert_eq!(sizes(132), [100, 25, 5, 1, 1]);
        assert_eq!(sizes(100), [100]);
    }
}
