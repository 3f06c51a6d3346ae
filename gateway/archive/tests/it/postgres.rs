//! Properties of the archive in PostgreSQL alone.

use std::{sync::Arc, time::Duration};

use skein_archive::{ArchiveOptions, open};
use skein_core::archive::ArchiveError;
use tokio::{task::JoinSet, time::Instant};

use crate::{
    deployment::{Deployment, options},
    samples::{START_MS, at, deleted, message, records, seqs},
    server::{PASSWORD, Server},
};

#[tokio::test(flavor = "multi_thread")]
async fn nodes_prepare_and_apply_at_the_same_time() {
    let on = Deployment::postgres().await;
    let mut tasks = JoinSet::new();
    for node in 0..4_u64 {
        let archive = on.again().await;
        tasks.spawn(async move {
            for n in 0..10 {
                let month =
                    |seq| message(node * 100 + n * 10 + seq).at(START_MS - seq * 2_592_000_000);
                archive.apply(records((1..=10).map(month))).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(on.number("SELECT count(*) FROM messages").await, 400);
    assert_eq!(on.number("SELECT count(*) FROM messages_other").await, 0);
    let partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'messages'::regclass";
    assert!(on.number(partitions).await >= 10);
    assert_eq!(on.number("SELECT count(*) FROM pg_extension WHERE extname = 'pg_trgm'").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn expiry_and_deletions_run_beside_applies() {
    const MONTH_MS: u64 = 31 * 24 * 3_600_000;
    let on = Deployment::postgres().await;
    let mut tasks = JoinSet::new();
    for node in 0..3_u64 {
        let archive = on.again().await;
        tasks.spawn(async move {
            for n in 0..30 {
                let old =
                    |seq| message(n * 10 + seq).id(u128::from(node)).at(START_MS - seq * MONTH_MS);
                let mut batch = records((1..=10).map(old));
                batch.push(message(1_000 + n).room("kept").id(u128::from(node * 100 + n)).record());
                if n % 10 == 9 {
                    batch.push(deleted(n / 10));
                }
                archive.apply(batch).await.unwrap();
            }
        });
    }
    let archive = on.again().await;
    for _ in 0..10 {
        archive.expire(at(START_MS - MONTH_MS / 2)).await.unwrap();
    }
    tasks.join_all().await;
    archive.expire(at(START_MS - MONTH_MS / 2)).await.unwrap();
    assert_eq!(on.number("SELECT count(*) FROM messages WHERE room = 'kept'").await, 90);
    assert_eq!(on.number("SELECT count(*) FROM messages").await, 90);
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_move_into_the_partition_of_their_month() {
    let on = Deployment::postgres().await;
    on.apply(records([message(1).at(1000), message(2).at(253_402_300_799_000)])).await;
    assert_eq!(on.number("SELECT count(*) FROM messages_other").await, 2);
    // An entry of the coming month that was stored before its month had a partition.
    on.execute(
        "INSERT INTO messages SELECT room, epoch, ordinal, 3, author, id, connection, flags, \
         sender, kind, '2026-11-02Z', message, payload, text, bytes FROM messages WHERE seq = 1",
    )
    .await;
    on.apply(records([message(4)])).await;
    assert_eq!(on.number("SELECT count(*) FROM messages_2026_11").await, 2);
    assert_eq!(on.number("SELECT count(*) FROM messages_other").await, 2);
    assert_eq!(seqs(&on.newest(9).await).0.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn applies_continue_after_the_server_was_killed() {
    let server = Arc::new(Server::start().await);
    let on = Deployment::on(server.clone()).await;
    let short = ArchiveOptions { connect_timeout: Duration::from_secs(1), ..options() };
    let archive = open(&on.url.clone().into(), short).await.unwrap();
    archive.apply(records([message(1)])).await.unwrap();
    let mut applying = JoinSet::new();
    applying.spawn(async move {
        let deadline = Instant::now() + Duration::from_secs(60);
        let (mut unavailable, mut seq) = (0, 2);
        while seq <= 300 {
            match archive.apply(records([message(seq)])).await {
                Ok(()) => seq += 1,
                Err(ArchiveError::Unavailable(text)) => {
                    assert!(!text.contains(PASSWORD), "{text}");
                    unavailable += 1;
                }
                Err(error) => panic!("{error}"),
            }
            assert!(Instant::now() < deadline, "{seq} after {unavailable} errors");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        unavailable
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.kill();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    server.start_again().await;
    assert!(applying.join_all().await[0] > 0);
    assert_eq!(on.number("SELECT count(*) FROM messages").await, 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_opens_before_its_server_is_there() {
    let server = Arc::new(Server::start().await);
    let url = server.new_database().await;
    server.kill();
    let short = ArchiveOptions { connect_timeout: Duration::from_millis(500), ..options() };
    let archive = open(&url.into(), short).await.unwrap();
    let error = archive.apply(records([message(1)])).await.unwrap_err();
    assert!(matches!(error, ArchiveError::Unavailable(_)), "{error}");
    // The next requests fail at once.
    let begun = Instant::now();
    assert!(archive.head("r".parse().unwrap()).await.is_err());
    assert!(begun.elapsed() < Duration::from_millis(400));
    server.start_again().await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    archive.apply(records([message(1)])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_access_is_unavailable_and_tells_no_password() {
    let server = Server::shared().await;
    let url = server.url("no_such_database");
    for url in [url.clone(), url.replace(PASSWORD, "wrong-secret")] {
        let archive = open(&url.into(), options()).await.unwrap();
        let error = archive.apply(records([message(1)])).await.unwrap_err();
        assert!(matches!(error, ArchiveError::Unavailable(_)), "{error}");
        let text = format!("{error} {error:?}");
        assert!(!text.contains(PASSWORD) && !text.contains("wrong-secret"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn searches_work_without_the_right_to_create_extensions() {
    let on = Deployment::postgres().await;
    // A database of another user, from which only superusers can load the extension.
    on.execute("DROP EXTENSION IF EXISTS pg_trgm").await;
    on.execute(
        "DO $$ BEGIN CREATE ROLE guest LOGIN PASSWORD 'guest'; \
         EXCEPTION WHEN duplicate_object THEN NULL; END $$",
    )
    .await;
    on.execute("CREATE SCHEMA guest AUTHORIZATION guest").await;
    let url = on.url.replace(&format!("skein:{PASSWORD}"), "guest:guest");
    let archive = open(&url.into(), options()).await.unwrap();
    let texts = ["The Quick fox", "quicker", "公园", "100% sure"];
    let samples = (1..).zip(texts).map(|(seq, text)| message(seq).text(text));
    archive.apply(records(samples)).await.unwrap();
    for (text, expected) in
        [("quick", &[1][..]), ("QUICK fox", &[1]), ("公园", &[3]), ("%", &[4]), ("sure %", &[4])]
    {
        let page = archive.search(crate::deployment::query(text)).await.unwrap();
        assert_eq!(seqs(&page).0, expected, "{text}");
    }
}
