//! One WebSocket to a gateway with nothing hidden: no reconnects, no retries, no state.
//!
//! [`Connection::open`] tells an HTTP refusal apart from a network that failed; [`Connection::next`]
//! gives every frame that arrives, parsed and as it was written. The helpers (`expect_connected`,
//! `join`, `request`) pick one answer out and keep what came before it for `next`. The socket is
//! tokio-tungstenite's, so that the gateway's own codec is checked by another implementation.
//!
//! Used by `client::task` and by every test that speaks to a gateway.

use std::{
    collections::VecDeque,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use serde::Serialize;
use serde_json::Value;
use tokio::{
    net::{TcpSocket, TcpStream, lookup_host},
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        self, Message,
        http::{HeaderMap, Uri, header},
        protocol::{
            CloseFrame, WebSocketConfig,
            frame::{Frame as RawFrame, FrameHeader, coding},
        },
    },
};

use super::{
    frames,
    options::{ConnectError, ConnectOptions, text_of},
};
use crate::{
    codec::Opcode,
    ids::RoomId,
    protocol::{
        FrameRef,
        server_frame::{self, ConnectedFrame, ErrorFrame, HistoryEntry, JoinedFrame, ServerFrame},
    },
};

/// How long the helpers wait for their answer.
pub const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// How many frames the helpers keep for `next` while they look for their answer.
pub const PASSED_OVER_MAX: usize = 10_000;

/// What arrived.
#[derive(Clone, Debug)]
pub enum Received {
    /// A frame of the protocol, and its text.
    Frame(ServerFrame, String),
    /// A binary message of a room's log: its header and its payload.
    Binary(Box<server_frame::MessageFrame>, Bytes),
    /// A binary direct of the inbox: its header and its payload.
    BinaryDirect(Box<server_frame::DirectFrame>, Bytes),
    /// Text that is no frame of the protocol.
    Text(String),
    /// Bytes that are no frame of the protocol.
    Bytes(Bytes),
    /// A ping. It is answered by itself, with the next call of [`Connection::next`].
    Ping(Bytes),
    /// A pong.
    Pong(Bytes),
}

/// The connection has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("connection closed: {} {reason}", code.map_or("no close frame".to_owned(), |code| code.to_string()))]
pub struct Closed {
    /// The close code; `None` where there was no close frame, or one without a code.
    pub code: Option<u16>,
    /// The reason given, or what went wrong.
    pub reason: String,
}

/// A helper did not get the answer that it waited for.
#[derive(Debug, thiserror::Error)]
pub enum Unexpected {
    /// The connection ended.
    #[error(transparent)]
    Closed(#[from] Closed),
    /// The frame was refused.
    #[error("refused: {} {}", .0.code.as_str(), .0.message)]
    Refused(Box<ErrorFrame>),
    /// Another frame came.
    #[error("unexpected: {0:?}")]
    Frame(Box<Received>),
    /// Nothing came within [`ANSWER_WAIT`].
    #[error("no answer within {ANSWER_WAIT:?}")]
    TimedOut,
    /// More than [`PASSED_OVER_MAX`] other frames came.
    #[error("more than {PASSED_OVER_MAX} frames came, and the answer was not among them")]
    TooMany,
}

/// An open connection. Dropping it ends the TCP connection without a close frame.
#[derive(Debug)]
pub struct Connection {
    socket: WebSocketStream<TcpStream>,
    headers: HeaderMap,
    local: SocketAddr,
    /// What the helpers passed over.
    passed_over: VecDeque<Received>,
    next_reference: u64,
    closed: Option<Closed>,
}

impl Connection {
    /// Connects and makes the handshake.
    ///
    /// # Errors
    ///
    /// [`ConnectError`]. A gateway also refuses after the handshake, by a close code: see
    /// [`Connection::next`].
    pub async fn open(options: &ConnectOptions) -> Result<Self, ConnectError> {
        let uri = options.uri()?;
        let request = options.request(uri.clone())?;
        let config = WebSocketConfig::default()
            .read_buffer_size(16 * 1024)
            .write_buffer_size(0)
            .max_message_size(Some(options.message_bytes_max))
            .max_frame_size(Some(options.message_bytes_max));
        let opening = async {
            let stream = connect(&uri, options.local_address).await?;
            stream.set_nodelay(true)?;
            let local = stream.local_addr()?;
            let handshake = client_async_with_config(request, stream, Some(config));
            let (socket, response) = handshake.await.map_err(ConnectError::from_handshake)?;
            let headers = response.headers().clone();
            let passed_over = VecDeque::new();
            Ok(Self { socket, headers, local, passed_over, next_reference: 1, closed: None })
        };
        match timeout(options.connect_timeout, Box::pin(opening)).await {
            Ok(opened) => opened,
            Err(_) => Err(ConnectError::TimedOut(options.connect_timeout)),
        }
    }

    /// A header of the server's answer to the handshake.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(text_of)
    }

    /// The subprotocol the server chose.
    pub fn subprotocol(&self) -> Option<&str> {
        self.header(header::SEC_WEBSOCKET_PROTOCOL.as_str())
    }

    /// The address connected from.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Sends a frame.
    ///
    /// # Errors
    ///
    /// [`Closed`] where it could not be written, without a code: what the server said before it
    /// went, its close code included, is still to be had from [`Connection::next`].
    ///
    /// # Panics
    ///
    /// Where `frame` cannot be JSON.
    pub async fn send_json(&mut self, frame: &impl Serialize) -> Result<(), Closed> {
        self.send_text(&frames::text(frame)).await
    }

    /// Sends a text message as it is.
    ///
    /// # Errors
    ///
    /// As [`Connection::send_json`].
    pub async fn send_text(&mut self, text: &str) -> Result<(), Closed> {
        self.socket.send(Message::text(text)).await.map_err(broken)
    }

    /// Sends a binary frame: `header` as JSON behind its length, then the payload.
    ///
    /// # Errors
    ///
    /// As [`Connection::send_json`].
    ///
    /// # Panics
    ///
    /// Where the header cannot be JSON or is longer than 65,535 bytes.
    pub async fn send_binary(
        &mut self,
        header: &impl Serialize,
        payload: &[u8],
    ) -> Result<(), Closed> {
        let frame = frames::binary(header, payload).expect("the header is short");
        self.send_bytes(frame).await
    }

    /// Sends a binary message as it is.
    ///
    /// # Errors
    ///
    /// As [`Connection::send_json`].
    pub async fn send_bytes(&mut self, bytes: impl Into<Bytes>) -> Result<(), Closed> {
        self.socket.send(Message::Binary(bytes.into())).await.map_err(broken)
    }

    /// Sends one WebSocket frame of any kind, also where it makes no sense: control frames,
    /// fragments (`fin` false), a close frame that this side does not take for its own.
    ///
    /// # Errors
    ///
    /// As [`Connection::send_json`].
    pub async fn send_raw(
        &mut self,
        opcode: Opcode,
        fin: bool,
        payload: &[u8],
    ) -> Result<(), Closed> {
        let opcode = match opcode {
            Opcode::Continuation => coding::OpCode::Data(coding::Data::Continue),
            Opcode::Text => coding::OpCode::Data(coding::Data::Text),
            Opcode::Binary => coding::OpCode::Data(coding::Data::Binary),
            Opcode::Close => coding::OpCode::Control(coding::Control::Close),
            Opcode::Ping => coding::OpCode::Control(coding::Control::Ping),
            Opcode::Pong => coding::OpCode::Control(coding::Control::Pong),
        };
        let header = FrameHeader { is_final: fin, opcode, ..FrameHeader::default() };
        let frame = RawFrame::from_payload(header, Bytes::copy_from_slice(payload));
        self.socket.send(Message::Frame(frame)).await.map_err(broken)
    }

    /// Puts a text message into the buffer that [`Connection::flush`] writes.
    pub(super) async fn feed_text(&mut self, text: String) -> Result<(), Closed> {
        self.socket.feed(Message::text(text)).await.map_err(broken)
    }

    /// Puts a binary message into the buffer that [`Connection::flush`] writes.
    pub(super) async fn feed_bytes(&mut self, bytes: Vec<u8>) -> Result<(), Closed> {
        self.socket.feed(Message::binary(bytes)).await.map_err(broken)
    }

    /// Writes what was fed.
    pub(super) async fn flush(&mut self) -> Result<(), Closed> {
        self.socket.flush().await.map_err(broken)
    }

    /// The next thing to arrive. Cancel-safe: nothing is lost by dropping the future.
    ///
    /// # Errors
    ///
    /// [`Closed`], from then on for ever.
    pub async fn next(&mut self) -> Result<Received, Closed> {
        match self.passed_over.pop_front() {
            Some(received) => Ok(received),
            None => self.read().await,
        }
    }

    /// The next frame of the protocol, whatever it is; pings and pongs are skipped.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] where the connection ends, something else comes, or nothing within
    /// [`ANSWER_WAIT`].
    pub async fn next_frame(&mut self) -> Result<ServerFrame, Unexpected> {
        let frame = async {
            loop {
                match self.next().await? {
                    Received::Frame(frame, _) => return Ok(frame),
                    Received::Ping(_) | Received::Pong(_) => {}
                    other => return Err(Unexpected::Frame(Box::new(other))),
                }
            }
        };
        timeout(ANSWER_WAIT, frame).await.unwrap_or(Err(Unexpected::TimedOut))
    }

    /// Takes the `connected` that every connection starts with.
    ///
    /// # Errors
    ///
    /// [`Unexpected`]
    pub async fn expect_connected(&mut self) -> Result<ConnectedFrame, Unexpected> {
        match self.next_frame().await? {
            ServerFrame::Connected(connected) => Ok(*connected),
            other => Err(Unexpected::Frame(Box::new(Received::Frame(other, String::new())))),
        }
    }

    /// Joins `room` from now on, without history.
    ///
    /// # Errors
    ///
    /// [`Unexpected`], `Refused` among them.
    pub async fn join(&mut self, room: &RoomId) -> Result<JoinedFrame<HistoryEntry>, Unexpected> {
        self.join_with(&frames::Join { history: Some(0), ..frames::Join::to(room) }).await
    }

    /// Joins as `join` says; its `ref` is set here.
    ///
    /// # Errors
    ///
    /// [`Unexpected`], `Refused` among them.
    pub async fn join_with(
        &mut self,
        join: &frames::Join<'_>,
    ) -> Result<JoinedFrame<HistoryEntry>, Unexpected> {
        match self.request(join).await? {
            ServerFrame::Joined(joined) => Ok(*joined),
            other => Err(Unexpected::Frame(Box::new(Received::Frame(other, String::new())))),
        }
    }

    /// Sends `frame` with a `ref` of its own and waits for the answer to it. What comes before the
    /// answer is kept for [`Connection::next`].
    ///
    /// # Errors
    ///
    /// [`Unexpected`]; an `error` that answers the frame is `Refused`.
    ///
    /// # Panics
    ///
    /// Where `frame` is no JSON object.
    pub async fn request(&mut self, frame: &impl Serialize) -> Result<ServerFrame, Unexpected> {
        let reference = FrameRef::number(self.next_reference);
        let mut frame = serde_json::to_value(frame).expect("a frame is JSON");
        let members = frame.as_object_mut().expect("a frame is an object");
        members.insert("ref".to_owned(), Value::from(self.next_reference));
        self.next_reference += 1;
        self.send_json(&frame).await?;
        let answer = self.answer_to(&reference);
        match timeout(ANSWER_WAIT, answer).await.unwrap_or(Err(Unexpected::TimedOut))? {
            ServerFrame::Error(error_frame) => Err(Unexpected::Refused(error_frame)),
            answer => Ok(answer),
        }
    }

    /// Starts the close, reads on until the server has answered it, and tells how it ended.
    pub async fn close(&mut self, code: u16, reason: &str) -> Closed {
        let frame = CloseFrame { code: code.into(), reason: reason.to_owned().into() };
        let closed = async {
            // Where it cannot be written the reading below tells why.
            let _ = self.socket.send(Message::Close(Some(frame))).await;
            loop {
                if let Err(closed) = self.next().await {
                    return closed;
                }
            }
        };
        let silent = || Closed { code: None, reason: "the close was not answered".to_owned() };
        timeout(ANSWER_WAIT, closed).await.unwrap_or_else(|_| silent())
    }

    async fn answer_to(&mut self, reference: &FrameRef) -> Result<ServerFrame, Unexpected> {
        loop {
            match self.read().await? {
                Received::Frame(frame, _) if frame.reference() == Some(reference) => {
                    return Ok(frame);
                }
                other if self.passed_over.len() < PASSED_OVER_MAX => {
                    self.passed_over.push_back(other);
                }
                _ => return Err(Unexpected::TooMany),
            }
        }
    }

    /// Cancel-safe: the socket's own reading is, and what is kept is kept before any await.
    async fn read(&mut self) -> Result<Received, Closed> {
        if let Some(closed) = &self.closed {
            return Err(closed.clone());
        }
        let message = match self.socket.next().await {
            Some(Ok(message)) => message,
            Some(Err(error)) => return Err(self.closed.insert(broken(error)).clone()),
            None => {
                let closed = Closed { code: None, reason: "end of stream".to_owned() };
                return Err(self.closed.insert(closed).clone());
            }
        };
        Ok(match message {
            Message::Text(text) => match serde_json::from_str(&text) {
                Ok(frame) => Received::Frame(frame, text.as_str().to_owned()),
                Err(_) => Received::Text(text.as_str().to_owned()),
            },
            Message::Binary(bytes) => binary(bytes),
            Message::Ping(bytes) => Received::Ping(bytes),
            Message::Pong(bytes) => Received::Pong(bytes),
            Message::Close(frame) => {
                let closed = Closed {
                    code: frame.as_ref().map(|frame| frame.code.into()),
                    reason: frame.map(|frame| frame.reason.to_string()).unwrap_or_default(),
                };
                self.closed = Some(closed.clone());
                // The answer to the close waits in the buffer. Whether it leaves is the server's
                // affair, which may have stopped reading.
                let _ = timeout(Duration::from_secs(1), self.socket.flush()).await;
                return Err(closed);
            }
            Message::Frame(frame) => Received::Bytes(frame.into_payload()),
        })
    }
}

async fn connect(uri: &Uri, local: Option<IpAddr>) -> io::Result<TcpStream> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in lookup_host((host, uri.port_u16().unwrap_or(80))).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(local) = local {
            socket.bind(SocketAddr::new(local, 0))?;
        }
        match socket.connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn broken(error: tungstenite::Error) -> Closed {
    Closed { code: None, reason: error.to_string() }
}

/// Reads a binary frame as an entry of a log, if it is one.
fn binary(bytes: Bytes) -> Received {
    match binary_header(&bytes) {
        Some((HistoryEntry::Message(message), payload_at)) => {
            Received::Binary(message, bytes.slice(payload_at..))
        }
        Some((HistoryEntry::Direct(direct), payload_at)) => {
            Received::BinaryDirect(direct, bytes.slice(payload_at..))
        }
        Some((HistoryEntry::Unknown, _)) | None => Received::Bytes(bytes),
    }
}

fn binary_header(bytes: &[u8]) -> Option<(HistoryEntry, usize)> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    let length = usize::from(u16::from_be_bytes(*length));
    let header = serde_json::from_slice(rest.get(..length)?).ok()?;
    Some((header, 2 + length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_frame_of_another_kind_is_bytes() {
        for bytes in [&b""[..], b"\0", b"\0\x05{}", b"\0\x12{\"type\":\"unknown\"}", b"echo"] {
            assert!(matches!(binary(Bytes::copy_from_slice(bytes)), Received::Bytes(_)));
        }
    }
}
