//! The archive of Skein in a database: SQLite for one node, PostgreSQL for a cluster.
//!
//! Both keep entries in the same tables (`migrations/`), which operators may query: `messages` and
//! `inbox_entries` have the JSON text of each frame beside its position, sender and time.
//! [`open`] chooses by the URL.
//!
//! - **SQLite** writes through one connection in WAL mode with `synchronous=NORMAL`: a process that
//!   is killed loses no committed batch. A power cut or a crash of the operating system can lose
//!   the last transactions, and leaves the file consistent.
//! - **PostgreSQL** need not be reachable at start. Each request first makes sure that the schema
//!   is there, and is [unavailable](skein_core::archive::ArchiveError::Unavailable) until then.
//!   Entries are in a partition per month, so that expiry drops whole partitions. A pooler in front
//!   of it must pool sessions, because the migrations hold a lock of their session.
//!
//! A search finds messages whose text contains all words, in any case. Words of three and more
//! characters use an index of trigrams. A search with shorter words only (common in Chinese) looks
//! at the newest messages of each room, [`SEARCH_CANDIDATES_MAX`] in all. Where PostgreSQL has no
//! `pg_trgm`, a word matches a whole word of the message only.

mod batch;
mod error;
mod page;
mod postgres;
mod search;
mod sql;
mod sqlite;
mod text;

use std::{
    fs::{File, TryLockError},
    io,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use secrecy::{ExposeSecret as _, SecretString};
use skein_core::archive::Archive;

pub use error::{OpenError, SchemaError};
pub use postgres::PostgresArchive;
pub use search::{SEARCH_CANDIDATES_MAX, SEARCH_ROOMS_MAX, SEARCH_WORDS_MAX};
pub use sqlite::SqliteArchive;

/// How an archive uses its database.
#[derive(Clone, Debug)]
pub struct ArchiveOptions {
    /// The most connections of this process to PostgreSQL, or for reading to SQLite.
    pub connections_max: u32,
    /// The most time that a request waits for a connection.
    pub connect_timeout: Duration,
    /// The most time that a request takes with a connection. [`Archive::expire`] has no limit.
    pub request_timeout: Duration,
}

impl Default for ArchiveOptions {
    fn default() -> Self {
        Self {
            connections_max: 4,
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(30),
        }
    }
}

/// Opens the archive at `url`: `sqlite://PATH`, or a URL of PostgreSQL (`postgres://…`). It
/// resolves at once for PostgreSQL: the first request connects.
///
/// # Errors
///
/// [`OpenError`], which never contains the URL.
pub async fn open(
    url: &SecretString,
    options: ArchiveOptions,
) -> Result<Arc<dyn Archive>, OpenError> {
    match Location::of(url.expose_secret())? {
        Location::Sqlite(path) => Ok(Arc::new(SqliteArchive::open(&path, &options).await?)),
        Location::Postgres => Ok(Arc::new(PostgresArchive::open(url, options)?)),
    }
}

/// Reserves a file of SQLite for this process, until the returned file is dropped: rooms of two single
/// nodes have nothing to do with each other. PostgreSQL is shared by the nodes of a cluster.
///
/// # Errors
///
/// [`OpenError`], [`OpenError::InUse`] if another process has reserved it.
pub fn reserve(url: &SecretString) -> Result<Option<File>, OpenError> {
    let Location::Sqlite(path) = Location::of(url.expose_secret())? else { return Ok(None) };
    sqlite::create_folder(&path)?;
    let mut name = path.clone().into_os_string();
    name.push("-lock");
    let failed =
        |error: io::Error| OpenError::Sqlite { path: path.clone(), reason: error.to_string() };
    let file = File::options().create(true).truncate(false).write(true).open(name);
    let file = file.map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse { path }),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// Checks the URL without a connection.
///
/// # Errors
///
/// [`OpenError`] if it is not the URL of an archive.
pub fn check_url(url: &SecretString) -> Result<(), OpenError> {
    match Location::of(url.expose_secret())? {
        Location::Sqlite(_) => Ok(()),
        Location::Postgres => postgres::parse_url(url).map(drop),
    }
}

/// The database that a URL names.
#[derive(Debug, PartialEq, Eq)]
enum Location {
    Sqlite(PathBuf),
    Postgres,
}

impl Location {
    fn of(url: &str) -> Result<Self, OpenError> {
        if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            return Ok(Self::Postgres);
        }
        let path = url.strip_prefix("sqlite://").ok_or(OpenError::Scheme)?;
        if path.is_empty() || path.ends_with('/') || path.contains(['?', ':', '\0']) {
            return Err(OpenError::SqlitePath);
        }
        Ok(Self::Sqlite(path.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_of_a_url_chooses_the_database() {
        let sqlite = |path: &str| Ok(Location::Sqlite(path.into()));
        let of = |url| Location::of(url).map_err(|error| error.to_string());
        assert_eq!(of("sqlite://archive.db"), sqlite("archive.db"));
        assert_eq!(of("sqlite:///var/lib/skein/a.db"), sqlite("/var/lib/skein/a.db"));
        assert_eq!(of("postgres://h/d"), Ok(Location::Postgres));
        assert_eq!(of("postgresql://h/d"), Ok(Location::Postgres));
        for bad in ["", "a.db", "mysql://h/d", "sqlite://", "sqlite://:memory:", "sqlite://a?b"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn no_error_repeats_the_password() {
        for url in
            ["postgres://u:hunter2@h:port/d", "mysql://u:hunter2@h", "postgres://u:hunter2@["]
        {
            let error = check_url(&url.into()).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        }
    }
}
