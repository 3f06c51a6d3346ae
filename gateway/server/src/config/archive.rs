//! Options of the archive.

use humantime::Duration;
use secrecy::SecretString;

use super::{
    reader::{OptionReader, options},
    secrets::SecretKind,
    values::Optional,
};

/// Database of a single node unless configured, below the working directory.
const DEFAULT_URL: &str = "sqlite://data/skein.db";
/// Value of `archive.url` for no archive, since an empty environment variable counts as absent.
const OFF: &str = "off";
/// Value of `archive.url` that chooses by whether there are other nodes.
const AUTO: &str = "auto";

options! {
    /// The archive.
    ArchiveSection in "archive" {
        /// Database that keeps the messages of rooms beyond the retention of logs:
        /// `sqlite://PATH` for a single node, `postgres://user:password@host/database` for a
        /// cluster. `auto`: `sqlite://data/skein.db` for a single node, none for a cluster. `off` or
        /// empty: none.
        url: Optional<String> = "auto", secret SecretKind::DatabaseUrl;
        /// Entries that wait in Redis, in a Redis Cluster per partition, while the database is
        /// away. Above it: entries are archived later from the logs, as long as those have them.
        backlog_max: u32 = "1000000", within 1_000..=100_000_000;
        /// Age above which messages are removed from the archive. 0: none are.
        retention: Duration = "0s";
    }
}

/// Options of the archive.
#[derive(Clone, Debug)]
pub struct ArchiveOptions {
    /// URL of the database. It may have a password.
    pub url: SecretString,
    /// Whether nobody chose it: a gateway that cannot use it starts without an archive.
    pub is_default: bool,
    /// The URL without its password.
    pub shown_url: String,
    /// Age above which messages are removed; zero: none are.
    pub retention: std::time::Duration,
}

impl ArchiveSection {
    /// Options of the archive; `None` without one.
    pub(super) fn archive(
        self,
        is_cluster: bool,
        reader: &mut OptionReader,
    ) -> Option<ArchiveOptions> {
        let configured = self.url.0.filter(|url| url != OFF)?;
        let is_default = configured == AUTO;
        let url = match configured {
            _ if is_default && is_cluster => return None,
            _ if is_default => DEFAULT_URL.to_owned(),
            url => url,
        };
        match url.split_once("://").map(|(scheme, _)| scheme) {
            Some("sqlite") if is_cluster => {
                reader.error(
                    "archive.url",
                    "an SQLite file belongs to one node: a cluster needs a PostgreSQL \
                     (postgres://user:password@host/database)",
                );
            }
            Some("sqlite" | "postgres" | "postgresql") => {}
            _ => reader.error(
                "archive.url",
                "must begin with sqlite:// or postgres://, or be `auto`, `off` or empty",
            ),
        }
        let shown_url = SecretKind::DatabaseUrl.shown(&url);
        Some(ArchiveOptions { url: url.into(), is_default, shown_url, retention: *self.retention })
    }
}
