//! Prints how many rows a second are applied, and how long reads and searches take.

use std::time::Duration;

use skein_core::{
    archive::{SearchQuery, TimeRange},
    bus::ReadRange,
};
use tokio::time::Instant;

use crate::{
    deployment::{Deployment, query},
    samples::{START_MS, at, message, records},
};

async fn measure(name: &str, on: &Deployment) {
    for size in [1, 50, 500_u64] {
        let deadline = Instant::now() + Duration::from_secs(3);
        let begun = Instant::now();
        let mut seq = 0;
        while Instant::now() < deadline {
            let text = "A message of a chat, about as long as people write them in a room.";
            let batch = (0..size).map(|n| {
                let room = format!("room-{size}-{}", (seq + n) % 50);
                message(seq + n + 1).room(&room).text(text)
            });
            on.apply(records(batch)).await;
            seq += size;
        }
        let rate = seq as f64 / begun.elapsed().as_secs_f64();
        println!("{name}: batches of {size}: {rate:.0} rows/s");
    }
}

/// Prints how long reads and searches take in the archive that [`measure`] has filled.
async fn measure_reads(name: &str, on: &Deployment) {
    let rooms = (0..50).map(|n| format!("room-500-{n}").parse().unwrap());
    let in_rooms = |text: &str| SearchQuery { rooms: rooms.clone().collect(), ..query(text) };
    let before = ReadRange::Before { seq: 5_000, limit: 50 };
    let until = TimeRange { until: Some(at(START_MS + 2_000_000)), ..TimeRange::default() };
    let newest = ReadRange::Newest { limit: 50 };
    let begun = Instant::now();
    on.read_room("room-500-7", before, TimeRange::default()).await;
    println!("{name}: a page: {:?}", begun.elapsed());
    let begun = Instant::now();
    on.read_room("room-500-7", newest, until).await;
    println!("{name}: a page of an earlier time: {:?}", begun.elapsed());
    for text in ["message", "no such words", "zz", "ab"] {
        let begun = Instant::now();
        let found = on.archive.search(in_rooms(text)).await.unwrap().entries.len();
        println!("{name}: a search for {text:?} ({found} found): {:?}", begun.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-full"]
async fn rates_of_requests_are_printed() {
    for (name, on) in
        [("SQLite", Deployment::sqlite().await), ("PostgreSQL", Deployment::postgres().await)]
    {
        measure(name, &on).await;
        println!("{name}: {} rows", on.number("SELECT count(*) FROM messages").await);
        measure_reads(name, &on).await;
    }
}
