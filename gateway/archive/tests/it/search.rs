//! Searches, the same on both databases.

use skein_archive::{ArchiveOptions, open};
use skein_core::{
    archive::{ArchiveError, SearchCursor, SearchQuery, TimeRange},
    envelope::FrameType,
};

use crate::{
    deployment::{Deployment, on_both, options, query},
    samples::{START_MS, Sample, at, message, records, seqs},
};

/// Applies messages with these texts, numbered from 1.
async fn apply_texts(on: &Deployment, texts: &[&str]) {
    on.apply(records((1..).zip(texts).map(|(seq, text)| message(seq).text(text)))).await;
}

#[track_caller]
fn check(found: (Vec<u64>, bool), expected: &[u64], text: &str) {
    assert_eq!(found, (expected.to_vec(), false), "{text}");
}

on_both! {
    all_words_match_in_any_case_and_script,
    operators_are_plain_text,
    searches_see_strings_of_content_of_messages_only,
    sender_and_time_narrow_a_search,
    pages_of_a_search_continue_below_the_cursor,
    searches_are_bounded,
    a_long_search_ends_at_its_limit,
    removed_messages_are_not_found,
}

async fn all_words_match_in_any_case_and_script(on: Deployment) {
    apply_texts(
        &on,
        &[
            "The Quick brown fox",
            "a quick dog",
            "我们今天去公园吃饭",
            "公园里有狗 👍🏽",
            "Ärger über Öl",
            "Привет, мир",
        ],
    )
    .await;
    for (text, expected) in [
        ("quick", &[2, 1][..]),
        ("QUICK FOX", &[1]),
        ("quick cat", &[]),
        ("ick bro", &[1]),
        ("公园", &[4, 3]),
        ("今天去公园", &[3]),
        ("公园 狗", &[4]),
        ("园", &[4, 3]),
        ("👍", &[4]),
        ("👍🏽", &[4]),
        ("ÄRGER", &[5]),
        ("öl", &[5]),
        ("МИР", &[6]),
        ("a", &[2]),
        ("do", &[2]),
        ("dog a", &[2]),
        ("", &[6, 5, 4, 3, 2, 1]),
    ] {
        check(seqs(&on.search(text).await), expected, text);
    }
}

async fn operators_are_plain_text(on: Deployment) {
    let texts = [
        "100% sure",
        "snake_case_name",
        "say \"hello\" now",
        "C:\\temp\\file",
        "a* b",
        "one NEAR two",
        "alpha AND beta",
        "alpha beta",
        "it's -minus text:col {x} (paren) ^",
        "plain words",
    ];
    apply_texts(&on, &texts).await;
    for (text, expected) in [
        ("100%", &[1][..]),
        ("%", &[1]),
        ("0_%", &[]),
        ("_", &[2]),
        ("snake_case", &[2]),
        ("snakeXcase", &[]),
        ("\"hello\"", &[3]),
        ("\"", &[3]),
        ("\"\"\"", &[]),
        ("\\temp\\", &[4]),
        ("\\", &[4]),
        ("a*", &[5]),
        ("alp*", &[]),
        ("NEAR", &[6]),
        ("NEAR(one", &[]),
        ("alpha OR plain", &[]),
        ("alpha AND", &[7]),
        ("alpha beta", &[8, 7]),
        ("NOT plain", &[]),
        ("-minus", &[9]),
        ("text:col", &[9]),
        ("text:snake", &[]),
        ("{x}", &[9]),
        ("(paren)", &[9]),
        ("it's", &[9]),
        ("'; DROP TABLE messages; --", &[]),
        ("^", &[9]),
        ("plain\0words", &[10]),
    ] {
        check(seqs(&on.search(text).await), expected, text);
    }
}

async fn searches_see_strings_of_content_of_messages_only(on: Deployment) {
    on.apply(records([
        message(1).content(r#"{"title":"needle","list":["one\u0000two"]}"#),
        message(2).content(r#"{"needle":1}"#),
        Sample { payload: Some(b"needle".to_vec()), ..message(3) },
        message(4).text("needle").inbox("r", FrameType::Direct),
        message(5).room("s").text("needle"),
        message(6).text(&format!("{} needle", "x".repeat(9_000))),
    ]))
    .await;
    check(seqs(&on.search("needle").await), &[1], "needle");
    check(seqs(&on.search("onetwo").await), &[1], "onetwo");
    let rooms = |rooms: &[&str]| rooms.iter().map(|room| room.parse().unwrap()).collect();
    let both = SearchQuery { rooms: rooms(&["s", "r"]), ..query("needle") };
    let page = on.archive.search(both).await.unwrap();
    assert_eq!(seqs(&page), (vec![5, 1], false));
    assert_eq!(page.entries[0].room.as_str(), "s");
    let none = SearchQuery { rooms: vec![], ..query("needle") };
    check(seqs(&on.archive.search(none).await.unwrap()), &[], "no rooms");
    let inbox = skein_protocol::ids::RoomId::inbox_of(&"r".parse().unwrap());
    let inbox = SearchQuery { rooms: vec![inbox], ..query("needle") };
    check(seqs(&on.archive.search(inbox).await.unwrap()), &[], "inbox");
}

async fn sender_and_time_narrow_a_search(on: Deployment) {
    let from_bob = Sample { sender: "bob".to_owned(), ..message(2).text("needle") };
    on.apply(records([message(1).text("needle"), from_bob, message(3).text("needle")])).await;
    for text in ["needle", "ne", ""] {
        let by = SearchQuery { sender: Some("bob".parse().unwrap()), ..query(text) };
        check(seqs(&on.archive.search(by).await.unwrap()), &[2], text);
        let time = TimeRange { since: Some(at(START_MS + 2000)), until: Some(at(START_MS + 3000)) };
        let during = SearchQuery { time, ..query(text) };
        check(seqs(&on.archive.search(during).await.unwrap()), &[2], text);
    }
}

async fn pages_of_a_search_continue_below_the_cursor(on: Deployment) {
    let samples = (1..=30).map(|seq| {
        // Several messages have one time, in two rooms.
        let room = if seq % 2 == 0 { "r" } else { "s" };
        message(seq).room(room).text("needle").at(START_MS + seq / 5)
    });
    on.apply(records(samples)).await;
    for text in ["needle", "le"] {
        let mut found = vec![];
        let mut next = query(text);
        (next.limit, next.rooms) = (7, vec!["r".parse().unwrap(), "s".parse().unwrap()]);
        loop {
            let page = on.archive.search(next.clone()).await.unwrap();
            found.extend(page.entries.iter().map(|entry| entry.position.seq));
            if !page.more {
                break;
            }
            assert_eq!(page.entries.len(), 7);
            let last = page.entries.last().unwrap();
            let time = last.envelope.accepted_at().unwrap();
            let time_ms = time.duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as i64;
            let (room, seq) = (last.room.clone(), last.position.seq);
            next.before = Some(SearchCursor { time_ms, room, seq });
        }
        let mut expected: Vec<u64> = (1..=30).collect();
        expected.sort_by_key(|seq| std::cmp::Reverse((seq / 5, seq % 2, *seq)));
        assert_eq!(found, expected, "{text}");
    }
}

async fn searches_are_bounded(on: Deployment) {
    let rooms = (0..501).map(|n| format!("r{n}").parse().unwrap()).collect();
    let many = SearchQuery { rooms, ..query("x") };
    assert!(matches!(on.archive.search(many).await, Err(ArchiveError::Rejected(_))));
    let words = query(&"x ".repeat(17));
    assert!(matches!(on.archive.search(words).await, Err(ArchiveError::Rejected(_))));
    let large = |seq| message(seq).text(&format!("needle {}", "x".repeat(100 * 1024)));
    on.apply(records((1..=6).map(large))).await;
    assert_eq!(seqs(&on.search("needle").await), (vec![6, 5], true));
}

async fn removed_messages_are_not_found(on: Deployment) {
    apply_texts(&on, &["needle one", "needle two"]).await;
    on.apply(records([message(3).epoch("2-b").text("needle three")])).await;
    on.apply(vec![crate::samples::deleted(2)]).await;
    check(seqs(&on.search("needle").await), &[3], "after the deletion");
    on.archive.expire(at(START_MS * 2)).await.unwrap();
    check(seqs(&on.search("needle").await), &[], "after expiry");
    on.apply(records([message(4).epoch("2-b").text("needle four")])).await;
    check(seqs(&on.search("needle").await), &[4], "afterwards");
}

async fn a_long_search_ends_at_its_limit(on: Deployment) {
    let text = "needle in a text of some length, so that it takes a while to look at it";
    for n in 0..10 {
        on.apply(records((1..=500).map(|seq| message(n * 500 + seq).text(text)))).await;
    }
    let request_timeout = std::time::Duration::from_millis(1);
    let options = ArchiveOptions { request_timeout, ..options() };
    let archive = open(&on.url.clone().into(), options).await.unwrap();
    let error = archive.search(query("needle length")).await.unwrap_err();
    assert!(matches!(error, ArchiveError::Unavailable(_)), "{error}");
    check(seqs(&on.search("needle nothing").await), &[], "the other archive");
}
