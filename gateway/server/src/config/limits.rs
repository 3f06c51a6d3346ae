//! Limits of connections, of what they send, and of what clients store.

use std::{sync::Arc, time::Duration};

use skein_core::{
    drain::schedule::DrainRate,
    limits::{Rate, meter::MeterRates, quotas::QuotaOptions},
    rooms::passwords::PasswordLimits,
    session::ClientLimits,
};
use skein_protocol::protocol::MESSAGE_BYTES_MAX;

use super::{
    reader::{OptionReader, options},
    values::{Bounds, ByteSize},
};
use crate::http::HttpLimits;

/// File descriptors reserved for everything but client connections.
const DESCRIPTORS_RESERVED: u64 = 1000;
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

options! {
    /// Limits.
    LimitsSection in "limits" {
        /// Bytes of a WebSocket message. Above it: close 1009.
        message_bytes_max: ByteSize = MESSAGE_BYTES_MAX.to_string(), within Bounds::usual_sizes();
        /// `message` frames per connection, with bursts of twice as many. Above it: `rate_limited`.
        /// 0: no limit.
        messages_per_second: u32 = "50", within 0..=1_000_000;
        /// Other frames per connection, with bursts of five times as many; four names in a `watch`
        /// or `unwatch` count as one more frame. Above it: `rate_limited`. Control frames, small
        /// fragments and rejected frames have a budget of their own, of the same size: above it the
        /// connection is read more slowly, and after 10 s closed with 1008 `rate_limited`. 0: no
        /// limit.
        frames_per_second: u32 = "200", within 0..=1_000_000;
        /// Bytes received per connection, after decompression, with bursts of twice as many. Above
        /// it: the connection is read more slowly, and nothing is rejected. 0: no limit.
        bytes_per_second: ByteSize = "2MiB";
        /// Rooms per connection. Above it: `limit_reached`.
        rooms_per_connection: usize = "500", within 1..=100_000;
        /// Watched users per connection, including the peers of its direct messages. Above it:
        /// `limit_reached`.
        watches_per_connection: usize = "1000", within 0..=100_000;
        /// Connections per user. Above it: close 1008 `too_many_connections`. 0: no limit.
        connections_per_user: usize = "50";
        /// Connections per address (IPv6: per /64). Above it: HTTP 429. 0: no limit.
        connections_per_ip: usize = "1000";
        /// Handshakes per address. Above it: HTTP 429. 0: no limit.
        handshakes_per_minute_per_ip: u32 = "600", within 0..=1_000_000;
        /// Connections per node. Above it: HTTP 503. 0: the limit of file descriptors less 1,000.
        connections_max: usize = "0", within 0..=100_000_000;
        /// Handshakes per node. Above it: HTTP 503. 0: no limit.
        accepts_per_second: u32 = "5000", within 0..=1_000_000;
        /// Bytes that a user may store, with bursts of twice as many; an address may store eight
        /// times as many. Above it: `rate_limited`. 0: no limit.
        durable_bytes_per_minute: ByteSize = "32MiB", within Bounds::new(
            ByteSize(0)..=ByteSize(1 << 31), "at most 2GiB"
        );
        /// Users who never connected that a user may send direct messages to; an address eight
        /// times as many. Above it: `rate_limited`. 0: no limit.
        new_inboxes_per_hour: u32 = "100", within 0..=10_000_000;
        /// Rooms that a user may create by joining them, with bursts of five times as many; an
        /// address eight times as many. Above it: `rate_limited`. 0: no limit.
        new_rooms_per_minute: u32 = "600", within 0..=10_000_000;
        /// Plain HTTP requests per address (pages, probes, rejected handshakes), with bursts of
        /// five times as many; server API calls with a valid key do not count. Above it: HTTP 429,
        /// and the connection is closed. 0: no limit.
        http_requests_per_second_per_ip: u32 = "200", within 0..=1_000_000;
        /// Server API calls without a valid key per address, with bursts of five times as many.
        /// Above it: HTTP 429, and the connection is closed. 0: no limit.
        api_key_failures_per_second_per_ip: u32 = "10", within 0..=1_000_000;
        /// Wrong room passwords per address, from users with recent failures; the other users of
        /// the address have a budget of their own, of the same size. Above it: `rate_limited`. 0:
        /// no limit.
        password_failures_per_minute_per_ip: u32 = "30", within 0..=1_000_000;
        /// Wrong passwords per room from all addresses, in two budgets like those per address.
        /// Above it: `rate_limited`. 0: no limit.
        password_failures_per_minute_per_room: u32 = "60", within 0..=1_000_000;
        /// Bytes that a connection may read from logs and lists (`history`, `presence`, `rooms`,
        /// joins), with bursts of eight times as many; a user twice as many. Above it: reads wait,
        /// then get `rate_limited`. 0: no limit.
        read_bytes_per_second: ByteSize = "4MiB";
        /// Bytes in the outbox of a connection. Above it: the client is a slow consumer and
        /// continues from the log.
        outbox_bytes_max: ByteSize = "1MiB", within Bounds::usual_sizes();
    }
}

impl LimitsSection {
    /// Checks the sizes of messages.
    pub(super) fn check(&self, reader: &mut OptionReader) {
        if self.message_bytes_max.0 > 16 << 20 {
            reader.error(
                "limits.message_bytes_max",
                "must be at most 16MiB: Redis and every node hold a message as a whole",
            );
        }
        if self.outbox_bytes_max < self.message_bytes_max {
            reader.warn(
                "limits.outbox_bytes_max is less than limits.message_bytes_max: an outbox may \
                 exceed the former, since it always takes one message",
            );
        }
    }

    /// Limits of connections and requests on this node.
    pub(super) fn http(&self, reader: &mut OptionReader) -> HttpLimits {
        let (descriptors, connections_max) = (descriptors_for_clients(), self.connections_max);
        if connections_max > descriptors {
            reader.warn(format!(
                "limits.connections_max is {connections_max}, but this process has file \
                 descriptors for only {descriptors} clients: raise the limit (`ulimit -n`)"
            ));
        }
        let (requests, api_key_failures) =
            (self.http_requests_per_second_per_ip, self.api_key_failures_per_second_per_ip);
        let (handshakes, accepts) = (self.handshakes_per_minute_per_ip, self.accepts_per_second);
        HttpLimits {
            connections_max: if connections_max == 0 { descriptors } else { connections_max },
            connections_per_ip: self.connections_per_ip,
            connections_per_user: self.connections_per_user,
            handshakes_per_ip: Rate::new(handshakes, MINUTE, handshakes),
            accepts: Rate::new(accepts, SECOND, accepts),
            requests_per_ip: Rate::new(requests, SECOND, requests.saturating_mul(5)),
            api_key_failures_per_ip: Rate::new(
                api_key_failures,
                SECOND,
                api_key_failures.saturating_mul(5),
            ),
            message_bytes_max: self.message_bytes_max.0,
            outbox_bytes_max: self.outbox_bytes_max.0,
        }
    }

    /// Limits of clients.
    pub(super) fn clients(&self) -> ClientLimits {
        let bytes_per_second = self.bytes_per_second.0 as u64;
        let rates =
            MeterRates::new(self.messages_per_second, self.frames_per_second, bytes_per_second);
        ClientLimits {
            rates: Arc::new(rates),
            rooms_max: self.rooms_per_connection,
            watches_max: self.watches_per_connection,
            read_bytes_per_second: self.read_bytes_per_second.0,
        }
    }

    /// Rates of wrong room passwords.
    pub(super) fn passwords(&self, wait_max: Duration) -> PasswordLimits {
        let per_minute = |count| Rate::new(count, MINUTE, count);
        PasswordLimits {
            failures_per_ip: per_minute(self.password_failures_per_minute_per_ip),
            failures_per_room: per_minute(self.password_failures_per_minute_per_room),
            wait_max,
        }
    }

    /// Quotas of stored state.
    pub(super) fn quotas(&self) -> QuotaOptions {
        QuotaOptions {
            bytes_per_minute: self.durable_bytes_per_minute.0 as u32,
            new_inboxes_per_hour: self.new_inboxes_per_hour,
            new_rooms_per_minute: self.new_rooms_per_minute,
        }
    }

    /// The rate at which a stopping node disconnects its clients: half of the rate at which another
    /// node accepts them, since that node gets other clients as well, and they arrive unevenly.
    pub(super) fn drain_rate(&self, window: Duration) -> DrainRate {
        const WITHOUT_LIMIT: u32 = 5000;
        let accepts = match self.accepts_per_second {
            0 => WITHOUT_LIMIT,
            accepts => accepts,
        };
        DrainRate { window, per_second: (accepts / 2).max(1) }
    }
}

/// Raises the limit of file descriptors as far as possible. Returns the number left for clients.
fn descriptors_for_clients() -> usize {
    let descriptors = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024);
    // With a very low limit, half of it is reserved.
    let reserved = DESCRIPTORS_RESERVED.min(descriptors / 2);
    // A larger number would exceed the maximum of a semaphore, and is as good as no limit.
    usize::try_from(descriptors - reserved).unwrap_or(usize::MAX).min(100_000_000)
}
