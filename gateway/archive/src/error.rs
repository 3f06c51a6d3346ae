//! Why an archive cannot be opened, and which errors of a database may pass.

use std::{io, path::PathBuf};

use skein_core::archive::ArchiveError;
use sqlx::migrate::{MigrateError, Migrator};

/// Why the archive cannot be opened. No text contains the URL, which may have a password.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL has another scheme.
    #[error(
        "the URL of the archive has an unknown scheme: write sqlite://PATH or \
         postgres://USER:PASSWORD@HOST/DATABASE"
    )]
    Scheme,
    /// The URL names no file.
    #[error(
        "the URL of the archive names no file: write sqlite://PATH, as sqlite://data/archive.db or \
         sqlite:///var/lib/skein/archive.db, without `?` and `:`"
    )]
    SqlitePath,
    /// The folder of the file cannot be created.
    #[error("cannot create the folder {folder} of the archive: {error}; create it for this user")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// The error of the system.
        error: io::Error,
    },
    /// SQLite cannot open or prepare the file.
    #[error(
        "cannot open the archive {path}: {reason}; check that this user may write the file and its \
         folder, and that it is a database of SQLite"
    )]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// The reason that SQLite gives.
        reason: String,
    },
    /// Another process has reserved the file.
    #[error(
        "another gateway uses the archive {path}: give each its own file (archive.url), or stop the \
         other one"
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The URL cannot be parsed.
    #[error(
        "the URL of the archive is invalid: write postgres://USER:PASSWORD@HOST:PORT/DATABASE, \
         with special characters of the password percent-encoded"
    )]
    PostgresUrl,
    /// The database has another schema.
    #[error("the database of the archive cannot be used: {0}")]
    Schema(#[from] SchemaError),
}

/// Why the schema of a database does not fit this version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    /// A newer version has changed the schema.
    #[error(
        "it has schema {found}, and this version ({version}) knows schemas up to {known}: run the \
         version that wrote it, or a newer one; to return to this version, restore a backup of the \
         database from before the upgrade",
        version = env!("CARGO_PKG_VERSION")
    )]
    TooNew {
        /// The schema of the database.
        found: i64,
        /// The newest schema that this version knows.
        known: i64,
    },
    /// Another program has changed the record of schemas.
    #[error(
        "its table _sqlx_migrations does not match this version ({0}): another program uses these \
         tables; give the archive a database of its own"
    )]
    Foreign(String),
}

/// The reason that a schema could not be prepared.
pub(crate) enum PrepareError {
    Schema(SchemaError),
    Database(sqlx::Error),
}

impl PrepareError {
    pub(crate) fn of(error: MigrateError, migrator: &Migrator) -> Self {
        let known = migrator.iter().map(|migration| migration.version).max().unwrap_or_default();
        match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
                Self::Database(error)
            }
            MigrateError::VersionMissing(found) if found > known => {
                Self::Schema(SchemaError::TooNew { found, known })
            }
            other => Self::Schema(SchemaError::Foreign(other.to_string())),
        }
    }
}

impl From<sqlx::Error> for PrepareError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

/// Whether a transaction failed only because of others, so that it may be repeated at once.
pub(crate) fn is_conflict(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    matches!(code.as_deref(), Some("40P01" | "40001"))
}

/// Whether PostgreSQL rejects the user, the password or the database.
pub(crate) fn is_access(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| code.starts_with("28") || code == "3D000" || code == "42501")
}

/// The error of a request. Errors of the connection, of a full disk and of a database that starts
/// or stops may pass.
pub(crate) fn archive_error(error: &sqlx::Error) -> ArchiveError {
    use sqlx::Error;
    let text = describe(error);
    match error {
        Error::Database(database) => {
            let code = database.code().unwrap_or_default();
            let passes =
                if is_sqlite(error) { passes_in_sqlite(&code) } else { passes_in_postgres(&code) };
            if passes { ArchiveError::Unavailable(text) } else { ArchiveError::Rejected(text) }
        }
        Error::Io(_)
        | Error::Tls(_)
        | Error::Protocol(_)
        | Error::PoolTimedOut
        | Error::PoolClosed
        | Error::WorkerCrashed
        | Error::BeginFailed => ArchiveError::Unavailable(text),
        _ => ArchiveError::Rejected(text),
    }
}

/// The text of an error, without values of rows and without the URL.
pub(crate) fn describe(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(database) => {
            format!("{} (code {})", database.message(), database.code().unwrap_or_default())
        }
        sqlx::Error::PoolTimedOut => {
            "no connection in time: the database does not answer, or all connections are busy"
                .to_owned()
        }
        sqlx::Error::Configuration(_) => "the options of the connection are invalid".to_owned(),
        other => other.to_string(),
    }
}

fn is_sqlite(error: &sqlx::Error) -> bool {
    let database = error.as_database_error();
    database.is_some_and(|error| error.try_downcast_ref::<sqlx::sqlite::SqliteError>().is_some())
}

/// Busy, locked, read-only, interrupted, input or output, full, cannot open. Extended codes have the primary
/// code in the lowest byte.
fn passes_in_sqlite(code: &str) -> bool {
    code.parse().is_ok_and(|code: u32| matches!(code & 0xFF, 5 | 6 | 8 | 9 | 10 | 13 | 14))
}

/// Classes of SQLSTATE: connection, authorization, no such database, read-only transaction,
/// conflict, lock, resources, operator, system; and missing rights.
fn passes_in_postgres(code: &str) -> bool {
    matches!(code.get(..2), Some("08" | "28" | "3D" | "25" | "40" | "53" | "55" | "57" | "58"))
        || code == "42501"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_server_pass_and_errors_of_requests_do_not() {
        for code in ["08006", "28P01", "3D000", "25006", "40P01", "53300", "57P01", "42501"] {
            assert!(passes_in_postgres(code), "{code}");
        }
        for code in ["", "22021", "23505", "42601", "42P01", "XX000"] {
            assert!(!passes_in_postgres(code), "{code}");
        }
        for code in ["5", "13", "266", "14"] {
            assert!(passes_in_sqlite(code), "{code}");
        }
        for code in ["", "1", "11", "19", "2067"] {
            assert!(!passes_in_sqlite(code), "{code}");
        }
        assert!(matches!(archive_error(&sqlx::Error::PoolTimedOut), ArchiveError::Unavailable(_)));
        assert!(matches!(archive_error(&sqlx::Error::RowNotFound), ArchiveError::Rejected(_)));
    }
}
