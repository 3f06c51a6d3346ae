//! A blocking client, which opens connections before the measurement begins.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::websocket::{self, FrameReader, HandshakeResponse, WebSocketError, WsFrame};

/// Time limit of one response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a connection of the load failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The socket failed.
    #[error("connection of the load generator: {0}")]
    Io(#[from] io::Error),
    /// The server violated the protocol.
    #[error("connection of the load generator: {0}")]
    Wire(#[from] WebSocketError),
    /// The handshake was rejected.
    #[error("handshake rejected with HTTP {status}")]
    Rejected { status: u16 },
    /// The server closed the connection.
    #[error("the server closed before `{expected}`")]
    Closed { expected: &'static str },
}

/// A connection with its frame reader.
pub(crate) struct BlockingClient {
    pub(crate) stream: TcpStream,
    pub(crate) reader: FrameReader,
    buffer: Box<[u8]>,
}

/// Connects as user `index` and joins a room.
pub(crate) fn join(
    address: SocketAddr,
    index: usize,
    room: &str,
) -> Result<(TcpStream, FrameReader), ClientError> {
    let mut client = BlockingClient::connect(address, &format!("/ws?user=bench-{index:05}"))?;
    client.wait_for("connected")?;
    client.send_text(&format!(r#"{{"type":"join","room":"{room}","history":0}}"#))?;
    client.wait_for("joined")?;
    Ok((client.stream, client.reader))
}

impl BlockingClient {
    /// Connects and completes the handshake.
    pub(crate) fn connect(address: SocketAddr, path: &str) -> Result<Self, ClientError> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
        stream.write_all(&websocket::handshake_request(&address.to_string(), path))?;
        let mut head = Vec::new();
        loop {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
            match websocket::parse_response(&head)? {
                None => {}
                Some(HandshakeResponse::Rejected { status }) => {
                    return Err(ClientError::Rejected { status });
                }
                Some(HandshakeResponse::Upgraded { .. }) => break,
            }
        }
        let mut reader = FrameReader::default();
        reader.keeps_payload = true;
        Ok(Self { stream, reader, buffer: vec![0; 16 * 1024].into() })
    }

    /// Sends a text frame.
    pub(crate) fn send_text(&mut self, text: &str) -> io::Result<()> {
        self.stream.write_all(&websocket::text(text))
    }

    /// Reads until a message of this type arrives.
    fn wait_for(&mut self, kind: &'static str) -> Result<(), ClientError> {
        let start = format!(r#"{{"type":"{kind}""#);
        self.wait_until(kind, |message| message.starts_with(start.as_bytes()))
    }

    /// Reads until a message arrives for which `is` returns true.
    pub(crate) fn wait_until(
        &mut self,
        expected: &'static str,
        is: impl Fn(&[u8]) -> bool,
    ) -> Result<(), ClientError> {
        loop {
            let count = self.stream.read(&mut self.buffer)?;
            if count == 0 {
                return Err(ClientError::Closed { expected });
            }
            let (mut has_arrived, mut closed) = (false, false);
            self.reader.push(&self.buffer[..count], |received| match received {
                WsFrame::Message(message) => {
                    has_arrived |= message.is_some_and(|message| is(&message));
                }
                WsFrame::Close(..) => closed = true,
                WsFrame::Ping(_) | WsFrame::Pong(_) => {}
            })?;
            if has_arrived {
                return Ok(());
            }
            if closed {
                return Err(ClientError::Closed { expected });
            }
        }
    }
}
