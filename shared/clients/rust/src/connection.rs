//! One WebSocket to a gateway, unmodified: no reconnects, no retries, no state.
//!
//! [`ClientConnection::open`] distinguishes an HTTP rejection from a network error.
//! [`ClientConnection::next`] returns every message, parsed and as text. The helpers
//! (`expect_connected`, `join`, `request`) wait for one reply and buffer earlier messages for
//! `next`. The socket is tokio-tungstenite's, so that another implementation checks the gateway's
//! codec.
//!
//! Used by `client::task` and by all tests that connect to a gateway.

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
    Connector, MaybeTlsStream, WebSocketStream, client_async_tls_with_config,
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
use skein_protocol::{
    ids::RoomId,
    protocol::{
        FrameRef,
        server_frame::{self, ConnectedFrame, ErrorFrame, HistoryEntry, JoinedFrame, ServerFrame},
    },
};
use skein_websocket::Opcode;

/// How long the helpers wait for a reply.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of messages that the helpers buffer for `next` while they wait.
pub const BUFFERED_MAX: usize = 10_000;

/// A message from the gateway.
#[derive(Clone, Debug)]
pub enum ReceivedMessage {
    /// A frame of the protocol, and its text.
    Frame(ServerFrame, String),
    /// A binary message of a room's log: header and payload.
    Binary(Box<server_frame::MessageFrame>, Bytes),
    /// A binary direct of the inbox: header and payload.
    BinaryDirect(Box<server_frame::DirectFrame>, Bytes),
    /// Text that is not a frame of the protocol.
    Text(String),
    /// Bytes that are not a frame of the protocol.
    Bytes(Bytes),
    /// A ping. The socket answers it with the next call of [`ClientConnection::next`].
    Ping(Bytes),
    /// A pong.
    Pong(Bytes),
}

/// The connection has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("connection closed: {} {reason}", code.map_or("no close frame".to_owned(), |code| code.to_string()))]
pub struct ConnectionClosed {
    /// The close code; `None` without a close frame, or if it has no code.
    pub code: Option<u16>,
    /// The reason of the close frame, or the error.
    pub reason: String,
}

/// Why a helper did not receive its reply.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The connection ended.
    #[error(transparent)]
    Closed(#[from] ConnectionClosed),
    /// The server rejected the frame.
    #[error("rejected: {} {}", .0.code.as_str(), .0.message)]
    Rejected(Box<ErrorFrame>),
    /// A message of another type arrived.
    #[error("unexpected message: {0:?}")]
    Frame(Box<ReceivedMessage>),
    /// No reply arrived within [`REPLY_TIMEOUT`].
    #[error("no reply within {REPLY_TIMEOUT:?}")]
    TimedOut,
    /// More than [`BUFFERED_MAX`] other messages arrived.
    #[error("no reply among {BUFFERED_MAX} messages")]
    TooManyFrames,
}

/// An open connection. Dropping it closes the TCP connection without a close frame.
#[derive(Debug)]
pub struct ClientConnection {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    headers: HeaderMap,
    local: SocketAddr,
    /// Messages that the helpers received before their reply.
    buffered: VecDeque<ReceivedMessage>,
    next_reference: u64,
    closed: Option<ConnectionClosed>,
}

impl ClientConnection {
    /// Connects and performs the handshake, with `wss://` that of TLS first.
    ///
    /// # Errors
    ///
    /// [`ConnectError`]. A gateway can also reject the client after the handshake, by a close code:
    /// see [`ClientConnection::next`].
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
            let tls = options.tls.clone().map(Connector::Rustls);
            let handshake = client_async_tls_with_config(request, stream, Some(config), tls);
            let (socket, response) = handshake.await.map_err(ConnectError::from_handshake)?;
            let headers = response.headers().clone();
            let passed_over = VecDeque::new();
            Ok(Self {
                socket,
                headers,
                local,
                buffered: passed_over,
                next_reference: 1,
                closed: None,
            })
        };
        match timeout(options.connect_timeout, Box::pin(opening)).await {
            Ok(opened) => opened,
            Err(_) => Err(ConnectError::TimedOut(options.connect_timeout)),
        }
    }

    /// A header of the handshake response.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(text_of)
    }

    /// The subprotocol the server chose.
    pub fn subprotocol(&self) -> Option<&str> {
        self.header(header::SEC_WEBSOCKET_PROTOCOL.as_str())
    }

    /// The local address of the connection.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Sends a frame.
    ///
    /// # Errors
    ///
    /// [`ConnectionClosed`] without a code if writing fails. [`ClientConnection::next`] still
    /// returns the messages that the server sent before, including its close code.
    ///
    /// # Panics
    ///
    /// If `frame` cannot be JSON.
    pub async fn send_json(&mut self, frame: &impl Serialize) -> Result<(), ConnectionClosed> {
        self.send_text(&frames::encode_text(frame)).await
    }

    /// Sends a text message unchanged.
    ///
    /// # Errors
    ///
    /// As [`ClientConnection::send_json`].
    pub async fn send_text(&mut self, text: &str) -> Result<(), ConnectionClosed> {
        self.socket.send(Message::text(text)).await.map_err(connection_error)
    }

    /// Sends a binary frame: the length of `header` as JSON, `header`, and the payload.
    ///
    /// # Errors
    ///
    /// As [`ClientConnection::send_json`].
    ///
    /// # Panics
    ///
    /// If the header cannot be JSON or is longer than 65,535 bytes.
    pub async fn send_binary(
        &mut self,
        header: &impl Serialize,
        payload: &[u8],
    ) -> Result<(), ConnectionClosed> {
        let frame =
            frames::encode_binary(header, payload).expect("the header is at most 65,535 bytes");
        self.send_bytes(frame).await
    }

    /// Sends a binary message unchanged.
    ///
    /// # Errors
    ///
    /// As [`ClientConnection::send_json`].
    pub async fn send_bytes(&mut self, bytes: impl Into<Bytes>) -> Result<(), ConnectionClosed> {
        self.socket.send(Message::Binary(bytes.into())).await.map_err(connection_error)
    }

    /// Sends one WebSocket frame of any opcode, even if it violates the protocol: control frames,
    /// fragments (`fin` is false), or a close frame that this side does not treat as its own.
    ///
    /// # Errors
    ///
    /// As [`ClientConnection::send_json`].
    pub async fn send_raw(
        &mut self,
        opcode: Opcode,
        fin: bool,
        payload: &[u8],
    ) -> Result<(), ConnectionClosed> {
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
        self.socket.send(Message::Frame(frame)).await.map_err(connection_error)
    }

    /// Writes a text message to the buffer of [`ClientConnection::flush`].
    pub(super) async fn feed_text(&mut self, text: String) -> Result<(), ConnectionClosed> {
        self.socket.feed(Message::text(text)).await.map_err(connection_error)
    }

    /// Writes a binary message to the buffer of [`ClientConnection::flush`].
    pub(super) async fn feed_bytes(&mut self, bytes: Vec<u8>) -> Result<(), ConnectionClosed> {
        self.socket.feed(Message::binary(bytes)).await.map_err(connection_error)
    }

    /// Flushes the buffer to the socket.
    pub(super) async fn flush(&mut self) -> Result<(), ConnectionClosed> {
        self.socket.flush().await.map_err(connection_error)
    }

    /// The next message. Cancel-safe: no message is lost when the future is dropped.
    ///
    /// # Errors
    ///
    /// [`ConnectionClosed`] once the connection has ended, from every call.
    pub async fn next(&mut self) -> Result<ReceivedMessage, ConnectionClosed> {
        match self.buffered.pop_front() {
            Some(received) => Ok(received),
            None => self.read().await,
        }
    }

    /// The next frame of the protocol, skipping pings and pongs.
    ///
    /// # Errors
    ///
    /// [`RequestError`] if the connection ends, another message arrives, or none within
    /// [`REPLY_TIMEOUT`].
    pub async fn next_frame(&mut self) -> Result<ServerFrame, RequestError> {
        let frame = async {
            loop {
                match self.next().await? {
                    ReceivedMessage::Frame(frame, _) => return Ok(frame),
                    ReceivedMessage::Ping(_) | ReceivedMessage::Pong(_) => {}
                    other => return Err(RequestError::Frame(Box::new(other))),
                }
            }
        };
        timeout(REPLY_TIMEOUT, frame).await.unwrap_or(Err(RequestError::TimedOut))
    }

    /// Receives `connected`, the first frame of every connection.
    ///
    /// # Errors
    ///
    /// [`RequestError`]
    pub async fn expect_connected(&mut self) -> Result<ConnectedFrame, RequestError> {
        match self.next_frame().await? {
            ServerFrame::Connected(connected) => Ok(*connected),
            other => {
                Err(RequestError::Frame(Box::new(ReceivedMessage::Frame(other, String::new()))))
            }
        }
    }

    /// Joins `room` without history.
    ///
    /// # Errors
    ///
    /// [`RequestError`], also if the server rejects it.
    pub async fn join(&mut self, room: &RoomId) -> Result<JoinedFrame<HistoryEntry>, RequestError> {
        self.join_with(&frames::OutgoingJoin {
            history: Some(0),
            ..frames::OutgoingJoin::new(room)
        })
        .await
    }

    /// Joins as `join` says; this sets its `ref`.
    ///
    /// # Errors
    ///
    /// [`RequestError`], also if the server rejects it.
    pub async fn join_with(
        &mut self,
        join: &frames::OutgoingJoin<'_>,
    ) -> Result<JoinedFrame<HistoryEntry>, RequestError> {
        match self.request(join).await? {
            ServerFrame::Joined(joined) => Ok(*joined),
            other => {
                Err(RequestError::Frame(Box::new(ReceivedMessage::Frame(other, String::new()))))
            }
        }
    }

    /// Sends `frame` with a new `ref` and waits for the reply. Earlier messages are buffered for
    /// [`ClientConnection::next`].
    ///
    /// # Errors
    ///
    /// [`RequestError`]; it is `Rejected` if the reply is an `error`.
    ///
    /// # Panics
    ///
    /// If `frame` is not a JSON object.
    pub async fn request(&mut self, frame: &impl Serialize) -> Result<ServerFrame, RequestError> {
        let reference = FrameRef::number(self.next_reference);
        let mut frame = serde_json::to_value(frame).expect("a frame is JSON");
        let fields = frame.as_object_mut().expect("a frame is an object");
        fields.insert("ref".to_owned(), Value::from(self.next_reference));
        self.next_reference += 1;
        self.send_json(&frame).await?;
        let reply = self.reply_to(&reference);
        match timeout(REPLY_TIMEOUT, reply).await.unwrap_or(Err(RequestError::TimedOut))? {
            ServerFrame::Error(error_frame) => Err(RequestError::Rejected(error_frame)),
            reply => Ok(reply),
        }
    }

    /// Begins the closing handshake, reads until the server answers it, and returns how the
    /// connection ended.
    pub async fn close(&mut self, code: u16, reason: &str) -> ConnectionClosed {
        let frame = CloseFrame { code: code.into(), reason: reason.to_owned().into() };
        let closed = async {
            // If writing fails, the reads below return the reason.
            let _ = self.socket.send(Message::Close(Some(frame))).await;
            loop {
                if let Err(closed) = self.next().await {
                    return closed;
                }
            }
        };
        let unanswered = || ConnectionClosed {
            code: None,
            reason: "the server did not answer the close".to_owned(),
        };
        timeout(REPLY_TIMEOUT, closed).await.unwrap_or_else(|_| unanswered())
    }

    async fn reply_to(&mut self, reference: &FrameRef) -> Result<ServerFrame, RequestError> {
        loop {
            match self.read().await? {
                ReceivedMessage::Frame(frame, _) if frame.reference() == Some(reference) => {
                    return Ok(frame);
                }
                other if self.buffered.len() < BUFFERED_MAX => {
                    self.buffered.push_back(other);
                }
                _ => return Err(RequestError::TooManyFrames),
            }
        }
    }

    /// Cancel-safe: so is reading the socket, and state changes before any await.
    async fn read(&mut self) -> Result<ReceivedMessage, ConnectionClosed> {
        if let Some(closed) = &self.closed {
            return Err(closed.clone());
        }
        let message = match self.socket.next().await {
            Some(Ok(message)) => message,
            Some(Err(error)) => return Err(self.closed.insert(connection_error(error)).clone()),
            None => {
                let closed = ConnectionClosed { code: None, reason: "end of stream".to_owned() };
                return Err(self.closed.insert(closed).clone());
            }
        };
        Ok(match message {
            Message::Text(text) => match serde_json::from_str(&text) {
                Ok(frame) => ReceivedMessage::Frame(frame, text.as_str().to_owned()),
                Err(_) => ReceivedMessage::Text(text.as_str().to_owned()),
            },
            Message::Binary(bytes) => binary(bytes),
            Message::Ping(bytes) => ReceivedMessage::Ping(bytes),
            Message::Pong(bytes) => ReceivedMessage::Pong(bytes),
            Message::Close(frame) => {
                let closed = ConnectionClosed {
                    code: frame.as_ref().map(|frame| frame.code.into()),
                    reason: frame.map(|frame| frame.reason.to_string()).unwrap_or_default(),
                };
                self.closed = Some(closed.clone());
                // The answer to the close is still buffered. The server may have stopped reading,
                // so a failed flush does not matter.
                let _ = timeout(Duration::from_secs(1), self.socket.flush()).await;
                return Err(closed);
            }
            Message::Frame(frame) => ReceivedMessage::Bytes(frame.into_payload()),
        })
    }
}

async fn connect(uri: &Uri, local: Option<IpAddr>) -> io::Result<TcpStream> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    let default_port = if uri.scheme_str() == Some("wss") { 443 } else { 80 };
    for address in lookup_host((host, uri.port_u16().unwrap_or(default_port))).await? {
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

fn connection_error(error: tungstenite::Error) -> ConnectionClosed {
    ConnectionClosed { code: None, reason: error.to_string() }
}

/// Parses a binary message as an entry of a log, if it is one.
fn binary(bytes: Bytes) -> ReceivedMessage {
    match binary_header(&bytes) {
        Some((HistoryEntry::Message(message), payload_at)) => {
            ReceivedMessage::Binary(message, bytes.slice(payload_at..))
        }
        Some((HistoryEntry::Direct(direct), payload_at)) => {
            ReceivedMessage::BinaryDirect(direct, bytes.slice(payload_at..))
        }
        Some((HistoryEntry::Unknown, _)) | None => ReceivedMessage::Bytes(bytes),
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
    fn a_binary_message_that_is_no_entry_is_bytes() {
        for bytes in [&b""[..], b"\0", b"\0\x05{}", b"\0\x12{\"type\":\"unknown\"}", b"echo"] {
            assert!(matches!(binary(Bytes::copy_from_slice(bytes)), ReceivedMessage::Bytes(_)));
        }
    }
}
