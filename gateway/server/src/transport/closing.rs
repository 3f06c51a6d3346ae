//! How a connection ends: by its client, by the gateway, or because the client broke the rules.

use std::{io, time::Duration};

use skein_protocol::{
    close::CloseCode,
    protocol::server_frame::{ReconnectFrame, ReconnectReason, ServerFrame},
};
use skein_websocket::CodecError;
use tokio::net::TcpStream;

use super::{Handler, READ, WebSocketConnection};
use skein_core::{drain::schedule::DrainBatch, outbox::Close};

/// How long each step of the closing handshake may take: what is queued goes out, and the client
/// answers the close frame.
const CLOSE_MAX: Duration = Duration::from_secs(5);
/// How long a client is given to end the TCP connection once both close frames are out.
const LINGER_MAX: Duration = Duration::from_secs(1);
/// How long nothing has to come from a client that broke the rules before the connection is ended: its
/// close frame may not be found among bytes that are no frames.
const QUIET_MAX: Duration = Duration::from_millis(300);
/// The most bytes that are read of a client after the gateway has closed.
const DROPPED_BYTES_MAX: usize = 64 << 20;

/// The side that ends a connection, which decides what is still read of it (RFC 6455, sections 5.5.1
/// and 7.1.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CloseInitiator {
    /// The client, whose close frame is answered.
    ByClient,
    /// The gateway, which waits for the client's close frame.
    ByGateway,
    /// The gateway, since the client broke the rules: what it sends is dropped.
    Failed,
}

impl WebSocketConnection {
    /// Sends the client to another node: what it sent is answered, then `reconnect` and 1012.
    pub(super) async fn close_for_drain(&mut self, batch: &DrainBatch) -> u16 {
        let handle = self.handle.clone();
        let outbox = &handle.outbox;
        if let Handler::Chat(session) = &self.handler {
            let settled = async {
                while !session.is_settled() {
                    outbox.woken().await;
                }
            };
            let _ = tokio::time::timeout(CLOSE_MAX, settled).await;
            handle.send(&ServerFrame::Reconnect(ReconnectFrame {
                after_ms: batch.after_ms(),
                reason: ReconnectReason::Draining,
                node: None,
            }));
        }
        outbox.close(Close {
            code: CloseCode::ServiceRestart.number(),
            reason: "draining".to_owned(),
        });
        match outbox.begin_close() {
            Some(close) => self.close(close, CloseInitiator::ByGateway).await,
            None => 1006,
        }
    }

    /// Writes what is queued, the close frame last, waits for the client's, and ends the TCP
    /// connection in order: its own direction, then all of it when the client has ended the other.
    pub(super) async fn close(&mut self, close: Close, ending: CloseInitiator) -> u16 {
        let handle = self.handle.clone();
        let outbox = &handle.outbox;
        let Some(socket) = outbox.socket() else { return 1006 };
        let write = async {
            loop {
                outbox.flush_writable();
                if outbox.bytes() == 0 || socket.writable().await.is_err() {
                    break;
                }
            }
        };
        let written = tokio::time::timeout(CLOSE_MAX, write).await.is_ok();
        if written && ending != CloseInitiator::ByClient {
            // The client hears of the close by reading it, and a proxy that is told of the end before
            // the client's bytes are taken drops both directions, and the close frame with them. So
            // what is under way is read and dropped first, until the client's own close frame.
            let _ = tokio::time::timeout(CLOSE_MAX, self.skip_to_close_frame(socket, ending)).await;
        }
        let _ = socket2::SockRef::from(socket).shutdown(std::net::Shutdown::Write);
        if written {
            // Closing with bytes unread would have the kernel drop what is on its way.
            let _ = tokio::time::timeout(LINGER_MAX, discard_input(socket)).await;
        }
        close.code
    }

    /// Waits for the client's close frame. Bytes before it are dropped, up to [`DROPPED_BYTES_MAX`].
    /// A client that broke the rules may send what is no frame: it is waited for as long as something
    /// comes.
    async fn skip_to_close_frame(&mut self, socket: &TcpStream, ending: CloseInitiator) {
        let unread = std::mem::take(&mut self.unread);
        let (mut closed, mut dropped) = (self.decoder.skip_to_close(&unread), 0);
        drop(unread);
        while !closed && dropped < DROPPED_BYTES_MAX {
            let readable = socket.readable();
            let ready = match ending {
                CloseInitiator::Failed => match tokio::time::timeout(QUIET_MAX, readable).await {
                    Ok(ready) => ready,
                    Err(_) => return,
                },
                _ => readable.await,
            };
            let read = ready.and_then(|()| {
                READ.with_borrow_mut(|buffer| {
                    let count = socket.try_read(buffer)?;
                    closed = count == 0 || self.decoder.skip_to_close(&buffer[..count]);
                    Ok(count)
                })
            });
            match read {
                Ok(count) => dropped += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
            // Others have their turn between two reads.
            tokio::task::yield_now().await;
        }
    }
}

/// Reads and forgets until the other side is done.
async fn discard_input(socket: &TcpStream) {
    loop {
        if socket.readable().await.is_err() {
            return;
        }
        let read = READ.with_borrow_mut(|buffer| socket.try_read(buffer));
        match read {
            Ok(0) => return,
            Ok(_) => tokio::task::yield_now().await,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// The close of a connection whose client broke the rules; reasons are one word.
pub(super) fn close_for(error: CodecError) -> Close {
    let (code, reason) = match error {
        CodecError::Protocol(_) => (CloseCode::ProtocolError, "protocol_error"),
        CodecError::InvalidUtf8 => (CloseCode::InvalidPayload, "bad_utf8"),
        CodecError::InvalidDeflate => (CloseCode::InvalidPayload, "bad_deflate"),
        CodecError::MessageTooBig => (CloseCode::MessageTooBig, "too_large"),
    };
    Close { code: code.number(), reason: reason.to_owned() }
}
