//! permessage-deflate (RFC 7692): compresses and inflates messages, each by itself.
//!
//! Because no message refers to an earlier one, the state of zlib belongs to the thread and is
//! reset for each message. A connection holds none.

use std::cell::RefCell;

use bytes::Bytes;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::{CodecError, RSV1, encode_with_first_byte, extension::WindowBits};

/// The end of a sync flush. Senders remove it from a message, and receivers append it again.
const SYNC_FLUSH_TAIL: [u8; 4] = [0x00, 0x00, 0xFF, 0xFF];
/// An empty final block. If it decodes as one, the message was complete.
const EMPTY_FINAL_BLOCK: [u8; 5] = [0x01, 0x00, 0x00, 0xFF, 0xFF];
/// Maximum distance of a back-reference.
const WINDOW_BYTES: usize = 1 << 15;
/// The smallest window that zlib compresses raw deflate with.
const ZLIB_BITS_MIN: u8 = 9;
/// Maximum length of a message to compress, in windows. zlib-rs passes over tables of a fixed size
/// for each window, so with small windows a client could cause much work with little of its own.
const MESSAGE_WINDOWS_MAX: usize = 64;
/// A fast level, because a room waits while its message is compressed. Level 1 has no Huffman codes
/// per message: it is twice as fast, and makes a message of 300 bytes a fifth larger.
const COMPRESSION_LEVEL: Compression = Compression::new(2);

thread_local! {
    static DEFLATERS: RefCell<[Option<Compress>; 7]> = const { RefCell::new([const { None }; 7]) };
    static INFLATER: RefCell<Option<Decompress>> = const { RefCell::new(None) };
}

/// The payload of a frame of [`encode`](super::encode).
pub fn frame_payload(frame: &[u8]) -> &[u8] {
    let header = match frame.get(1) {
        Some(126) => 4,
        Some(127) => 10,
        _ => 2,
    };
    frame.get(header..).unwrap_or_default()
}

/// Compresses a data frame of [`encode`](super::encode) for an inflater with `window`. `None` if
/// the payload would not get smaller, or would take too long to compress.
pub fn compress_frame(frame: &[u8], window: WindowBits) -> Option<Bytes> {
    let payload = frame_payload(frame);
    // For a window of 256 bytes, zlib uses one of 512, but its back-references stay 262 bytes below
    // it: at most 250 bytes. A test verifies this.
    let bits = window.get().max(ZLIB_BITS_MIN);
    if payload.len() > MESSAGE_WINDOWS_MAX << bits {
        return None;
    }
    let mut out = Vec::with_capacity(compressed_bytes_max(payload.len()));
    DEFLATERS.with_borrow_mut(|deflaters| {
        let kept = &mut deflaters[usize::from(bits - ZLIB_BITS_MIN)];
        // A deflater with pending output is dropped: after a reset, zlib-rs 0.6 keeps the space of
        // that output, and panics later when it has too little.
        let mut deflater = kept
            .take()
            .unwrap_or_else(|| Compress::new_with_window_bits(COMPRESSION_LEVEL, false, bits));
        deflater.reset();
        deflater.compress_vec(payload, &mut out, FlushCompress::Sync).ok()?;
        let is_whole = deflater.total_in() == payload.len() as u64 && out.len() < out.capacity();
        is_whole.then(|| *kept = Some(deflater))
    })?;
    let compressed = out.strip_suffix(&SYNC_FLUSH_TAIL)?;
    let first = frame.first()? | RSV1;
    (compressed.len() < payload.len()).then(|| encode_with_first_byte(first, &[compressed]))
}

/// Maximum payload of a compressed message of `bytes_max` bytes. Incompressible data grows by at
/// most an eighth, where each byte becomes a code of nine bits.
pub(super) fn compressed_bytes_max(bytes_max: usize) -> usize {
    bytes_max + bytes_max / 8 + 64
}

/// Inflates a message of at most `bytes_max` bytes.
pub(super) fn inflate(payload: &[u8], bytes_max: usize) -> Result<Vec<u8>, CodecError> {
    // Some senders compress an empty message to nothing. The RFC requires one byte.
    if payload.is_empty() {
        return Ok(Vec::new());
    }
    INFLATER.with_borrow_mut(|inflater| {
        let inflater = inflater.get_or_insert_with(|| Decompress::new(false));
        inflater.reset(false);
        let mut message = InflatingMessage { inflater, out: Vec::new(), bytes_max };
        message.out.reserve_exact((4 * payload.len()).min(bytes_max + 1));
        if message.feed(payload)? == InflatePosition::AfterFinalBlock {
            return Ok(message.out);
        }
        let length = message.out.len();
        let ends = match message.feed(&SYNC_FLUSH_TAIL)? {
            InflatePosition::AfterFinalBlock => true,
            InflatePosition::MidStream => {
                message.feed(&EMPTY_FINAL_BLOCK)? == InflatePosition::AfterFinalBlock
            }
        };
        let whole = ends && message.out.len() == length;
        if whole { Ok(message.out) } else { Err(CodecError::InvalidDeflate) }
    })
}

/// A message that is being inflated.
struct InflatingMessage<'a> {
    inflater: &'a mut Decompress,
    out: Vec<u8>,
    bytes_max: usize,
}

/// The position of the inflater once it has consumed its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InflatePosition {
    /// Not directly after a final block.
    MidStream,
    /// Directly after a final block.
    AfterFinalBlock,
}

impl InflatingMessage<'_> {
    fn feed(&mut self, mut input: &[u8]) -> Result<InflatePosition, CodecError> {
        loop {
            self.reserve_output()?;
            let before = self.inflater.total_in();
            let status = self
                .inflater
                .decompress_vec(input, &mut self.out, FlushDecompress::None)
                .map_err(|_| CodecError::InvalidDeflate)?;
            let used = (self.inflater.total_in() - before) as usize;
            input = &input[used..];
            if self.out.len() > self.bytes_max {
                return Err(CodecError::MessageTooBig);
            }
            let is_full = self.out.len() == self.out.capacity();
            match status {
                Status::StreamEnd if input.is_empty() => {
                    return Ok(InflatePosition::AfterFinalBlock);
                }
                Status::StreamEnd => self.continue_after_final_block()?,
                _ if is_full => {}
                _ if input.is_empty() => return Ok(InflatePosition::MidStream),
                _ if used == 0 => return Err(CodecError::InvalidDeflate),
                _ => {}
            }
        }
    }

    /// Continues after a final block: the next block begins at the next byte, and can refer to
    /// earlier output (RFC 7692, section 7.2.1).
    fn continue_after_final_block(&mut self) -> Result<(), CodecError> {
        self.inflater.reset(false);
        let window = &self.out[self.out.len().saturating_sub(WINDOW_BYTES)..];
        self.inflater.set_dictionary(window).map(drop).map_err(|_| CodecError::InvalidDeflate)
    }

    /// Reserves space for at least one byte, and for at most one byte above the limit: a message
    /// that reaches it is too large, and is inflated no further.
    fn reserve_output(&mut self) -> Result<(), CodecError> {
        if self.out.len() == self.out.capacity() {
            let more = self.out.len().clamp(1024, 1 << 20);
            let more = more.min((self.bytes_max + 1).saturating_sub(self.out.len()));
            if more == 0 {
                return Err(CodecError::MessageTooBig);
            }
            self.out.reserve_exact(more);
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests;
