//! Options of publishing, and of what the bus keeps: logs, inboxes and sessions.

use humantime::Duration;
use skein_core::bus::{LogRetention, UnseenInboxLimits, sessions::SessionOptions};

use super::{
    reader::options,
    values::{Bounds, ByteSize},
};

options! {
    /// Publishing of messages.
    PublishSection in "publish" {
        /// How long a publish, `join` or `history` waits for Redis. Above it: `unavailable`.
        timeout: Duration = "5s", within Bounds::usual_times();
    }
}

options! {
    /// Recognition of repeated messages.
    DedupSection in "dedup" {
        /// How long the `id` of a message is remembered: a message repeated within this time is
        /// stored once.
        window: Duration = "10m", within Bounds::usual_times();
    }
}

options! {
    /// Logs of rooms.
    HistorySection in "history" {
        /// Entries kept per room. Entries younger than `history.window` are kept beyond this
        /// number.
        max_entries: u32 = "1000", within 1..=1_000_000;
        /// Age up to which entries beyond `history.max_entries` are kept.
        window: Duration = "2m";
        /// Bytes kept per room. Above it: the oldest entries are dropped.
        max_bytes: ByteSize = "16MiB", within Bounds::usual_sizes();
        /// Bytes of all logs of a node without Redis. Above it: the least recently used logs are
        /// dropped.
        memory_bytes_max: ByteSize = "512MiB", within Bounds::usual_sizes();
        /// Retention of an idle room's log.
        ttl: Duration = "24h", within Bounds::usual_times();
    }
}

options! {
    /// Inboxes.
    InboxSection in "inbox" {
        /// Entries kept per inbox. Above it: the oldest entries are dropped.
        max_entries: u32 = "1000", within 1..=1_000_000;
        /// Retention of an idle inbox.
        ttl: Duration = "30d", within Bounds::usual_times();
        /// Bytes kept per inbox. Above it: the oldest entries are dropped.
        max_bytes: ByteSize = "4MiB", within Bounds::usual_sizes();
        /// Entries kept for a user who, as far as the cluster remembers, never connected. Above it:
        /// the oldest entries are dropped.
        unseen_max_entries: u32 = "20", within 1..=1_000_000;
        /// Bytes kept for a user who never connected. Above it: the oldest entries are dropped; a
        /// message larger than this gets `limit_reached`.
        unseen_max_bytes: ByteSize = "64KiB", within Bounds::usual_sizes();
        /// Retention of the idle inbox of a user who never connected.
        unseen_ttl: Duration = "24h", within Bounds::usual_times();
    }
}

options! {
    /// Sessions.
    SessionsSection in "sessions" {
        /// Bytes of the data of all sessions of a user. Above it: `limit_reached`.
        data_max_bytes: ByteSize = "128KiB", within Bounds::usual_sizes();
        /// Retention of a session after its last use.
        ttl: Duration = "24h", within Bounds::usual_times();
    }
}

impl InboxSection {
    /// Retention of inboxes.
    pub(super) fn retention(&self) -> LogRetention {
        LogRetention {
            entries_min: self.max_entries,
            ttl: *self.ttl,
            bytes_max: self.max_bytes.0 as u64,
        }
    }

    /// Limits of inboxes of users who never connected.
    pub(super) fn unseen(&self) -> UnseenInboxLimits {
        UnseenInboxLimits {
            entries_max: self.unseen_max_entries,
            bytes_max: self.unseen_max_bytes.0 as u64,
            ttl: *self.unseen_ttl,
        }
    }
}

impl SessionsSection {
    /// Retention of sessions.
    pub(super) fn sessions(&self) -> SessionOptions {
        SessionOptions { ttl: *self.ttl }
    }
}
