//! Options of connections and of their orderly end.

use std::sync::Arc;

use humantime::Duration;

use super::{
    reader::options,
    values::{Bounds, ByteSize},
};
use crate::transport::Heartbeat;

options! {
    /// Pings and timeouts of connections.
    HeartbeatSection in "heartbeat" {
        /// Time between pings to a connection. Must be less than `heartbeat.idle_timeout`.
        interval: Duration = "25s", within Bounds::usual_times();
        /// A connection from which nothing is received for this long is closed with 4002.
        idle_timeout: Duration = "60s", within Bounds::usual_times();
        /// A connection to which nothing can be written for this long is closed with 4003.
        write_timeout: Duration = "30s", within Bounds::usual_times();
    }
}

options! {
    /// Frames of connections.
    TransportSection in "transport" {
        /// Whether messages are compressed for clients that offer permessage-deflate.
        deflate: bool = "true";
        /// Messages with fewer bytes are sent uncompressed.
        deflate_bytes_min: ByteSize = "256";
    }
}

options! {
    /// The orderly end of a node.
    DrainSection in "drain" {
        /// Time between SIGTERM, from which `/ready` returns 503, and the first disconnect of a
        /// client. At most 1h.
        delay: Duration = "1s", within Bounds::up_to_an_hour();
        /// Longest time over which a stopping node disconnects its clients, in batches. It
        /// disconnects half as many a second as `limits.accepts_per_second` lets the other nodes
        /// accept, so that a few clients take milliseconds. At most 1h.
        window: Duration = "20s", within Bounds::up_to_an_hour();
        /// Time from the disconnect of the last client until this node is ready again, if it is
        /// restarted at the same address. Unless a new node has been started to replace it, its
        /// clients wait for that long and come back to it, so that a deploy moves each client once.
        /// 0s: this node is not restarted but replaced, as a container is, and its clients go to the
        /// other nodes. At most 1h.
        restart_time: Duration = "2s", within Bounds::up_to_an_hour();
    }
}

options! {
    /// The balance of connections between nodes.
    RebalanceSection in "rebalance" {
        /// Connections per second that a node with more than 1.2 times the mean sends to the nodes
        /// with the fewest, until it has the mean. Only WebSockets that are older than a minute are
        /// moved, and the proxy must follow `?node=`. 0: nothing is moved.
        per_second: u32 = "10", within 0..=10_000;
    }
}

impl HeartbeatSection {
    /// Ping interval and timeouts of connections.
    pub(super) fn heartbeat(&self) -> Arc<Heartbeat> {
        Arc::new(Heartbeat {
            interval: *self.interval,
            idle_timeout: *self.idle_timeout,
            write_timeout: *self.write_timeout,
        })
    }
}

impl TransportSection {
    /// Size from which messages are compressed.
    pub(super) fn deflate_bytes_min(&self) -> Option<usize> {
        self.deflate.then_some(self.deflate_bytes_min.0)
    }
}
