//! The archive of a cluster in PostgreSQL.
//!
//! All nodes apply to one database. Every transaction writes rows in the order of their keys, so
//! that nodes wait for each other without a deadlock; a deletion waits for all transactions that
//! insert, so that none of them brings back an entry that it removes.

mod expire;
mod partitions;
mod ready;
mod write;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use secrecy::{ExposeSecret as _, SecretString};
use skein_core::{
    archive::{Archive, ArchiveError, ArchivePage, ArchiveRecord, SearchQuery, TimeRange},
    bus::{BoxFuture, ReadRange},
};
use skein_protocol::{ids::RoomId, position::Position};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, PgConnection, PgPool, Postgres, Row as _,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions, PgRow},
};
use tokio::time::{error::Elapsed, timeout};

use self::{partitions::Months, ready::Readiness};
use crate::{
    ArchiveOptions, OpenError,
    batch::Batch,
    error::{archive_error, is_conflict},
    page::{PageRead, RawRow, raw_row},
    search::{Search, SearchPermits},
    sql::{Dialect, Scope, Sql, SqlValue},
};

/// How often a transaction is repeated that the database has ended in favour of another.
const CONFLICTS_MAX: u32 = 5;

/// The archive in PostgreSQL 14 or newer. Cheap to clone.
#[derive(Clone)]
pub struct PostgresArchive(Arc<Connections>);

struct Connections {
    pool: PgPool,
    request_timeout: Duration,
    searches: SearchPermits,
    readiness: Readiness,
    months: Months,
}

/// Parses the URL.
pub(crate) fn parse_url(url: &SecretString) -> Result<PgConnectOptions, OpenError> {
    // The error may repeat a part of the URL, so it is not shown.
    url.expose_secret().parse().map_err(|_| OpenError::PostgresUrl)
}

impl PostgresArchive {
    /// Prepares connections; the first request connects.
    ///
    /// # Errors
    ///
    /// [`OpenError::PostgresUrl`].
    pub fn open(url: &SecretString, options: ArchiveOptions) -> Result<Self, OpenError> {
        let connect = parse_url(url)?.application_name("skein").disable_statement_logging();
        let pool = PgPoolOptions::new()
            .max_connections(options.connections_max.max(1))
            .acquire_timeout(options.connect_timeout)
            .connect_lazy_with(connect);
        Ok(Self(Arc::new(Connections {
            pool,
            request_timeout: options.request_timeout,
            searches: SearchPermits::new(&options),
            readiness: Readiness::default(),
            months: Months::default(),
        })))
    }
}

impl Connections {
    async fn connection(&self) -> Result<PoolConnection<Postgres>, ArchiveError> {
        self.pool.acquire().await.map_err(|error| archive_error(&error))
    }

    /// The result of a request. A server that did not answer in time keeps no connection of the
    /// pool.
    fn finish<T>(
        &self,
        mut connection: PoolConnection<Postgres>,
        result: Result<Result<T, sqlx::Error>, Elapsed>,
    ) -> Result<T, ArchiveError> {
        if let Ok(result) = result {
            return result.map_err(|error| archive_error(&error));
        }
        connection.close_on_drop();
        let limit = self.request_timeout;
        Err(ArchiveError::Unavailable(format!("PostgreSQL took longer than {limit:?}")))
    }

    async fn apply(&self, records: Vec<ArchiveRecord>) -> Result<(), ArchiveError> {
        let batch = Batch::of(records);
        if batch.is_empty() {
            return Ok(());
        }
        self.readiness.ensure(&self.pool).await?;
        let mut connection = self.connection().await?;
        let applying = self.apply_batch(&mut connection, &batch);
        let result = timeout(self.request_timeout, applying).await;
        self.finish(connection, result)
    }

    async fn apply_batch(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
    ) -> Result<(), sqlx::Error> {
        let mut attempts = 0;
        loop {
            let result = match self.months.ensure(connection, batch).await {
                Ok(()) => write::apply(connection, batch).await,
                Err(error) => Err(error),
            };
            attempts += 1;
            match result {
                Err(error) if is_conflict(&error) && attempts < CONFLICTS_MAX => {}
                result => return result,
            }
        }
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
        self.readiness.ensure(&self.pool).await?;
        let mut connection = self.connection().await?;
        let result = timeout(self.request_timeout, read(&mut connection, reading)).await;
        self.finish(connection, result)
    }

    async fn head(&self, room: RoomId) -> Result<Option<Position>, ArchiveError> {
        let Some(scope) = Scope::of(&room) else { return Ok(None) };
        self.readiness.ensure(&self.pool).await?;
        let mut connection = self.connection().await?;
        let name = room.without_prefix();
        let result = timeout(self.request_timeout, head(&mut connection, scope, name)).await;
        self.finish(connection, result)
    }

    async fn heads(&self) -> Result<Vec<(RoomId, Position)>, ArchiveError> {
        self.readiness.ensure(&self.pool).await?;
        let mut connection = self.connection().await?;
        let result = timeout(self.request_timeout, heads(&mut connection)).await;
        self.finish(connection, result)
    }

    async fn search(&self, query: SearchQuery) -> Result<ArchivePage, ArchiveError> {
        let Some(search) = Search::new(query)? else { return Ok(ArchivePage::default()) };
        let index = self.readiness.ensure(&self.pool).await?;
        let _permit = self.searches.acquire().await?;
        let mut connection = self.connection().await?;
        let rows = find(&mut connection, search.sql(index), self.request_timeout);
        let result = timeout(self.request_timeout * 2, rows).await;
        self.finish(connection, result).map(|rows| search.take(rows))
    }

    async fn expire(&self, before: SystemTime) -> Result<u64, ArchiveError> {
        self.readiness.ensure(&self.pool).await?;
        let mut connection = self.connection().await?;
        expire::expire(&mut connection, before).await.map_err(|error| archive_error(&error))
    }
}

async fn read(
    connection: &mut PgConnection,
    mut reading: PageRead,
) -> Result<ArchivePage, sqlx::Error> {
    loop {
        let rows = fetch(connection, reading.sql(Dialect::Postgres)).await?;
        if let Some(page) = reading.take(rows) {
            return Ok(page);
        }
    }
}

/// The heads of rooms. A row that no gateway wrote is left out.
async fn heads(connection: &mut PgConnection) -> Result<Vec<(RoomId, Position)>, sqlx::Error> {
    let query = sqlx::query("SELECT room, epoch, seq FROM heads WHERE kind = $1");
    let rows = query.bind(Scope::Rooms.kind()).fetch_all(connection).await?;
    let head = |row: &PgRow| {
        let room = row.try_get::<String, _>("room").ok()?.parse().ok()?;
        let epoch = row.try_get::<String, _>("epoch").ok()?.parse().ok()?;
        let seq = u64::try_from(row.try_get::<i64, _>("seq").ok()?).ok()?;
        Some((room, Position::new(epoch, seq)))
    };
    Ok(rows.iter().filter_map(head).collect())
}

async fn head(
    connection: &mut PgConnection,
    scope: Scope,
    name: &str,
) -> Result<Option<Position>, sqlx::Error> {
    let query = sqlx::query("SELECT epoch, seq FROM heads WHERE room = $1 AND kind = $2");
    let Some(row) = query.bind(name).bind(scope.kind()).fetch_optional(connection).await? else {
        return Ok(None);
    };
    let epoch = row.try_get::<String, _>("epoch")?.parse();
    let seq = u64::try_from(row.try_get::<i64, _>("seq")?).unwrap_or_default();
    Ok(epoch.ok().map(|epoch| Position::new(epoch, seq)))
}

/// As [`fetch`], with a time limit that the server knows: it would work on for a client that is
/// gone.
async fn find(
    connection: &mut PgConnection,
    sql: Sql,
    limit: Duration,
) -> Result<Vec<RawRow>, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let limit = format!("SET LOCAL statement_timeout = {}", limit.as_millis());
    sqlx::query(AssertSqlSafe(limit)).execute(&mut *transaction).await?;
    let rows = fetch(&mut transaction, sql).await?;
    transaction.commit().await?;
    Ok(rows)
}

async fn fetch(connection: &mut PgConnection, sql: Sql) -> Result<Vec<RawRow>, sqlx::Error> {
    let mut query = sqlx::query(AssertSqlSafe(sql.text));
    for value in sql.values {
        query = match value {
            SqlValue::Int(value) => query.bind(value),
            SqlValue::Text(value) => query.bind(value),
            SqlValue::Texts(values) => query.bind(values),
        };
    }
    let rows = query.fetch_all(connection).await?;
    Ok(rows.iter().map(|row| raw_row!(row)).collect())
}

impl Archive for PostgresArchive {
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
