//! Metrics of the messages that virtual users send and receive.

use hdrhistogram::Histogram;
use memchr::memmem;
use serde::{Deserialize, Serialize};
use skein_testkit::timeline::{Second, Timeline};
use tokio::time::{Duration, Instant};

/// Upper bound of the examples that are kept.
const EXAMPLES_MAX: usize = 20;
/// Upper bound of a recorded delay, µs; longer delays count as this.
const LAG_MAX_US: u64 = 60_000_000;

/// The type of a frame, as far as virtual users distinguish it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FrameKind {
    Message,
    Ack,
    Error,
    Reset,
    Connected,
    Joined,
    Other,
}

impl FrameKind {
    const ALL: [(&str, Self); 6] = [
        ("message", Self::Message),
        ("ack", Self::Ack),
        ("error", Self::Error),
        ("reset", Self::Reset),
        ("connected", Self::Connected),
        ("joined", Self::Joined),
    ];

    /// Classifies a frame by its first member if that is `type`, as with the gateway; otherwise
    /// parses all of it.
    pub(super) fn of(frame: &[u8]) -> Self {
        let read;
        let name = match frame.strip_prefix(br#"{"type":""#) {
            Some(rest) => rest.split(|byte| *byte == b'"').next().unwrap_or_default(),
            None => {
                read = serde_json::from_slice::<TypedFrame>(frame).unwrap_or_default();
                read.kind.as_bytes()
            }
        };
        let kind = Self::ALL.into_iter().find(|(of, _)| of.as_bytes() == name);
        kind.map_or(Self::Other, |(_, kind)| kind)
    }
}

#[derive(Default, Deserialize)]
struct TypedFrame {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct SeqFrame {
    seq: u64,
}

/// Parses the `seq` of a `joined` or `reset`, wherever it is in the frame.
pub(super) fn parse_seq(frame: &[u8]) -> Result<u64, String> {
    let numbered: Result<SeqFrame, _> = serde_json::from_slice(frame);
    numbered.map(|numbered| numbered.seq).map_err(|error| format!("frame without `seq`: {error}"))
}

/// Finds the `seq` of a `message`, which precedes any content.
pub(super) fn find_seq(frame: &[u8]) -> Option<u64> {
    let at = memmem::find(frame, br#""seq":"#)? + 6;
    let digits = frame[at..].iter().take_while(|byte| byte.is_ascii_digit());
    digits.map(|digit| u64::from(digit - b'0')).fold(None, |number: Option<u64>, digit| {
        Some(number.unwrap_or(0).wrapping_mul(10).wrapping_add(digit))
    })
}

/// Metrics of one process, which are added to those of the other workers.
#[derive(Debug)]
pub(crate) struct TrafficMetrics {
    pub(crate) counters: MessageCounters,
    /// How late due operations began, µs.
    pub(crate) lag_us: Histogram<u64>,
    pub(crate) timeline: Timeline,
}

/// Message counters.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct MessageCounters {
    pub(crate) sent: u64,
    /// For each room.
    pub(crate) acknowledged: Vec<u64>,
    pub(crate) delivered: u64,
    pub(crate) rejected: u64,
    pub(crate) duplicated: u64,
    pub(crate) out_of_order: u64,
    pub(crate) gaps: u64,
    pub(crate) signalled_discontinuities: u64,
    pub(crate) lost: u64,
    /// Messages that were neither acknowledged nor rejected.
    pub(crate) unanswered: u64,
    pub(crate) longest_silence_ms: u64,
    pub(crate) examples: Vec<String>,
}

impl MessageCounters {
    /// Adds the counters of another process.
    pub(crate) fn add(&mut self, other: Self) {
        self.acknowledged.resize(other.acknowledged.len().max(self.acknowledged.len()), 0);
        let rooms = self.acknowledged.iter_mut().zip(other.acknowledged);
        rooms.for_each(|(sum, more)| *sum += more);
        self.sent += other.sent;
        self.delivered += other.delivered;
        self.rejected += other.rejected;
        self.duplicated += other.duplicated;
        self.out_of_order += other.out_of_order;
        self.gaps += other.gaps;
        self.signalled_discontinuities += other.signalled_discontinuities;
        self.lost += other.lost;
        self.unanswered += other.unanswered;
        self.longest_silence_ms = self.longest_silence_ms.max(other.longest_silence_ms);
        self.examples.extend(other.examples);
        self.examples.truncate(EXAMPLES_MAX);
    }

    pub(super) fn example(&mut self, what: impl FnOnce() -> String) {
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(what());
        }
    }

    /// Compares the `seq` of a message with that of the message before, and counts a violation.
    pub(super) fn count_seq(&mut self, member: usize, last: u64, seq: u64) {
        if seq == last + 1 {
            return;
        }
        let count = match seq {
            same if same == last => &mut self.duplicated,
            lower if lower < last => &mut self.out_of_order,
            _ => &mut self.gaps,
        };
        *count += 1;
        self.example(|| format!("member {member}: seq {seq} after {last}"));
    }
}

impl TrafficMetrics {
    /// Empty metrics for so many rooms, with `open` connections.
    pub(crate) fn new(rooms: usize, open: u64) -> Self {
        let counters =
            MessageCounters { acknowledged: vec![0; rooms], ..MessageCounters::default() };
        Self { counters, lag_us: lag_histogram(), timeline: Timeline::new(open) }
    }

    /// Records that an operation which was due at `due` began at `now`.
    pub(crate) fn record_lag(&mut self, due: Instant, now: Instant) {
        let late = now.saturating_duration_since(due);
        self.lag_us.saturating_record(late.as_micros() as u64);
    }

    /// Counters of each second.
    pub(crate) fn seconds(&mut self) -> Vec<Second> {
        self.timeline.seconds()
    }

    pub(super) fn delivered(&mut self, now: Instant, latency: Option<Duration>) {
        self.counters.delivered += 1;
        self.timeline.delivered(now, latency);
    }
}

/// An empty histogram of delays in µs.
pub(crate) fn lag_histogram() -> Histogram<u64> {
    Histogram::new_with_max(LAG_MAX_US, 3).expect("3 digits are possible")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_seq_reads_the_seq_of_the_entry() {
        let frame = br#"{"type":"message","epoch":"e","seq":1207,"content":{"seq":9}}"#;
        assert_eq!((FrameKind::of(frame), find_seq(frame)), (FrameKind::Message, Some(1207)));
        assert_eq!(find_seq(br#"{"seq":"x"}"#), None);
        assert_eq!(find_seq(b"{}"), None);
        assert_eq!(FrameKind::of(b"{}"), FrameKind::Other);
        assert_eq!(FrameKind::of(br#"{"seq":1,"type":"ack"}"#), FrameKind::Ack);
        assert_eq!(parse_seq(br#"{"history":[{"seq":3}],"seq":7}"#), Ok(7));
        assert!(parse_seq(b"{}").is_err());
    }

    #[test]
    fn seq_is_compared_with_the_one_before() {
        let mut counters = MessageCounters::default();
        for (last, seq) in [(1, 2), (2, 2), (2, 1), (2, 4)] {
            counters.count_seq(0, last, seq);
        }
        assert_eq!((counters.duplicated, counters.out_of_order, counters.gaps), (1, 1, 1));
        assert_eq!(counters.examples.len(), 3);
    }
}
