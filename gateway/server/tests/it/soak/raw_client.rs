//! A minimal client: one socket, prepared bytes, no codec.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::harness::PATIENCE;

/// The source address of a client: one of 64 from 127.77.0.1 on, so that neither ports nor the
/// limits of one address run out.
pub fn source(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(127, 77, 0, u8::try_from(index % 64 + 1).unwrap())
}

/// A handshake as `user`.
pub fn handshake(user: &str) -> String {
    format!(
        "GET /ws?user={user} HTTP/1.1\r\nHost: soak\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
}

/// A masked text frame; the mask is zero, so the text is unchanged.
pub fn text(text: &str) -> Vec<u8> {
    frame(0x81, text.as_bytes())
}

/// A close frame with code 1000.
pub fn close_frame() -> Vec<u8> {
    frame(0x88, &1000_u16.to_be_bytes())
}

fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match u8::try_from(payload.len()) {
        Ok(short @ ..=125) => frame.push(0x80 | short),
        _ => {
            frame.push(0x80 | 126);
            frame.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend_from_slice(payload);
    frame
}

pub fn join_frame(room: &str) -> Vec<u8> {
    text(&format!(r#"{{"type":"join","room":"{room}","history":0}}"#))
}

pub fn message_frame(room: &str, content: &str) -> Vec<u8> {
    text(&format!(r#"{{"type":"message","room":"{room}","content":"{content}"}}"#))
}

/// A raw client connection.
pub struct SoakClient {
    socket: TcpStream,
    read: Vec<u8>,
}

impl SoakClient {
    /// A TCP connection from one of the 64 addresses.
    pub async fn dial(address: SocketAddr, index: usize) -> io::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((source(index), 0).into())?;
        let socket = socket.connect(address).await?;
        Ok(Self { socket, read: Vec::new() })
    }

    /// Connects and joins `room` in one write.
    pub async fn join(address: SocketAddr, index: usize, room: &str) -> io::Result<Self> {
        let mut wire = Self::dial(address, index).await?;
        let mut bytes = handshake(&format!("u{index}")).into_bytes();
        bytes.extend(join_frame(room));
        wire.send(&bytes).await?;
        wire.expect(r#""type":"joined""#).await?;
        Ok(wire)
    }

    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes).await
    }

    /// Reads until `text` has arrived.
    pub async fn expect(&mut self, text: &str) -> io::Result<()> {
        let read = async {
            loop {
                if let Some(at) = find(&self.read, text.as_bytes()) {
                    self.read.drain(..at + text.len());
                    self.read.shrink_to(0);
                    return Ok(());
                }
                if self.socket.read_buf(&mut self.read).await? == 0 {
                    let said = String::from_utf8_lossy(&self.read).into_owned();
                    return Err(io::Error::other(format!("ended before {text}: {said}")));
                }
            }
        };
        timeout(PATIENCE, read).await.map_err(|_| io::Error::other(format!("no {text}")))?
    }

    /// Reads until the peer closes.
    pub async fn read_to_end(&mut self) -> io::Result<()> {
        let mut buffer = [0; 1024];
        let read = async { while self.socket.read(&mut buffer).await.is_ok_and(|n| n > 0) {} };
        timeout(PATIENCE, read).await.map_err(|_| io::Error::other("it does not end"))
    }

    /// Closes with a FIN.
    pub fn finish(self) {
        drop(self.socket);
    }

    /// Closes with an RST.
    pub fn reset(self) {
        self.socket.set_zero_linger().unwrap();
        drop(self.socket);
    }

    /// Sends as much as fits without waiting; a close frame always fits.
    pub fn send_now(&self, bytes: &[u8]) {
        let _ = self.socket.try_write(bytes);
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
