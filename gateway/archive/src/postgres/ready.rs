//! Prepares the schema with the first request that reaches the server.

use std::{sync::LazyLock, time::Duration};

use parking_lot::Mutex;
use skein_core::{archive::ArchiveError, telemetry::log_limiter::LogLimiter};
use sqlx::{
    Connection as _, PgConnection, PgPool, SqlSafeStr as _,
    migrate::{Migration, MigrationType, Migrator},
    postgres::PgPoolOptions,
};
use tokio::{
    sync::OnceCell,
    time::{Instant, timeout},
};

use super::partitions;
use crate::{
    error::{PrepareError, archive_error, describe, is_access, is_conflict},
    search::TextIndex,
};

/// How long requests fail at once after an attempt has failed.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// The most time to connect and to create the tables.
const MIGRATE_TIMEOUT: Duration = Duration::from_secs(30);
/// The most time to create an index: over an existing table it takes its time.
const INDEX_TIMEOUT: Duration = Duration::from_secs(600);

static MIGRATOR: LazyLock<Migrator> = LazyLock::new(|| {
    let sql = include_str!("../../migrations/postgres/0001_entries.sql").into_sql_str();
    let simple = MigrationType::Simple;
    Migrator::with_migrations(vec![Migration::new(1, "entries".into(), simple, sql, false)])
});

/// Whether the schema is prepared, and the index that searches use.
#[derive(Default)]
pub(super) struct Readiness {
    index: OnceCell<TextIndex>,
    failed: Mutex<Option<(Instant, ArchiveError)>>,
    limiter: LogLimiter,
}

impl Readiness {
    /// Prepares the schema unless that has succeeded before.
    pub(super) async fn ensure(&self, pool: &PgPool) -> Result<TextIndex, ArchiveError> {
        self.index.get_or_try_init(|| self.attempt(pool)).await.copied()
    }

    async fn attempt(&self, pool: &PgPool) -> Result<TextIndex, ArchiveError> {
        if let Some((at, error)) = &*self.failed.lock()
            && at.elapsed() < RETRY_PAUSE
        {
            return Err(error.clone());
        }
        let error = match Box::pin(prepare(pool.clone())).await {
            Ok(index) => return Ok(index),
            Err(error) => self.report(error),
        };
        *self.failed.lock() = Some((Instant::now(), error.clone()));
        Err(error)
    }

    /// Logs the errors that only an operator can correct.
    fn report(&self, error: PrepareError) -> ArchiveError {
        let (error, advice) = match error {
            PrepareError::Schema(error) => {
                let text = format!("the database of the archive cannot be used: {error}");
                (ArchiveError::Rejected(text), "")
            }
            PrepareError::Database(error) if is_access(&error) => (
                ArchiveError::Unavailable(describe(&error)),
                "check the user, the password and the database in the URL, and that the user may \
                 create tables",
            ),
            PrepareError::Database(error) => return archive_error(&error),
        };
        if let Some(suppressed) = self.limiter.should_log() {
            tracing::error!(%error, advice, suppressed, "the archive in PostgreSQL is not usable");
        }
        error
    }
}

async fn prepare(pool: PgPool) -> Result<TextIndex, PrepareError> {
    // On a connection of its own: if a migration fails, the lock of migrations ends with that.
    let own = PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(pool.options().get_acquire_timeout())
        .connect_lazy_with((*pool.connect_options()).clone());
    timeout(MIGRATE_TIMEOUT, MIGRATOR.run(&own))
        .await
        .map_err(|_| sqlx::Error::PoolTimedOut)?
        .map_err(|error| PrepareError::of(error, &MIGRATOR))?;
    let mut connection = own.acquire().await?;
    let index = timeout(INDEX_TIMEOUT, create_indexes(&mut connection)).await;
    Ok(index.map_err(|_| sqlx::Error::PoolTimedOut)??)
}

async fn create_indexes(connection: &mut PgConnection) -> Result<TextIndex, sqlx::Error> {
    match create_trigrams(connection).await {
        Ok(()) => return Ok(TextIndex::Trigrams),
        Err(error @ sqlx::Error::Database(_)) if !is_conflict(&error) => tracing::warn!(
            error = describe(&error),
            "searches find whole words only: let a superuser run CREATE EXTENSION pg_trgm in the \
             database of the archive, and start the nodes again"
        ),
        Err(error) => return Err(error),
    }
    let words = "CREATE INDEX messages_words ON messages \
                 USING gin (to_tsvector('simple', coalesce(text, '')))";
    create_index(connection, "messages_words", None, words).await?;
    Ok(TextIndex::Words)
}

async fn create_trigrams(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let extension = "CREATE EXTENSION IF NOT EXISTS pg_trgm";
    let index = "CREATE INDEX messages_trigrams ON messages USING gin (text gin_trgm_ops)";
    create_index(connection, "messages_trigrams", Some(extension), index).await
}

/// Creates an index unless it exists, in a transaction that no two nodes run at the same time, and
/// that never meets one that changes partitions.
async fn create_index(
    connection: &mut PgConnection,
    name: &str,
    extension: Option<&'static str>,
    index: &'static str,
) -> Result<(), sqlx::Error> {
    let mut transaction = connection.begin().await?;
    partitions::lock(&mut transaction).await?;
    if let Some(extension) = extension {
        sqlx::query(extension).execute(&mut *transaction).await?;
    }
    // `IF NOT EXISTS` would wait for all transactions that insert, at each start of a node.
    let exists = sqlx::query_scalar::<_, bool>("SELECT to_regclass($1) IS NOT NULL").bind(name);
    if !exists.fetch_one(&mut *transaction).await? {
        sqlx::query(index).execute(&mut *transaction).await?;
    }
    transaction.commit().await
}
