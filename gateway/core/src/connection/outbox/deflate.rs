//! Compression of messages to a client.

use bytes::Bytes;
use skein_websocket::{
    deflate::{compress_frame, frame_payload},
    extension::WindowBits,
};

use crate::telemetry::metrics::Metrics;

/// The compression of messages to one client. Clients with equal options share the compressed
/// frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeflateOptions {
    /// The window that the client negotiated.
    pub window: WindowBits,
    /// The least size of a compressed message, in bytes.
    pub bytes_min: usize,
}

impl DeflateOptions {
    /// Compresses a frame. Control frames, small messages and messages that would not shrink are
    /// returned unchanged.
    pub fn frame(self, frame: &Bytes, metrics: &Metrics) -> Bytes {
        let is_control = frame.first().is_none_or(|first| first & 0x08 != 0);
        if is_control || frame_payload(frame).len() < self.bytes_min {
            return frame.clone();
        }
        let Some(compressed) = compress_frame(frame, self.window) else { return frame.clone() };
        metrics.deflated_messages.inc();
        metrics.deflate_input_bytes.inc_by(frame.len() as u64);
        metrics.deflate_output_bytes.inc_by(compressed.len() as u64);
        compressed
    }
}
