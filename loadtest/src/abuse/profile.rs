//! What an attacker does, as data: how many connections it opens, from how many addresses, what each
//! sends, how fast, and what it does when it has sent all.
//!
//! Pure.

use std::time::Duration;

/// One kind of connection of an attack.
#[derive(Clone, Debug)]
pub(crate) struct AttackProfile {
    /// How many connections are open at once.
    pub(crate) connections: u32,
    /// How many source addresses they share.
    pub(crate) addresses: u32,
    /// How many connections are opened per second.
    pub(crate) opens_per_second: u32,
    /// What precedes the first frame.
    pub(crate) handshake: AttackHandshake,
    /// The path of the handshake, by the serial number of the connection.
    pub(crate) path: fn(u32) -> String,
    /// Bytes that each connection sends first.
    pub(crate) first: fn(u32) -> Vec<u8>,
    /// Bytes that follow.
    pub(crate) payload: AttackPayload,
    /// The time between two chunks of a connection; `None`: as fast as the socket takes them.
    pub(crate) interval: Option<Duration>,
    /// What happens after the last chunk.
    pub(crate) on_finished: OnFinished,
    /// Whether the attacker reads the answers.
    pub(crate) reads: bool,
    /// `SO_RCVBUF` of the attacker's socket.
    pub(crate) receive_buffer: Option<usize>,
    /// Whether a connection that the server closed is opened again.
    pub(crate) reopens: bool,
}

/// What precedes the first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttackHandshake {
    /// The handshake of a WebSocket.
    WebSocket,
    /// The same, offering permessage-deflate.
    Deflate,
    /// The handshake is sent, and its answer is not waited for.
    Unawaited,
    /// Nothing: plain TCP.
    Raw,
}

/// The chunks that a connection sends after the first.
#[derive(Clone, Debug)]
pub(crate) enum AttackPayload {
    /// None.
    Nothing,
    /// The same bytes again and again.
    Repeat(Vec<u8>),
    /// Chunks by the connection's serial number and their index, until `None`.
    Generate(fn(u32, u64) -> Option<Vec<u8>>),
}

/// What happens after the last chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnFinished {
    /// The connection stays open.
    Hold,
    /// It is closed without a close frame.
    Close,
    /// It is closed, and another one is opened.
    Reopen,
}

impl AttackProfile {
    /// Connections to `/ws` that send nothing and read what they get.
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

    /// Repeats bytes, as fast as the socket takes them.
    pub(crate) fn repeating(self, bytes: &[u8]) -> Self {
        // Chunks of some KiB, so that the attacker's own system calls do not limit the rate.
        let times = (16 * 1024 / bytes.len().max(1)).max(1);
        Self { payload: AttackPayload::Repeat(bytes.repeat(times)), ..self }
    }

    /// Sends numbered chunks.
    pub(crate) fn sending(self, each: fn(u32, u64) -> Option<Vec<u8>>) -> Self {
        Self { payload: AttackPayload::Generate(each), ..self }
    }

    /// Sends so many chunks a second on each connection.
    pub(crate) fn per_second(self, rate: u32) -> Self {
        Self { interval: Some(Duration::from_secs(1) / rate), ..self }
    }
}

/// A text frame.
pub(crate) fn text(payload: &str) -> Vec<u8> {
    frame(0x81, payload.as_bytes())
}

/// A frame of a client: the first byte (FIN, RSV, opcode), then the payload under a zero mask, which
/// leaves the bytes as they are and costs the server the same.
pub(crate) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = frame_header(first, payload.len() as u64);
    frame.extend_from_slice(payload);
    frame
}

/// The header alone of a frame that announces so many bytes.
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
    fn frames_are_those_of_the_issue_and_the_gateway_reads_them() {
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
    fn a_repeated_frame_fills_a_chunk_of_whole_frames() {
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
