//! The rows of a batch of records: checked, without repetitions, in the order of their keys.
//!
//! All nodes write rows in this order, so that two transactions wait for each other and never in a
//! circle.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;
use serde_json::value::RawValue;
use skein_core::{
    archive::ArchiveRecord,
    delivery,
    envelope::{Envelope, FrameType},
    telemetry::log_limiter::LogLimiter,
};
use skein_protocol::{
    ids::{RoomId, UserId},
    position::{Epoch, Position},
};
use uuid::Uuid;

use crate::{sql::Scope, text};

/// Bits of the column `flags`.
pub(crate) const BINARY: i64 = 1;
pub(crate) const NO_ECHO: i64 = 1 << 1;

/// The most rows and bytes of one statement.
const STATEMENT_ROWS_MAX: usize = 500;
const STATEMENT_BYTES_MAX: i64 = 4 << 20;

/// An entry as the tables have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) epoch: Epoch,
    pub(crate) ordinal: i64,
    pub(crate) seq: i64,
    pub(crate) author: Vec<u8>,
    pub(crate) id: Uuid,
    pub(crate) connection: Uuid,
    pub(crate) flags: i64,
    pub(crate) sender: Option<String>,
    pub(crate) kind: Option<String>,
    /// Milliseconds since 1970.
    pub(crate) time: i64,
    pub(crate) message: String,
    pub(crate) payload: Option<Vec<u8>>,
    /// The searchable text of a message, the type of an entry of an inbox.
    pub(crate) extra: Option<String>,
    /// The size of the envelope.
    pub(crate) bytes: i32,
}

/// The highest number of a room and its latest epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) epoch: Epoch,
    pub(crate) ordinal: i64,
    pub(crate) seq: i64,
}

/// Room or inbox, by scope and name.
type Key = (Scope, String);
/// The identity of an entry within its scope.
type Identity = (String, Vec<u8>, Uuid, i64);

/// The changes of a batch.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    messages: BTreeMap<Identity, Row>,
    inboxes: BTreeMap<Identity, Row>,
    /// The highest number and the latest epoch of each room.
    pub(crate) heads: BTreeMap<Key, Head>,
    /// The ordinals below which entries are removed.
    pub(crate) deletions: BTreeMap<Key, i64>,
}

impl Batch {
    /// The changes that `records` make. An entry that no gateway wrote is logged and left out: it
    /// could never be read.
    pub(crate) fn of(records: Vec<ArchiveRecord>) -> Self {
        let mut batch = Self::default();
        for record in records {
            match record {
                ArchiveRecord::Entry { room, position, envelope } => {
                    batch.add(&room, &position, &envelope);
                }
                ArchiveRecord::Deleted { room, ordinal } => {
                    let Some(scope) = Scope::of(&room) else { continue };
                    let key = (scope, room.without_prefix().to_owned());
                    let deleted = batch.deletions.entry(key).or_default();
                    *deleted = clamp(ordinal).max(*deleted);
                }
            }
        }
        batch
    }

    fn add(&mut self, room: &RoomId, position: &Position, envelope: &Envelope) {
        let Some(scope) = Scope::of(room) else { return };
        let head = Head {
            epoch: position.epoch.clone(),
            ordinal: clamp(delivery::ordinal(&position.epoch)),
            seq: clamp(position.seq),
        };
        let rows = match scope {
            Scope::Rooms => &mut self.messages,
            Scope::Inboxes => &mut self.inboxes,
        };
        match Row::of(room, &head, envelope) {
            Some(row) => {
                let identity = (row.name.clone(), row.author.clone(), row.id, row.time);
                let known = rows.entry(identity).or_insert_with(|| row.clone());
                if known.ordinal < row.ordinal {
                    *known = row;
                }
            }
            None => report_invalid("record", room),
        }
        let key = (scope, room.without_prefix().to_owned());
        let known = self.heads.entry(key).or_insert_with(|| head.clone());
        known.seq = known.seq.max(head.seq);
        if known.ordinal < head.ordinal {
            (known.epoch, known.ordinal) = (head.epoch, head.ordinal);
        }
    }

    /// Whether nothing changes.
    pub(crate) fn is_empty(&self) -> bool {
        self.heads.is_empty() && self.deletions.is_empty()
    }

    /// The rows of a scope.
    pub(crate) fn rows(&self, scope: Scope) -> impl Iterator<Item = &Row> {
        match scope {
            Scope::Rooms => self.messages.values(),
            Scope::Inboxes => self.inboxes.values(),
        }
    }

    /// The rows of a scope, in statements of bounded size.
    pub(crate) fn statements(&self, scope: Scope, rows_max: usize) -> Vec<Vec<&Row>> {
        let mut statements: Vec<Vec<&Row>> = Vec::new();
        let mut bytes = 0;
        for row in self.rows(scope) {
            bytes += i64::from(row.bytes);
            match statements.last_mut() {
                Some(last)
                    if last.len() < rows_max.min(STATEMENT_ROWS_MAX)
                        && bytes <= STATEMENT_BYTES_MAX =>
                {
                    last.push(row);
                }
                _ => {
                    bytes = i64::from(row.bytes);
                    statements.push(vec![row]);
                }
            }
        }
        statements
    }
}

impl Row {
    /// `None` if no gateway wrote the envelope.
    fn of(room: &RoomId, head: &Head, envelope: &Envelope) -> Option<Self> {
        Envelope::parse_for_room(envelope.as_bytes().clone(), room).ok()?;
        let fields = std::str::from_utf8(envelope.fields()).ok()?;
        let message = format!("{{{fields}}}");
        let known: KnownFields<'_> = serde_json::from_str(&message).unwrap_or_default();
        let payload = envelope.binary_payload();
        let frame = envelope.frame_type();
        let extra = match frame {
            FrameType::Message => known.content.and_then(text::searchable),
            _ => Some(frame.as_str().to_owned()),
        };
        let is_user = |id: &Cow<'_, str>| id.parse::<UserId>().is_ok();
        let sender = known.from.and_then(|from| from.id).filter(is_user);
        let kind = known.kind.filter(|kind| !kind.contains('\0'));
        let binary = if payload.is_some() { BINARY } else { 0 };
        let no_echo = if envelope.echo() { 0 } else { NO_ECHO };
        let bytes = fields.len() + payload.map_or(0, <[u8]>::len) + HEADER_BYTES;
        Some(Self {
            name: room.without_prefix().to_owned(),
            epoch: head.epoch.clone(),
            ordinal: head.ordinal,
            seq: head.seq,
            author: envelope.author().as_bytes().to_vec(),
            id: envelope.id().0,
            connection: envelope.connection().0,
            flags: binary | no_echo,
            sender: sender.map(Cow::into_owned),
            kind: kind.map(Cow::into_owned),
            time: milliseconds(envelope.accepted_at().unwrap_or(UNIX_EPOCH)),
            payload: payload.map(<[u8]>::to_vec),
            extra,
            bytes: i32::try_from(bytes).unwrap_or(i32::MAX),
            message,
        })
    }
}

/// Bytes of an envelope beside its fields and payload.
const HEADER_BYTES: usize = 46;

/// The fields of a frame that have columns of their own.
#[derive(Default, Deserialize)]
struct KnownFields<'a> {
    #[serde(borrow, default)]
    from: Option<Sender<'a>>,
    #[serde(borrow, default)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Sender<'a> {
    #[serde(borrow, default)]
    id: Option<Cow<'a, str>>,
}

/// Milliseconds since 1970 of the first millisecond that is not before `time`. Entries have whole
/// milliseconds, so that comparisons with it are exact.
pub(crate) fn milliseconds(time: SystemTime) -> i64 {
    /// The end of the year 9999, behind every entry.
    const LAST: i64 = 253_402_300_800_000;
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos().div_ceil(1_000_000)).unwrap_or(LAST).min(LAST)
}

/// The databases have no unsigned numbers. No log reaches the largest one.
pub(crate) fn clamp(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Logs an entry that no gateway wrote, at most once in a minute.
pub(crate) fn report_invalid(place: &str, room: &RoomId) {
    static LIMITER: LogLimiter = LogLimiter::new();
    if let Some(suppressed) = LIMITER.should_log() {
        tracing::error!(place, %room, suppressed,
            "the archive skips an entry that no gateway wrote");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use skein_core::envelope::{AuthorHash, EnvelopeParts};
    use skein_protocol::ids::{ConnectionId, MessageId};

    use super::*;

    fn record(epoch: &str, seq: u64, id: u128) -> ArchiveRecord {
        let fields = format!(
            r#""room":"r","id":"{}","from":{{"id":"ann","name":"A"}},{}"#,
            Uuid::from_u128(id),
            r#""kind":"image","content":"Hi","timestamp":"2026-12-01T00:00:00.001Z""#
        );
        let envelope = Envelope::pack(EnvelopeParts {
            frame: FrameType::Message,
            author: AuthorHash::of(&"ann".parse().unwrap()),
            id: MessageId(Uuid::from_u128(id)),
            sender: ConnectionId(Uuid::nil()),
            echo: false,
            fields: &fields,
            binary_payload: None,
        });
        let position = Position::new(epoch.parse().unwrap(), seq);
        ArchiveRecord::Entry { room: "r".parse().unwrap(), position, envelope }
    }

    #[test]
    fn a_row_has_the_fields_of_the_message() {
        let batch = Batch::of(vec![record("3-x", 7, 1)]);
        let row = batch.rows(Scope::Rooms).next().unwrap();
        assert_eq!((row.ordinal, row.seq, row.flags), (3, 7, NO_ECHO));
        assert_eq!((row.sender.as_deref(), row.kind.as_deref()), (Some("ann"), Some("image")));
        assert_eq!((row.time, row.extra.as_deref()), (1_796_083_200_001, Some("Hi")));
        assert_eq!(row.message.as_bytes()[0], b'{');
    }

    #[test]
    fn a_batch_keeps_the_latest_position_of_a_message() {
        let records = vec![record("2-y", 4, 1), record("1-x", 9, 1), record("1-x", 8, 2)];
        let batch = Batch::of(records);
        let rows: Vec<_> = batch.rows(Scope::Rooms).map(|row| (row.ordinal, row.seq)).collect();
        assert_eq!(rows, [(2, 4), (1, 8)]);
        let head = &batch.heads[&(Scope::Rooms, "r".to_owned())];
        assert_eq!((head.epoch.as_str(), head.seq), ("2-y", 9));
    }

    #[test]
    fn statements_are_bounded() {
        let batch = Batch::of((0..1_001).map(|id| record("1-x", 1, id)).collect());
        let sizes = |max| -> Vec<usize> {
            batch.statements(Scope::Rooms, max).iter().map(Vec::len).collect()
        };
        assert_eq!(sizes(1_000), [500, 500, 1]);
        assert_eq!(sizes(400), [400, 400, 201]);
        assert!(batch.statements(Scope::Inboxes, 10).is_empty());
    }

    #[test]
    fn times_between_milliseconds_are_rounded_up() {
        let at = |nanos| milliseconds(UNIX_EPOCH + Duration::from_nanos(nanos));
        assert_eq!((at(0), at(1), at(1_000_000), at(1_000_001)), (0, 1, 1, 2));
        assert_eq!(milliseconds(UNIX_EPOCH - Duration::from_secs(1)), 0);
    }
}
