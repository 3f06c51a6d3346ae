//! Applying, reading and removing, the same on both databases.

use skein_core::{
    archive::{PAGE_BYTES_MAX, TimeRange},
    bus::ReadRange,
    envelope::FrameType,
};

use crate::{
    deployment::{Deployment, on_both},
    samples::{START_MS, Sample, at, deleted, message, positions, records, seqs},
};

on_both! {
    applying_twice_changes_nothing,
    a_message_appended_again_has_its_later_position,
    a_batch_may_have_duplicates,
    a_deletion_removes_earlier_epochs_for_good,
    pages_follow_each_other_in_both_directions,
    entries_with_one_number_stay_on_one_page,
    a_time_range_has_its_begin_and_not_its_end,
    entries_are_read_byte_for_byte,
    the_trace_of_a_message_is_not_kept,
    the_database_can_query_the_json_of_messages,
    pages_have_bounded_bytes_and_at_least_one_entry,
    expiry_removes_old_entries_and_keeps_heads,
    a_row_that_no_gateway_wrote_is_skipped,
    an_entry_that_no_gateway_wrote_is_not_kept,
    concurrent_batches_are_all_applied,
    a_schema_of_a_newer_version_is_refused,
}

async fn applying_twice_changes_nothing(on: Deployment) {
    for _ in 0..2 {
        on.apply(records((1..=5).map(message))).await;
    }
    on.apply(vec![]).await;
    assert_eq!(seqs(&on.newest(10).await), (vec![1, 2, 3, 4, 5], false));
    assert_eq!(on.head("r").await.as_deref(), Some("1-a:5"));
    assert_eq!(
        (
            on.head("other").await,
            seqs(
                &on.read_room("other", ReadRange::Newest { limit: 1 }, TimeRange::default()).await
            )
        ),
        (None, (vec![], false))
    );
}

async fn a_message_appended_again_has_its_later_position(on: Deployment) {
    on.apply(records((1..=3).map(message))).await;
    let again = Sample { seq: 2, ..message(3) }.epoch("2-b");
    on.apply(vec![again.record()]).await;
    // A late copy of the earlier record does not move it back.
    on.apply(records([message(3)])).await;
    assert_eq!(positions(&on.newest(10).await), ["1-a:1", "1-a:2", "2-b:2"]);
    assert_eq!(on.head("r").await.as_deref(), Some("2-b:3"));
}

async fn a_batch_may_have_duplicates(on: Deployment) {
    let again = message(1).epoch("2-b");
    on.apply(records([message(1), message(1), again.clone(), message(2), again])).await;
    assert_eq!(positions(&on.newest(10).await), ["2-b:1", "1-a:2"]);
}

async fn a_deletion_removes_earlier_epochs_for_good(on: Deployment) {
    on.apply(records([message(1), message(2), message(3).epoch("2-b")])).await;
    on.apply(records([message(1).room("other")])).await;
    on.apply(vec![deleted(2), deleted(1)]).await;
    assert_eq!(positions(&on.newest(10).await), ["2-b:3"]);
    // A late entry, in a batch of its own and beside the deletion.
    on.apply(records([message(4)])).await;
    on.apply(vec![message(6).record(), message(7).epoch("3-c").record(), deleted(3)]).await;
    assert_eq!(positions(&on.newest(10).await), ["3-c:7"]);
    assert_eq!(on.head("r").await.as_deref(), Some("3-c:7"));
    let newest = ReadRange::Newest { limit: 9 };
    assert_eq!(seqs(&on.read_room("other", newest, TimeRange::default()).await).0, [1]);
}

async fn pages_follow_each_other_in_both_directions(on: Deployment) {
    on.apply(records((1..=10).map(message))).await;
    assert_eq!(seqs(&on.newest(4).await), (vec![7, 8, 9, 10], true));
    assert_eq!(seqs(&on.newest(10).await), ((1..=10).collect(), false));
    let before = |seq, limit| ReadRange::Before { seq, limit };
    assert_eq!(seqs(&on.read(before(7, 4)).await), (vec![3, 4, 5, 6], true));
    assert_eq!(seqs(&on.read(before(3, 4)).await), (vec![1, 2], false));
    assert_eq!(seqs(&on.read(before(1, 4)).await), (vec![], false));
    let after = |seq, limit| ReadRange::After { seq, limit };
    assert_eq!(seqs(&on.read(after(0, 4)).await), (vec![1, 2, 3, 4], true));
    assert_eq!(seqs(&on.read(after(6, 4)).await), (vec![7, 8, 9, 10], false));
    assert_eq!(seqs(&on.read(after(10, 4)).await), (vec![], false));
    assert_eq!(seqs(&on.read(before(u64::MAX, 1)).await), (vec![10], true));
    assert_eq!(seqs(&on.read(after(0, 0)).await), (vec![], false));
    assert_eq!(seqs(&on.newest(u32::MAX).await).0.len(), 10);
}

async fn entries_with_one_number_stay_on_one_page(on: Deployment) {
    let second =
        |seq| Sample { epoch: "2-b".to_owned(), id: 100 + u128::from(seq), ..message(seq) };
    on.apply(records((1..=5).map(message))).await;
    on.apply(records([second(3), second(4), second(3).id(500).epoch("3-c")])).await;
    let page = on.newest(2).await;
    assert_eq!(
        (positions(&page), page.more),
        (vec!["1-a:4".into(), "2-b:4".into(), "1-a:5".into()], true)
    );
    let page = on.read(ReadRange::Before { seq: 4, limit: 1 }).await;
    assert_eq!(
        (positions(&page), page.more),
        (vec!["1-a:3".into(), "2-b:3".into(), "3-c:3".into()], true)
    );
    let page = on.read(ReadRange::After { seq: 2, limit: 1 }).await;
    assert_eq!((seqs(&page)), (vec![3, 3, 3], true));
    assert_eq!(seqs(&on.read(ReadRange::After { seq: 3, limit: 9 }).await), (vec![4, 4, 5], false));
}

async fn a_time_range_has_its_begin_and_not_its_end(on: Deployment) {
    on.apply(records((1..=5).map(message))).await;
    let newest = |limit| ReadRange::Newest { limit };
    let time = |since, until| TimeRange { since, until };
    let second = |n: u64| Some(at(START_MS + n * 1000));
    let page = on.read_room("r", newest(9), time(second(2), second(4))).await;
    assert_eq!(seqs(&page), (vec![2, 3], false));
    let page = on.read_room("r", newest(1), time(second(2), second(4))).await;
    assert_eq!(seqs(&page), (vec![3], true));
    let after = second(2).map(|time| time + std::time::Duration::from_nanos(1));
    assert_eq!(seqs(&on.read_room("r", newest(9), time(after, None)).await).0, [3, 4, 5]);
    assert_eq!(seqs(&on.read_room("r", newest(9), time(None, after)).await).0, [1, 2]);
    let page = on.read_room("r", ReadRange::After { seq: 1, limit: 2 }, time(second(3), None));
    assert_eq!(seqs(&page.await), (vec![3, 4], true));
}

async fn entries_are_read_byte_for_byte(on: Deployment) {
    let contents = [
        r#""Hello 世界 👍🏽 \u0000 \ud83d\udc4d \ud800 %_\\""#,
        r#"{ "a" : [1.0e+5, -0, true,null , {}],"a":"again","深":{"x":[[]]} }"#,
        r#""it's \"quoted\" \/ $1 ?1 :x""#,
    ];
    let mut samples: Vec<Sample> =
        (1..).zip(contents).map(|(seq, content)| message(seq).content(content)).collect();
    samples.push(message(10).text(&"世".repeat(256 * 1024 / 3)));
    samples.push(Sample { payload: Some(vec![0, 255, b'"', b'}']), echo: false, ..message(11) });
    samples.push(Sample { payload: Some(vec![]), ..message(12) });
    samples.push(Sample { payload: Some(vec![7; 256 * 1024]), ..message(13) });
    samples.push(message(14).at(0));
    samples.push(message(15).at(253_402_300_799_999));
    on.round_trip(&samples).await;
    let inbox = [
        message(1).inbox("bob|1", FrameType::Direct),
        message(2).inbox("bob|1", FrameType::Notification),
        Sample { payload: Some(vec![1, 2]), ..message(3).inbox("bob|1", FrameType::Direct) },
    ];
    on.round_trip(&inbox).await;
    // The room of the same name is another one.
    assert_eq!(on.number("SELECT count(*) FROM inbox_entries").await, 3);
    assert_eq!(on.number("SELECT count(*) FROM messages").await, 9);
    let sql = "SELECT count(*) FROM inbox_entries WHERE type = 'direct' AND \"user\" = 'bob|1'";
    assert_eq!(on.number(sql).await, 2);
}

async fn the_trace_of_a_message_is_not_kept(on: Deployment) {
    let sample = message(1);
    let envelope = sample.envelope();
    let fields = std::str::from_utf8(envelope.fields()).unwrap().to_owned();
    let traced = skein_core::envelope::EnvelopeParts {
        frame: FrameType::Message,
        author: envelope.author(),
        id: envelope.id(),
        sender: envelope.connection(),
        echo: true,
        fields: &fields,
        binary_payload: None,
    };
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().unwrap();
    let traced = skein_core::envelope::Envelope::pack_traced(traced, Some(trace));
    on.apply(vec![skein_core::archive::ArchiveRecord::Entry {
        room: sample.room.clone(),
        position: sample.position(),
        envelope: traced,
    }])
    .await;
    assert_eq!(on.newest(1).await.entries[0].envelope, envelope);
}

async fn the_database_can_query_the_json_of_messages(on: Deployment) {
    on.apply(records([message(1).content(r#"{"score":42}"#)])).await;
    let sql = if on.is_postgres() {
        "SELECT (message::jsonb #>> '{content,score}')::bigint FROM messages"
    } else {
        "SELECT json_extract(message, '$.content.score') FROM messages"
    };
    assert_eq!(on.number(sql).await, 42);
}

async fn pages_have_bounded_bytes_and_at_least_one_entry(on: Deployment) {
    let large = |seq| message(seq).text(&"x".repeat(100 * 1024));
    on.apply(records((1..=6).map(large))).await;
    assert_eq!(seqs(&on.newest(10).await), (vec![5, 6], true));
    assert_eq!(seqs(&on.read(ReadRange::After { seq: 0, limit: 10 }).await), (vec![1, 2], true));
    on.apply(records([message(7).text(&"x".repeat(PAGE_BYTES_MAX))])).await;
    assert_eq!(seqs(&on.newest(10).await), (vec![7], true));
    let small = |seq| message(seq).room("s");
    on.apply(records((1..=2_000).map(small))).await;
    let page = on.read_room("s", ReadRange::Newest { limit: 3_000 }, TimeRange::default()).await;
    let bytes: usize = page.entries.iter().map(|entry| entry.envelope.as_bytes().len()).sum();
    let each = bytes / page.entries.len();
    assert!(bytes <= PAGE_BYTES_MAX && bytes > PAGE_BYTES_MAX - 2 * each, "{bytes}");
}

async fn expiry_removes_old_entries_and_keeps_heads(on: Deployment) {
    const MONTH_MS: u64 = 31 * 24 * 3_600_000;
    let month = |seq: u64| message(seq).at(START_MS - (10 - seq) * MONTH_MS);
    on.apply(records((1..=9).map(month))).await;
    on.apply(records([message(20).at(1000), message(21).at(253_402_300_799_000)])).await;
    let inbox = |seq| month(seq).inbox("bob", FrameType::Notification);
    on.apply(records((1..=9).map(inbox))).await;
    let before = at(START_MS - 5 * MONTH_MS + 1);
    assert_eq!(on.archive.expire(before).await.unwrap(), 5 + 1 + 5);
    assert_eq!(on.archive.expire(before).await.unwrap(), 0);
    assert_eq!(seqs(&on.newest(20).await), (vec![6, 7, 8, 9, 21], false));
    // The times of all entries are before this one.
    assert_eq!(on.archive.expire(at(253_402_300_800_000)).await.unwrap(), 5 + 4);
    assert_eq!(seqs(&on.newest(20).await), (vec![], false));
    assert_eq!(on.head("r").await.as_deref(), Some("1-a:21"));
    on.apply(records((1..=2).map(month))).await;
    assert_eq!(seqs(&on.newest(20).await), (vec![1, 2], false));
    assert_eq!(on.head("r").await.as_deref(), Some("1-a:21"));
}

async fn a_row_that_no_gateway_wrote_is_skipped(on: Deployment) {
    on.apply(records((1..=6).map(message))).await;
    on.execute("UPDATE messages SET message = '{\"room\":\"other\"}' WHERE seq = 3").await;
    on.execute("UPDATE messages SET message = 'x' WHERE seq = 4").await;
    on.execute("UPDATE messages SET epoch = 'no epoch' WHERE seq = 5").await;
    assert_eq!(seqs(&on.newest(10).await), (vec![1, 2, 6], false));
    // A page of such rows alone does not end the history.
    assert_eq!(seqs(&on.read(ReadRange::Before { seq: 6, limit: 2 }).await), (vec![2], true));
    assert_eq!(seqs(&on.read(ReadRange::After { seq: 2, limit: 1 }).await), (vec![6], false));
}

async fn an_entry_that_no_gateway_wrote_is_not_kept(on: Deployment) {
    let elsewhere = message(2).room("s").envelope();
    let record = |envelope| skein_core::archive::ArchiveRecord::Entry {
        room: "r".parse().unwrap(),
        position: message(2).position(),
        envelope,
    };
    on.apply(vec![message(1).record(), record(elsewhere)]).await;
    assert_eq!(seqs(&on.newest(10).await).0, [1]);
    assert_eq!(on.head("r").await.as_deref(), Some("1-a:2"));
}

async fn concurrent_batches_are_all_applied(on: Deployment) {
    let tasks: tokio::task::JoinSet<()> = (0..8_u64)
        .map(|task| {
            let archive = on.archive.clone();
            let batch = move |n: u64| {
                records((1..=20).flat_map(move |seq| {
                    // All tasks apply the same rooms, half of them the same messages.
                    let message =
                        message(n * 20 + seq).id(u128::from(task / 2 * 1_000 + n * 20 + seq));
                    [message.clone().room("a"), message.room("b")]
                }))
            };
            async move {
                for n in 0..5 {
                    archive.apply(batch(n)).await.unwrap();
                }
            }
        })
        .collect();
    tasks.join_all().await;
    assert_eq!(on.number("SELECT count(*) FROM messages").await, 4 * 5 * 20 * 2);
    assert_eq!(on.head("a").await.as_deref(), Some("1-a:100"));
}

async fn a_schema_of_a_newer_version_is_refused(on: Deployment) {
    on.apply(records([message(1)])).await;
    on.execute(
        "INSERT INTO _sqlx_migrations \
         (version, description, success, checksum, execution_time) \
         VALUES (9999, 'later', true, '', 0)",
    )
    .await;
    let error =
        match skein_archive::open(&on.url.clone().into(), crate::deployment::options()).await {
            Err(error) => error.to_string(),
            Ok(archive) => archive.apply(records([message(2)])).await.unwrap_err().to_string(),
        };
    // The refusal leaves nothing behind that others would wait for.
    on.execute("DELETE FROM _sqlx_migrations WHERE version = 9999").await;
    on.again().await.apply(records([message(3)])).await.unwrap();
    assert!(error.contains("schema 9999") && error.contains("restore a backup"), "{error}");
}
