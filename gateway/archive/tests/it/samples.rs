//! Records of messages, directs and notifications.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use skein_core::{
    archive::{ArchivePage, ArchiveRecord},
    envelope::{AuthorHash, Envelope, EnvelopeParts, FrameType},
};
use skein_protocol::{
    ids::{ConnectionId, MessageId, RoomId},
    position::{Position, Seq},
};
use uuid::Uuid;

/// The time of the message with id 0: 2026-11-15T12:00:00Z. That with id n is n seconds later.
pub(crate) const START_MS: u64 = 1_794_744_000_000;

/// A message that is about to be recorded.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) room: RoomId,
    pub(crate) epoch: String,
    pub(crate) seq: Seq,
    pub(crate) id: u128,
    pub(crate) sender: String,
    pub(crate) frame: FrameType,
    pub(crate) echo: bool,
    /// JSON.
    pub(crate) content: String,
    pub(crate) payload: Option<Vec<u8>>,
    pub(crate) time_ms: u64,
}

/// The message `seq` of epoch `1-a` of room `r`, with the number as its id and content.
pub(crate) fn message(seq: Seq) -> Sample {
    Sample {
        room: "r".parse().unwrap(),
        epoch: "1-a".to_owned(),
        seq,
        id: u128::from(seq),
        sender: "ann".to_owned(),
        frame: FrameType::Message,
        echo: true,
        content: seq.to_string(),
        payload: None,
        time_ms: START_MS + seq * 1000,
    }
}

impl Sample {
    pub(crate) fn room(self, room: &str) -> Self {
        Self { room: room.parse().unwrap(), ..self }
    }

    pub(crate) fn epoch(self, epoch: &str) -> Self {
        Self { epoch: epoch.to_owned(), ..self }
    }

    pub(crate) fn id(self, id: u128) -> Self {
        Self { id, ..self }
    }

    pub(crate) fn at(self, time_ms: u64) -> Self {
        Self { time_ms, ..self }
    }

    pub(crate) fn text(self, text: &str) -> Self {
        Self { content: serde_json::to_string(text).unwrap(), ..self }
    }

    pub(crate) fn content(self, json: &str) -> Self {
        Self { content: json.to_owned(), ..self }
    }

    pub(crate) fn inbox(self, user: &str, frame: FrameType) -> Self {
        Self { room: RoomId::inbox_of(&user.parse().unwrap()), frame, ..self }
    }

    pub(crate) fn envelope(&self) -> Envelope {
        let id = MessageId(Uuid::from_u128(self.id));
        let timestamp = skein_protocol::timestamp(at(self.time_ms));
        let (sender, content) = (&self.sender, &self.content);
        let from = format!(r#""id":"{id}","from":{{"id":"{sender}","name":"A"}}"#);
        let room = self.room.without_prefix();
        let begin = match self.frame {
            FrameType::Message => format!(r#""room":"{room}",{from},"kind":"text""#),
            FrameType::Direct => format!(r#"{from},"to":"{room}","kind":"text""#),
            FrameType::Notification => format!(r#""id":"{id}""#),
        };
        let content = match (self.frame, &self.payload) {
            (_, Some(_)) => String::new(),
            (FrameType::Notification, None) => format!(r#","payload":{content}"#),
            (_, None) => format!(r#","content":{content}"#),
        };
        Envelope::pack(EnvelopeParts {
            frame: self.frame,
            author: AuthorHash::of(&self.sender.parse().unwrap()),
            id,
            sender: ConnectionId(Uuid::from_u128(7)),
            echo: self.echo,
            fields: &format!(r#"{begin}{content},"timestamp":"{timestamp}""#),
            binary_payload: self.payload.as_deref(),
        })
    }

    pub(crate) fn position(&self) -> Position {
        Position::new(self.epoch.parse().unwrap(), self.seq)
    }

    pub(crate) fn record(&self) -> ArchiveRecord {
        ArchiveRecord::Entry {
            room: self.room.clone(),
            position: self.position(),
            envelope: self.envelope(),
        }
    }
}

/// The record of a deletion of room `r`.
pub(crate) fn deleted(ordinal: u64) -> ArchiveRecord {
    ArchiveRecord::Deleted { room: "r".parse().unwrap(), ordinal }
}

/// The records of samples.
pub(crate) fn records(samples: impl IntoIterator<Item = Sample>) -> Vec<ArchiveRecord> {
    samples.into_iter().map(|sample| sample.record()).collect()
}

/// A time in milliseconds since 1970.
pub(crate) fn at(ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(ms)
}

/// The numbers of a page, and whether there are more.
pub(crate) fn seqs(page: &ArchivePage) -> (Vec<Seq>, bool) {
    (page.entries.iter().map(|entry| entry.position.seq).collect(), page.more)
}

/// The epochs and numbers of a page.
pub(crate) fn positions(page: &ArchivePage) -> Vec<String> {
    page.entries.iter().map(|entry| entry.position.to_string()).collect()
}
