//! Profiles of attackers as data: how many connections, from how many addresses, what each sends,
//! how fast, and what follows its last chunk.
//!
//! Pure.

use std::time::Duration;

/// Connections of one kind in an attack.
#[derive(Clone, Debug)]
pub(crate) struct AttackProfile {
    /// Number of connections that are open at once.
    pub(crate) connections: u32,
    /// Number of source addresses that they share.
    pub(crate) addresses: u32,
    /// Connections opened per second.
    pub(crate) opens_per_second: u32,
    /// The bytes before the first frame.
    pub(crate) handshake: AttackHandshake,
    /// Path of the handshake, by the serial number of the connection.
    pub(crate) path: fn(u32) -> String,
    /// Bytes that each connection sends first.
    pub(crate) first: fn(u32) -> Vec<u8>,
    /// Bytes that follow.
    pub(crate) payload: AttackPayload,
    /// Time between two chunks of a connection; `None`: as fast as the socket accepts them.
    pub(crate) interval: Option<Duration>,
    /// The bytes after the last chunk.
    pub(crate) on_finished: OnFinished,
    /// Whether the attacker reads responses.
    pub(crate) reads: bool,
    /// `SO_RCVBUF` of the attacker's socket.
    pub(crate) receive_buffer: Option<usize>,
    /// Whether a connection that the server closed is opened again.
    pub(crate) reopens: bool,
}

/// How a connection starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttackHandshake {
    /// With a WebSocket handshake.
    WebSocket,
    /// With a WebSocket handshake that offers permessage-deflate.
    Deflate,
    /// With a WebSocket handshake whose response is not awaited.
    Unawaited,
    /// With plain TCP.
    Raw,
}

/// The chunks that a connection sends after the first bytes.
#[derive(Clone, Debug)]
pub(crate) enum AttackPayload {
    /// None.
    Nothing,
    /// The same bytes again and again.
    Repeat(Vec<u8>),
    /// Chunks by the connection's serial number and their index, until `None`.
    Generate(fn(u32, u64) -> Option<Vec<u8>>),
}

/// The bytes after the last chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnFinished {
    /// The connection stays open.
    Hold,
    /// The connection is closed without a close frame.
    Close,
    /// The connection is closed, and another one is opened.
    Reopen,
}

impl AttackProfile {
    /// Connections to `/ws` that send nothing and read all they receive.
    pub(crate) fn websocket(connections: u32, path: fn(u32) -> String) -> Self {
        Self {
            connections,
            addresses: 1,
            opens_per_second: 1_000,
            handshake: AttackHandshake::WebSocket,
            path,
            first: |_| Vec::new(),
            payload: AttackPayload::Nothing,
            interval: None,
            on_finished: OnFinished::Hold,
            reads: true,
            receive_buffer: None,
            reopens: true,
        }
    }

    /// Plain TCP connections that send `first`.
    pub(crate) fn raw(connections: u32, first: fn(u32) -> Vec<u8>) -> Self {
        Self {
            handshake: AttackHandshake::Raw,
            first,
            ..Self::websocket(connections, |_| String::new())
        }
    }

    /// Repeats bytes as fast as the socket accepts them.
    pub(crate) fn repeating(self, bytes: &[u8]) -> Self {
        // Chunks of some KiB, so that the attacker's own system calls do not limit the rate.
        let times = (16 * 1024 / bytes.len().max(1)).max(1);
        Self { payload: AttackPayload::Repeat(bytes.repeat(times)), ..self }
    }

    /// Sends generated chunks.
    pub(crate) fn sending(self, each: fn(u32, u64) -> Option<Vec<u8>>) -> Self {
        Self { payload: AttackPayload::Generate(each), ..self }
    }

    /// Sends `rate` chunks a second on each connection.
    pub(crate) fn per_second(self, rate: u32) -> Self {
        Self { interval: Some(Duration::from_secs(1) / rate), ..self }
    }
}

/// A text frame.
pub(crate) fn text(payload: &str) -> Vec<u8> {
    frame(0x81, payload.as_bytes())
}

/// A frame of a client: the first byte (FIN, RSV, opcode), then the payload under a zero mask,
/// which leaves the bytes as they are and costs the server the same.
pub(crate) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = frame_header(first, payload.len() as u64);
    frame.extend_from_slice(payload);
    frame
}

/// The header of a frame that announces `length` bytes.
pub(crate) fn frame_header(first: u8, length: u64) -> Vec<u8> {
    let mut header = vec![first];
    match length {
        0..=125 => header.push(0x80 | length as u8),
        126..=0xFFFF => {
            header.push(0x80 | 126);
            header.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            header.push(0x80 | 127);
            header.extend_from_slice(&length.to_be_bytes());
        }
    }
    header.extend_from_slice(&[0; 4]);
    header
}

/// A binary frame of the protocol: the header's length, the header, the payload.
pub(crate) fn binary(header: &str, payload: &[u8]) -> Vec<u8> {
    let length = header.len() as u16;
    frame(0x82, &[&length.to_be_bytes(), header.as_bytes(), payload].concat())
}

#[cfg(test)]
mod tests {
    use skein_websocket::{Decoder, DecoderEvent};

    use super::*;

    #[test]
    fn gateway_decoder_reads_attack_frames() {
        assert_eq!(frame(0x89, b""), [0x89, 0x80, 0, 0, 0, 0]);
        assert_eq!(text("x"), [0x81, 0x81, 0, 0, 0, 0, b'x']);
        let mut decoder = Decoder::new(1 << 20);
        for length in [0, 125, 126, 65_535, 65_536] {
            let payload = "y".repeat(length);
            let mut bytes = text(&payload);
            assert_eq!(decoder.next(&mut bytes).unwrap().1, Some(DecoderEvent::Text(&payload)));
        }
    }

    #[test]
    fn repeated_frame_fills_a_chunk_of_whole_frames() {
        let chunk = |bytes: &[u8]| match AttackProfile::websocket(1, |_| "/ws".to_owned())
            .repeating(bytes)
            .payload
        {
            AttackPayload::Repeat(chunk) => chunk.len(),
            AttackPayload::Nothing | AttackPayload::Generate(_) => 0,
        };
        assert!(chunk(&[7; 6]).is_multiple_of(6) && chunk(&[7; 6]) > 8 * 1024);
        assert_eq!(chunk(&[7; 250_000]), 250_000);
    }
}
