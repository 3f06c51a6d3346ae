//! Opens one connection of the load, and waits while it does: what is measured begins later.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::websocket::{self, FrameReader, HandshakeResponse, WebSocketError, WsFrame};

/// How long one answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// A connection of the load does not work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The socket fails.
    #[error("a connection of the load: {0}")]
    Io(#[from] io::Error),
    /// The server breaks the protocol.
    #[error("a connection of the load: {0}")]
    Wire(#[from] WebSocketError),
    /// The handshake was rejected.
    #[error("a handshake was answered with HTTP {status}")]
    Rejected { status: u16 },
    /// The server closed.
    #[error("the server closed before `{awaited}`")]
    Closed { awaited: &'static str },
}

/// A connection and the frames that arrive on it, one after the other.
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
    client.say(&format!(r#"{{"type":"join","room":"{room}","history":0}}"#))?;
    client.wait_for("joined")?;
    Ok((client.stream, client.reader))
}

impl BlockingClient {
    /// Connects.
    pub(crate) fn connect(address: SocketAddr, path: &str) -> Result<Self, ClientError> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
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

    /// Sends a text.
    pub(crate) fn say(&mut self, text: &str) -> io::Result<()> {
        self.stream.write_all(&websocket::text(text))
    }

    /// Reads until a message of this type has come.
    fn wait_for(&mut self, kind: &'static str) -> Result<(), ClientError> {
        let start = format!(r#"{{"type":"{kind}""#);
        self.wait_until(kind, |message| message.starts_with(start.as_bytes()))
    }

    /// Reads until a message has come that `is` the one.
    pub(crate) fn wait_until(
        &mut self,
        awaited: &'static str,
        is: impl Fn(&[u8]) -> bool,
    ) -> Result<(), ClientError> {
        loop {
            let count = self.stream.read(&mut self.buffer)?;
            if count == 0 {
                return Err(ClientError::Closed { awaited });
            }
            let (mut came, mut closed) = (false, false);
            self.reader.push(&self.buffer[..count], |received| match received {
                WsFrame::Message(message) => came |= message.is_some_and(|message| is(&message)),
                WsFrame::Close(..) => closed = true,
                WsFrame::Ping(_) | WsFrame::Pong(_) => {}
            })?;
            if came {
                return Ok(());
            }
            if closed {
                return Err(ClientError::Closed { awaited });
            }
        }
    }
}
