//! Which frames go to a client compressed.

use bytes::Bytes;
use skein_websocket::{
    deflate::{compress_frame, frame_payload},
    extension::WindowBits,
};

use crate::telemetry::metrics::Metrics;

/// How the messages to one client are compressed. Clients with the same get the same frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeflateOptions {
    /// The window that the client asked for.
    pub window: WindowBits,
    /// Smaller messages stay as they are.
    pub bytes_min: usize,
}

impl DeflateOptions {
    /// `frame` compressed; as it is where that is not worth it, and where it is a control frame.
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
