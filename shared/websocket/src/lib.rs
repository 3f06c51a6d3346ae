//! The server side of WebSocket framing (RFC 6455): [`encode`] for frames it sends, [`Decoder`] for
//! frames it receives.
//!
//! Pure and sans-I/O. A server's frames are not masked (section 5.1), so header and payload are the
//! same bytes for every recipient: a message is encoded once and shared. A client's frames are
//! unmasked in place in the caller's buffer; a message that is whole in one frame and one read is
//! returned from there without a copy. Only fragments and messages split across reads are buffered,
//! never more bytes than have arrived and never more than the limit. A compressed message
//! ([`deflate`]) is inflated once it is complete.

use bytes::{BufMut, Bytes, BytesMut};

pub mod extension;
pub mod deflate;
mod payload;

use deflate::{compressed_bytes_max, inflate};
use payload::{decode_payload, unmask};

/// The opcode of a frame (RFC 6455, section 5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    /// A further fragment of the current message.
    Continuation = 0x0,
    /// Text in UTF-8.
    Text = 0x1,
    /// Bytes.
    Binary = 0x2,
    /// Begins or answers the closing handshake.
    Close = 0x8,
    /// A heartbeat, to be answered by a pong.
    Ping = 0x9,
    /// The answer to a ping.
    Pong = 0xA,
}

impl Opcode {
    fn of(bits: u8) -> Option<Self> {
        Some(match bits {
            0x0 => Self::Continuation,
            0x1 => Self::Text,
            0x2 => Self::Binary,
            0x8 => Self::Close,
            0x9 => Self::Ping,
            0xA => Self::Pong,
            _ => return None,
        })
    }

    fn is_control(self) -> bool {
        self as u8 >= 0x8
    }
}

/// Maximum payload of a control frame in bytes (RFC 6455, section 5.5).
pub const CONTROL_BYTES_MAX: usize = 125;

const FIN: u8 = 0x80;
/// Marks a compressed message (RFC 7692, section 6), in its first frame only.
const RSV1: u8 = 0x40;

/// Encodes one unfragmented, unmasked frame whose payload is `parts` in order.
pub fn encode(opcode: Opcode, parts: &[&[u8]]) -> Bytes {
    encode_with_first_byte(FIN | opcode as u8, parts)
}

/// Encodes a frame with the given first byte.
fn encode_with_first_byte(first: u8, parts: &[&[u8]]) -> Bytes {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut frame = BytesMut::with_capacity(length + 10);
    frame.put_u8(first);
    match length {
        0..=125 => frame.put_u8(length as u8),
        126..=0xFFFF => {
            frame.put_u8(126);
            frame.put_u16(length as u16);
        }
        _ => {
            frame.put_u8(127);
            frame.put_u64(length as u64);
        }
    }
    for part in parts {
        frame.put_slice(part);
    }
    frame.freeze()
}

/// Encodes a close frame. The reason is cut at a character boundary to the 123 bytes that fit.
pub fn encode_close(code: u16, reason: &str) -> Bytes {
    let mut end = reason.len().min(CONTROL_BYTES_MAX - 2);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    encode(Opcode::Close, &[&code.to_be_bytes(), &reason.as_bytes()[..end]])
}

/// One result of the decoder: a message, a control frame or a fragment.
#[derive(Debug, PartialEq, Eq)]
pub enum DecoderEvent<'a> {
    /// A text message.
    Text(&'a str),
    /// A binary message.
    Binary(&'a [u8]),
    /// A ping, to be answered by a pong with the same payload.
    Ping(&'a [u8]),
    /// A pong.
    Pong(&'a [u8]),
    /// A close frame: its code and reason, if it has them.
    Close(Option<(u16, &'a str)>),
    /// A complete frame that does not end its message, with its payload length in bytes. The
    /// decoder keeps the payload.
    Fragment(usize),
}

impl DecoderEvent<'_> {
    /// Length of the payload in bytes.
    pub fn payload_len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Binary(bytes) | Self::Ping(bytes) | Self::Pong(bytes) => bytes.len(),
            Self::Close(close) => close.map_or(0, |(_, reason)| 2 + reason.len()),
            Self::Fragment(bytes) => *bytes,
        }
    }
}

/// A violation by the client, after which the connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The bytes are not a frame of RFC 6455, or the frame is not allowed here. Close code 1002.
    #[error("{0}")]
    Protocol(&'static str),
    /// A text message or a close reason is not UTF-8. Close code 1007.
    #[error("text is not UTF-8")]
    InvalidUtf8,
    /// A compressed message cannot be inflated. Close code 1007, as for text that is not UTF-8: the
    /// payload does not match the type of the message.
    #[error("compressed message cannot be inflated")]
    InvalidDeflate,
    /// A message is larger than the limit, after inflation if it is compressed. Close code 1009.
    #[error("message larger than the limit")]
    MessageTooBig,
}

/// Decodes the frames of a client.
#[derive(Debug)]
pub struct Decoder {
    message_bytes_max: usize,
    /// Whether messages may be compressed.
    deflate: bool,
    header: [u8; 14],
    header_len: u8,
    /// The frame whose payload is arriving.
    frame: Option<FrameInProgress>,
    /// The buffered part of the current data message, and its opcode.
    message_bytes: Vec<u8>,
    message_opcode: Option<Opcode>,
    /// Whether the current message is compressed.
    compressed: bool,
    /// Length of the prefix of `message_bytes` that is known to be UTF-8.
    utf8_valid_len: usize,
    /// The buffered part of a control frame, which can arrive between fragments.
    control: Vec<u8>,
    /// Whether an event that borrowed `message_bytes` or `control` was returned, so that they can
    /// be freed.
    handed_out: bool,
    /// Bytes left to skip of the payload of a frame that was too long.
    skipping: u64,
}

#[derive(Clone, Copy, Debug)]
struct FrameInProgress {
    fin: bool,
    /// Whether its message is compressed; a continuation inherits this from the first frame.
    compressed: bool,
    opcode: Opcode,
    mask: [u8; 4],
    length: usize,
    remaining: usize,
}

impl Decoder {
    /// A decoder that rejects messages of more than `message_bytes_max` bytes.
    pub fn new(message_bytes_max: usize) -> Self {
        Self {
            message_bytes_max,
            deflate: false,
            header: [0; 14],
            header_len: 0,
            frame: None,
            message_bytes: Vec::new(),
            message_opcode: None,
            compressed: false,
            utf8_valid_len: 0,
            control: Vec::new(),
            handed_out: false,
            skipping: 0,
        }
    }

    /// A decoder for a connection that negotiated permessage-deflate.
    pub fn with_deflate(message_bytes_max: usize) -> Self {
        Self { deflate: true, ..Self::new(message_bytes_max) }
    }

    /// Decodes the first frame of `input`, unmasking in place.
    ///
    /// Returns the number of bytes consumed and the event they completed. One call completes at
    /// most one frame, so that a caller can also meter frames that complete no message. `None`
    /// means that all of `input` was consumed and more is needed.
    ///
    /// # Errors
    ///
    /// [`CodecError`], after which the decoder can only [skip](Decoder::skip_to_close).
    pub fn next<'a>(
        &'a mut self,
        input: &'a mut [u8],
    ) -> Result<(usize, Option<DecoderEvent<'a>>), CodecError> {
        self.release();
        let mut used = 0;
        let frame = match self.frame {
            Some(frame) => frame,
            None => match self.read_header(input, &mut used)? {
                Some(frame) => frame,
                None => return Ok((used, None)),
            },
        };

        let whole = frame.remaining <= input.len() - used;
        let taken = frame.remaining.min(input.len() - used);
        let range = used..used + taken;
        let mask = frame.mask;
        unmask(&mut input[range.clone()], mask);
        used += taken;

        if whole && self.is_whole_message(frame) {
            self.frame = None;
            if !frame.compressed {
                return Ok((used, Some(decode_payload(frame.opcode, &input[range])?)));
            }
            self.message_bytes = inflate(&input[range], self.message_bytes_max)?;
            self.handed_out = true;
            return Ok((used, Some(decode_payload(frame.opcode, &self.message_bytes)?)));
        }

        self.buffer_payload(frame, &input[range])?;
        if !whole {
            let mut mask = mask;
            mask.rotate_left(taken % 4);
            self.frame =
                Some(FrameInProgress { mask, remaining: frame.remaining - taken, ..frame });
            return Ok((used, None));
        }

        self.frame = None;
        if frame.opcode.is_control() {
            self.handed_out = true;
            return Ok((used, Some(decode_payload(frame.opcode, &self.control)?)));
        }
        if !frame.fin {
            return Ok((used, Some(DecoderEvent::Fragment(frame.length))));
        }
        let opcode = self.message_opcode.take().unwrap_or(frame.opcode);
        if frame.compressed {
            self.message_bytes = inflate(&self.message_bytes, self.message_bytes_max)?;
        }
        self.handed_out = true;
        Ok((used, Some(decode_payload(opcode, &self.message_bytes)?)))
    }

    /// Drops frames up to a close frame: nothing is buffered, inflated or validated. Returns
    /// whether a close frame was found; otherwise all of `input` was consumed.
    ///
    /// For a connection that is being closed, also after an error of [`Decoder::next`]. Bytes that
    /// are not frames can look like frames, and the close frame is then missed.
    pub fn skip_to_close(&mut self, mut input: &[u8]) -> bool {
        self.message_bytes = Vec::new();
        self.control = Vec::new();
        if let Some(frame) = self.frame.take() {
            if frame.opcode == Opcode::Close {
                return true;
            }
            self.skipping = frame.remaining as u64;
        }
        loop {
            let skipped = self.skipping.min(input.len() as u64);
            self.skipping -= skipped;
            input = &input[skipped as usize..];
            if self.skipping > 0 {
                return false;
            }
            let Some(header) = self.buffer_header(&mut input) else { return false };
            // Its payload may arrive later: no frame follows it.
            if header[0] & 0x0F == Opcode::Close as u8 {
                return true;
            }
            self.skipping = payload_len_of(header);
            self.header_len = 0;
        }
    }

    /// Consumes the header of a frame from `input`, as far as it is there. Returns it when
    /// complete.
    fn buffer_header(&mut self, input: &mut &[u8]) -> Option<&[u8]> {
        loop {
            let have = usize::from(self.header_len);
            if have == header_len_of(&self.header[..have]) {
                return Some(&self.header[..have]);
            }
            let (byte, rest) = input.split_first()?;
            self.header[have] = *byte;
            self.header_len += 1;
            *input = rest;
        }
    }

    /// Whether the frame is a whole message and none of it is buffered, so that it need not be
    /// copied.
    fn is_whole_message(&self, frame: FrameInProgress) -> bool {
        if frame.opcode.is_control() {
            self.control.is_empty()
        } else {
            frame.fin && self.message_opcode.is_none()
        }
    }

    /// Consumes a frame header, which can be split across reads, and rejects it as early as
    /// possible.
    fn read_header(
        &mut self,
        input: &[u8],
        used: &mut usize,
    ) -> Result<Option<FrameInProgress>, CodecError> {
        loop {
            let have = usize::from(self.header_len);
            if have == 2 {
                self.check_first_bytes()?;
            }
            let need = header_len_of(&self.header[..have]);
            if have == need {
                break;
            }
            let Some(byte) = input.get(*used) else { return Ok(None) };
            self.header[have] = *byte;
            self.header_len += 1;
            *used += 1;
        }

        let have = usize::from(std::mem::take(&mut self.header_len));
        let header = &self.header[..have];
        let length = payload_len_of(header);
        // RFC 6455, section 5.2: the most significant bit of a 64-bit length must be 0, and the
        // shortest form must be used.
        if length >> 63 == 1 {
            return Err(CodecError::Protocol("frame length out of range"));
        }
        if (have == 8 && length < 126) || (have == 14 && length < 0x1_0000) {
            return Err(CodecError::Protocol("frame length not in its shortest form"));
        }
        let opcode = Opcode::of(header[0] & 0x0F).ok_or(CodecError::Protocol("unknown opcode"))?;
        let compressed = match opcode {
            Opcode::Continuation => self.compressed,
            _ => header[0] & RSV1 != 0,
        };
        let bytes_max = match compressed {
            true => compressed_bytes_max(self.message_bytes_max),
            false => self.message_bytes_max,
        };
        let held = if opcode.is_control() { 0 } else { self.message_bytes.len() };
        if length > bytes_max.saturating_sub(held) as u64 && !opcode.is_control() {
            self.skipping = length;
            return Err(CodecError::MessageTooBig);
        }
        let mut mask = [0; 4];
        mask.copy_from_slice(&header[have - 4..]);
        let (fin, length) = (header[0] & FIN != 0, length as usize);
        Ok(Some(FrameInProgress { fin, compressed, opcode, mask, length, remaining: length }))
    }

    /// Validates the first two bytes of a header.
    fn check_first_bytes(&self) -> Result<(), CodecError> {
        let [first, second, ..] = self.header;
        if first & 0x30 != 0 || (first & RSV1 != 0 && !self.deflate) {
            return Err(CodecError::Protocol("reserved bit set without an extension"));
        }
        let opcode = Opcode::of(first & 0x0F).ok_or(CodecError::Protocol("unknown opcode"))?;
        if second & 0x80 == 0 {
            return Err(CodecError::Protocol("client frame without a mask"));
        }
        let fin = first & FIN != 0;
        match opcode {
            _ if first & RSV1 != 0 && !matches!(opcode, Opcode::Text | Opcode::Binary) => {
                Err(CodecError::Protocol("RSV1 on a frame that does not begin a message"))
            }
            _ if opcode.is_control() && !fin => {
                Err(CodecError::Protocol("fragmented control frame"))
            }
            _ if opcode.is_control() && usize::from(second & 0x7F) > CONTROL_BYTES_MAX => {
                Err(CodecError::Protocol("control frame of more than 125 bytes"))
            }
            Opcode::Continuation if self.message_opcode.is_none() => {
                Err(CodecError::Protocol("continuation without a message"))
            }
            Opcode::Text | Opcode::Binary if self.message_opcode.is_some() => {
                Err(CodecError::Protocol("new message before the end of a fragmented one"))
            }
            _ => Ok(()),
        }
    }

    /// Buffers a chunk that is not a whole message.
    fn buffer_payload(&mut self, frame: FrameInProgress, chunk: &[u8]) -> Result<(), CodecError> {
        if frame.opcode.is_control() {
            self.control.extend_from_slice(chunk);
            return Ok(());
        }
        if frame.opcode != Opcode::Continuation {
            self.message_opcode = Some(frame.opcode);
            self.compressed = frame.compressed;
        }
        self.message_bytes.extend_from_slice(chunk);
        if self.message_opcode == Some(Opcode::Text) && !self.compressed {
            // Fails at the first invalid byte, not at the end of the message; a character may be
            // split.
            match std::str::from_utf8(&self.message_bytes[self.utf8_valid_len..]) {
                Ok(_) => self.utf8_valid_len = self.message_bytes.len(),
                Err(error) if error.error_len().is_some() => return Err(CodecError::InvalidUtf8),
                Err(error) => self.utf8_valid_len += error.valid_up_to(),
            }
        }
        Ok(())
    }

    /// Frees the buffers of events that were returned. Call it once all received bytes are handled,
    /// so that idle connections hold no buffers.
    pub fn release(&mut self) {
        if !std::mem::take(&mut self.handed_out) {
            return;
        }
        if self.message_opcode.is_none() {
            self.message_bytes = Vec::new();
            self.utf8_valid_len = 0;
        }
        self.control = Vec::new();
    }
}

/// The payload length that a complete header states.
fn payload_len_of(header: &[u8]) -> u64 {
    match header[1] & 0x7F {
        126 => u64::from(u16::from_be_bytes([header[2], header[3]])),
        127 => header[2..10].iter().fold(0, |length, byte| length << 8 | u64::from(*byte)),
        length => u64::from(length),
    }
}

/// The length of the header in bytes, as far as its first bytes determine it.
fn header_len_of(header: &[u8]) -> usize {
    match header.get(1).map(|byte| byte & 0x7F) {
        None => 2,
        Some(126) => 2 + 2 + 4,
        Some(127) => 2 + 8 + 4,
        Some(_) => 2 + 4,
    }
}

#[cfg(test)]
mod tests;
