//! A client that sends raw bytes and decodes the server's frames by itself, so that no code of the
//! gateway checks the gateway.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::harness::within;

pub const FIN: u8 = 0x80;
pub const RSV1: u8 = 0x40;
pub const CONTINUATION: u8 = 0x0;
pub const TEXT: u8 = 0x1;
pub const BINARY: u8 = 0x2;
pub const CLOSE: u8 = 0x8;
pub const PING: u8 = 0x9;
pub const PONG: u8 = 0xA;

/// Encodes a frame of a client: first byte, length, mask, masked payload.
pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    const MASK: [u8; 4] = [0xA5, 0x00, 0x5A, 0xFF];
    let mut frame = vec![first];
    match payload.len() {
        length @ 0..=125 => frame.push(0x80 | length as u8),
        length @ 126..=0xFFFF => {
            frame.push(0x80 | 126);
            frame.extend((length as u16).to_be_bytes());
        }
        length => {
            frame.push(0x80 | 127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend(MASK);
    frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

/// A whole text message.
pub fn text(text: &str) -> Vec<u8> {
    frame(FIN | TEXT, text.as_bytes())
}

/// A close frame.
pub fn close(code: u16, reason: &[u8]) -> Vec<u8> {
    frame(FIN | CLOSE, &[&code.to_be_bytes(), reason].concat())
}

/// A frame of the server: its first byte and its payload.
pub type RawFrame = (u8, Vec<u8>);

pub struct RawClient {
    socket: TcpStream,
    received: Vec<u8>,
    /// The negotiated extensions.
    pub extensions: Option<String>,
}

impl RawClient {
    /// Opens `path`, with `headers` in addition to those of every handshake.
    pub async fn open(address: SocketAddr, path: &str, headers: &[&str]) -> Self {
        let mut request = format!(
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        );
        for header in headers {
            request.push_str(&format!("{header}\r\n"));
        }
        request.push_str("\r\n");
        let socket = TcpStream::connect(address).await.unwrap();
        let mut client = Self { socket, received: Vec::new(), extensions: None };
        client.send(request.as_bytes()).await;
        let end = loop {
            let end = client.received.windows(4).position(|window| window == b"\r\n\r\n");
            if let Some(end) = end {
                break end;
            }
            assert!(client.receive().await, "no response to the handshake");
        };
        let header: Vec<u8> = client.received.drain(..end + 4).collect();
        let header = String::from_utf8(header).unwrap();
        assert!(header.starts_with("HTTP/1.1 101 "), "{header}");
        client.extensions = header.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("sec-websocket-extensions").then(|| value.trim().to_owned())
        });
        client
    }

    /// Sends bytes. A server that has ended the connection may not read them all.
    pub async fn send(&mut self, bytes: &[u8]) {
        let _ = within(self.socket.write_all(bytes)).await;
    }

    /// Sends `frames` repeatedly, and reads, until the server closes. Returns the payload of its
    /// close frame, if there is one.
    pub async fn flood(self, frames: &[u8]) -> Option<Vec<u8>> {
        let Self { mut socket, mut received, .. } = self;
        let (mut reads, mut writes) = socket.split();
        let writing = async {
            while writes.write_all(frames).await.is_ok() {}
            std::future::pending::<()>().await;
        };
        let reading = async {
            loop {
                while let Some((first, payload)) = take_frame(&mut received) {
                    if first == FIN | CLOSE {
                        return Some(payload);
                    }
                }
                if !matches!(reads.read_buf(&mut received).await, Ok(count) if count > 0) {
                    return None;
                }
            }
        };
        tokio::select! {
            close = within(reading) => close,
            () = writing => None,
        }
    }

    /// Receives more bytes. Returns `false` at the end of the connection.
    async fn receive(&mut self) -> bool {
        matches!(within(self.socket.read_buf(&mut self.received)).await, Ok(count) if count > 0)
    }

    /// The next frame; `None` at the end of the connection.
    pub async fn next(&mut self) -> Option<RawFrame> {
        loop {
            if let Some(frame) = take_frame(&mut self.received) {
                return Some(frame);
            }
            if !self.receive().await {
                assert!(self.received.is_empty(), "the connection ended within a frame");
                return None;
            }
        }
    }
}

/// Removes the first frame from the received bytes, if it is complete.
fn take_frame(received: &mut Vec<u8>) -> Option<RawFrame> {
    let bytes = &*received;
    let (first, second) = (*bytes.first()?, *bytes.get(1)?);
    assert_eq!(second & 0x80, 0, "frames of a server are not masked");
    let (start, length) = match second {
        126 => (4, usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().unwrap()))),
        127 => (10, u64::from_be_bytes(bytes.get(2..10)?.try_into().unwrap()) as usize),
        length => (2, usize::from(length)),
    };
    let payload = bytes.get(start..start + length)?.to_vec();
    received.drain(..start + length);
    Some((first, payload))
}
