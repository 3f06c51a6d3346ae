//! Closing handshake of a connection, started by the client, by the gateway, or after a protocol
//! error.

use std::{io, time::Duration};

use skein_protocol::{
    close::CloseCode,
    protocol::server_frame::{ReconnectFrame, ReconnectReason, ServerFrame},
};
use skein_websocket::CodecError;
use tokio::net::TcpStream;

use super::{Handler, READ, WebSocketConnection};
use skein_core::{
    connection::outbox::Close, drain::schedule::MoveAdvice, telemetry::metrics::CloseSide,
};

/// Timeout of each step of the closing handshake: writing the queued frames, and waiting for the
/// close frame of the client.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for the client to end the TCP connection after both close frames.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
/// Time without input after which the connection of a client with a protocol error is ended: its
/// close frame may be lost among bytes that are no frames.
const QUIET_TIMEOUT: Duration = Duration::from_millis(300);
/// Bytes that are read and dropped after the gateway has closed.
const DROPPED_BYTES_MAX: usize = 64 << 20;

/// Side that ends a connection. It decides which input is still read (RFC 6455, sections 5.5.1 and
/// 7.1.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CloseInitiator {
    /// The client: its close frame is answered.
    ByClient,
    /// The gateway: it waits for the close frame of the client.
    ByGateway,
    /// The gateway, after a protocol error of the client: further input is dropped.
    Failed,
}

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionEnd {
    /// The close code, 1006 without one.
    pub code: u16,
    /// The reason of the close frame: one word, or empty.
    pub reason: String,
    /// The side that ended it.
    pub side: CloseSide,
}

impl ConnectionEnd {
    /// The connection was lost without a close.
    pub(super) fn lost() -> Self {
        Self { code: 1006, reason: String::new(), side: CloseSide::Network }
    }

    /// The gateway closed the connection.
    pub fn by_gateway(Close { code, reason }: Close) -> Self {
        Self { code, reason, side: CloseSide::Gateway }
    }
}

impl WebSocketConnection {
    /// Moves the client to another node: answers its pending frames, then sends `reconnect` and
    /// 1012. Returns how the connection ended.
    pub(super) async fn close_to_move(
        &mut self,
        advice: MoveAdvice,
        reason: ReconnectReason,
    ) -> ConnectionEnd {
        let handle = self.handle.clone();
        let outbox = &handle.outbox;
        if let Handler::Chat(session) = &self.handler {
            let settled = async {
                while !session.is_settled() {
                    outbox.woken().await;
                }
            };
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, settled).await;
            let MoveAdvice { after_ms, node } = advice;
            handle.send(&ServerFrame::Reconnect(ReconnectFrame { after_ms, reason, node }));
        }
        let reason = match reason {
            ReconnectReason::Draining => "draining",
            ReconnectReason::Rebalance => "rebalance",
        };
        let code = CloseCode::ServiceRestart.number();
        outbox.close(Close { code, reason: reason.to_owned() });
        match outbox.begin_close() {
            Some(close) => self.close(close, CloseInitiator::ByGateway).await,
            None => ConnectionEnd::lost(),
        }
    }

    /// Writes the queued frames with the close frame last, waits for the close frame of the client,
    /// and ends the TCP connection: first the own direction, then all of it when the client has
    /// ended the other. Returns how the connection ended.
    pub(super) async fn close(&mut self, close: Close, ending: CloseInitiator) -> ConnectionEnd {
        let handle = self.handle.clone();
        let outbox = &handle.outbox;
        let Some(socket) = outbox.socket() else { return ConnectionEnd::lost() };
        let write = async {
            loop {
                outbox.flush_writable();
                if outbox.bytes() == 0 || socket.writable().await.is_err() {
                    break;
                }
            }
        };
        let written = tokio::time::timeout(CLOSE_TIMEOUT, write).await.is_ok();
        if written && ending != CloseInitiator::ByClient {
            // The client learns of the close only by reading the close frame. A proxy that sees the
            // end of the connection before the bytes of the client are read drops both directions,
            // and the close frame with them. So the input is read and dropped first, up to the
            // client's own close frame.
            let _ =
                tokio::time::timeout(CLOSE_TIMEOUT, self.skip_to_close_frame(socket, ending)).await;
        }
        let _ = socket2::SockRef::from(socket).shutdown(std::net::Shutdown::Write);
        if written {
            // Closing with unread bytes would make the kernel drop the output in flight.
            let _ = tokio::time::timeout(LINGER_TIMEOUT, discard_input(socket)).await;
        }
        match ending {
            CloseInitiator::ByClient => {
                ConnectionEnd { side: CloseSide::Client, ..ConnectionEnd::by_gateway(close) }
            }
            CloseInitiator::ByGateway | CloseInitiator::Failed => ConnectionEnd::by_gateway(close),
        }
    }

    /// Waits for the close frame of the client, and drops up to [`DROPPED_BYTES_MAX`] before it.
    ///
    /// After a protocol error the input may be no frames: then it waits as long as input arrives.
    async fn skip_to_close_frame(&mut self, socket: &TcpStream, ending: CloseInitiator) {
        let unread = std::mem::take(&mut self.unread);
        let (mut closed, mut dropped) = (self.decoder.skip_to_close(&unread), 0);
        drop(unread);
        while !closed && dropped < DROPPED_BYTES_MAX {
            let readable = socket.readable();
            let ready = match ending {
                CloseInitiator::Failed => match tokio::time::timeout(QUIET_TIMEOUT, readable).await
                {
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
            // Other tasks run between two reads.
            tokio::task::yield_now().await;
        }
    }
}

/// Reads and drops input until the peer ends its direction.
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

/// Returns the close for a protocol error; reasons are one word.
pub(super) fn close_for(error: CodecError) -> Close {
    let (code, reason) = match error {
        CodecError::Protocol(_) => (CloseCode::ProtocolError, "protocol_error"),
        CodecError::InvalidUtf8 => (CloseCode::InvalidPayload, "bad_utf8"),
        CodecError::InvalidDeflate => (CloseCode::InvalidPayload, "bad_deflate"),
        CodecError::MessageTooBig => (CloseCode::MessageTooBig, "too_large"),
    };
    Close { code: code.number(), reason: reason.to_owned() }
}
