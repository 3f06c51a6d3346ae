//! An empty archive of either database, with a way to change its tables by hand.

use std::{sync::Arc, time::Duration};

use skein_archive::{ArchiveOptions, open};
use skein_core::{
    archive::{Archive, ArchivePage, ArchiveRecord, SearchQuery, TimeRange},
    bus::ReadRange,
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, SqliteConnection};
use tempfile::TempDir;

use crate::{samples::Sample, server::Server};

pub(crate) struct Deployment {
    pub(crate) archive: Arc<dyn Archive>,
    pub(crate) url: String,
    _folder: Option<TempDir>,
    pub(crate) server: Option<Arc<Server>>,
}

/// Options whose times suit a busy machine.
pub(crate) fn options() -> ArchiveOptions {
    let connect_timeout = Duration::from_secs(20);
    ArchiveOptions { connect_timeout, ..ArchiveOptions::default() }
}

impl Deployment {
    pub(crate) async fn sqlite() -> Self {
        let folder = TempDir::new().unwrap();
        let url = format!("sqlite://{}", folder.path().join("new/archive.db").display());
        let archive = open(&url.clone().into(), options()).await.unwrap();
        Self { archive, url, _folder: Some(folder), server: None }
    }

    pub(crate) async fn postgres() -> Self {
        Self::on(Server::shared().await).await
    }

    /// An archive in a new database of `server`.
    pub(crate) async fn on(server: Arc<Server>) -> Self {
        let url = server.new_database().await;
        let archive = open(&url.clone().into(), options()).await.unwrap();
        Self { archive, url, _folder: None, server: Some(server) }
    }

    /// The archive, opened once more.
    pub(crate) async fn again(&self) -> Arc<dyn Archive> {
        open(&self.url.clone().into(), options()).await.unwrap()
    }

    pub(crate) fn is_postgres(&self) -> bool {
        self.server.is_some()
    }

    /// Runs a statement beside the archive.
    pub(crate) async fn execute(&self, sql: &str) {
        let sql = AssertSqlSafe(sql.to_owned());
        if self.is_postgres() {
            let mut connection = PgConnection::connect(&self.url).await.unwrap();
            sqlx::query(sql).execute(&mut connection).await.unwrap();
            connection.close().await.unwrap();
        } else {
            let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
            sqlx::query(sql).execute(&mut connection).await.unwrap();
            connection.close().await.unwrap();
        }
    }

    /// Reads a number beside the archive.
    pub(crate) async fn number(&self, sql: &str) -> i64 {
        let sql = AssertSqlSafe(sql.to_owned());
        if self.is_postgres() {
            let mut connection = PgConnection::connect(&self.url).await.unwrap();
            sqlx::query_scalar(sql).fetch_one(&mut connection).await.unwrap()
        } else {
            let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
            sqlx::query_scalar(sql).fetch_one(&mut connection).await.unwrap()
        }
    }

    pub(crate) async fn apply(&self, records: Vec<ArchiveRecord>) {
        self.archive.apply(records).await.unwrap();
    }

    pub(crate) async fn read(&self, range: ReadRange) -> ArchivePage {
        self.read_room("r", range, TimeRange::default()).await
    }

    pub(crate) async fn read_room(
        &self,
        room: &str,
        range: ReadRange,
        time: TimeRange,
    ) -> ArchivePage {
        self.archive.read(room.parse().unwrap(), range, time).await.unwrap()
    }

    /// The newest entries.
    pub(crate) async fn newest(&self, limit: u32) -> ArchivePage {
        self.read(ReadRange::Newest { limit }).await
    }

    pub(crate) async fn head(&self, room: &str) -> Option<String> {
        let head = self.archive.head(room.parse().unwrap()).await.unwrap();
        head.map(|position| position.to_string())
    }

    /// The page of a search in room `r`.
    pub(crate) async fn search(&self, text: &str) -> ArchivePage {
        self.archive.search(query(text)).await.unwrap()
    }

    /// Applies samples, and checks that they are read back byte for byte.
    pub(crate) async fn round_trip(&self, samples: &[Sample]) {
        self.apply(samples.iter().map(Sample::record).collect()).await;
        for sample in samples {
            let range = ReadRange::After { seq: sample.seq - 1, limit: 1 };
            let room = sample.room.clone();
            let page = self.archive.read(room, range, TimeRange::default()).await.unwrap();
            let entry = &page.entries[0];
            assert_eq!(entry.envelope.as_bytes(), sample.envelope().as_bytes());
            assert_eq!((&entry.position, &entry.room), (&sample.position(), &sample.room));
        }
    }
}

/// A search in room `r`.
pub(crate) fn query(text: &str) -> SearchQuery {
    SearchQuery {
        rooms: vec!["r".parse().unwrap()],
        text: text.to_owned(),
        sender: None,
        time: TimeRange::default(),
        before: None,
        limit: 100,
    }
}

/// Declares tests that run on both databases, from functions that take a [`Deployment`].
macro_rules! on_both {
    ($($test:ident,)*) => {
        mod on_sqlite {
            $(#[tokio::test(flavor = "multi_thread")] async fn $test() {
                super::$test($crate::deployment::Deployment::sqlite().await).await;
            })*
        }
        mod on_postgres {
            $(#[tokio::test(flavor = "multi_thread")] async fn $test() {
                super::$test($crate::deployment::Deployment::postgres().await).await;
            })*
        }
    };
}
pub(crate) use on_both;
