//! How a connection ends: by its client, by the gateway, or because the client broke the rules.

use std::{io, time::Duration};

use shared::{
    close::CloseCode,
    codec::{CodecError, Received},
    protocol::answer::{Answer, Reconnect, ReconnectReason},
};
use tokio::net::TcpStream;

use super::{Connection, Handler, READ};
use crate::{drain::departure::Batch, outbox::Close};

/// How long each step of the closing handshake may take: what is queued goes out, and the client
/// answers the close frame.
const CLOSE_MAX: Duration = Duration::from_secs(5);
/// How long a client is given to end the TCP connection once both close frames are out.
const LINGER_MAX: Duration = Duration::from_secs(1);

/// Who ends a connection, which decides what is still read of it (RFC 6455, sections 5.5.1 and
/// 7.1.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The client, whose close frame is answered.
    ByClient,
    /// The gateway, which waits for the client's close frame.
    ByGateway,
    /// The client broke the rules: nothing of it is read any more.
    Failed,
}

impl Connection {
    /// Sends the client to another node: what it sent is answered, then `reconnect` and 1012.
    pub(super) async fn goodbye(&mut self, batch: &Batch) -> u16 {
        let subscriber = self.subscriber.clone();
        let outbox = &subscriber.outbox;
        if let Handler::Chat(session) = &self.handler {
            let settled = async {
                while !session.is_settled() {
                    outbox.woken().await;
                }
            };
            let _ = tokio::time::timeout(CLOSE_MAX, settled).await;
            subscriber.answer(&Answer::Reconnect(Reconnect {
                after_ms: batch.after_ms(),
                reason: ReconnectReason::Draining,
                node: None,
            }));
        }
        outbox.close(Close { code: CloseCode::Restart.number(), reason: "draining".to_owned() });
        match outbox.begin_close() {
            Some(close) => self.close(close, Ending::ByGateway).await,
            None => 1006,
        }
    }

    /// Writes what is queued, the close frame last, waits for the client's, and ends the TCP
    /// connection in order: its own direction, then all of it when the client has ended the other.
    pub(super) async fn close(&mut self, close: Close, ending: Ending) -> u16 {
        let subscriber = self.subscriber.clone();
        let outbox = &subscriber.outbox;
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
        if written && ending == Ending::ByGateway {
            let _ = tokio::time::timeout(CLOSE_MAX, self.until_closed(socket)).await;
        }
        let _ = socket2::SockRef::from(socket).shutdown(std::net::Shutdown::Write);
        if written {
            // Closing with bytes unread would have the kernel drop what is on its way.
            let max = if ending == Ending::Failed { CLOSE_MAX } else { LINGER_MAX };
            let _ = tokio::time::timeout(max, drain(socket)).await;
        }
        close.code
    }

    /// Waits for the client's close frame. What comes before it is dropped.
    async fn until_closed(&mut self, socket: &TcpStream) {
        while !self.skip_to_close() {
            if socket.readable().await.and_then(|()| self.read(socket)).is_err() {
                return;
            }
            // A little that is received may be much inflated.
            tokio::task::yield_now().await;
        }
    }

    /// Whether what was received ends in a close frame, or in what is no frame at all.
    fn skip_to_close(&mut self) -> bool {
        let mut input = std::mem::take(&mut self.unread);
        let mut used = 0;
        while used < input.len() {
            match self.decoder.next(&mut input[used..]) {
                Ok((_, Some(Received::Close(_)))) | Err(_) => return true,
                Ok((count, _)) => used += count,
            }
        }
        self.decoder.release();
        false
    }
}

/// Reads and forgets until the other side is done.
async fn drain(socket: &TcpStream) {
    loop {
        if socket.readable().await.is_err() {
            return;
        }
        let read = READ.with_borrow_mut(|buffer| socket.try_read(buffer));
        match read {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// The close of a connection whose client broke the rules; reasons are one word.
pub(super) fn close_for(error: CodecError) -> Close {
    let (code, reason) = match error {
        CodecError::Protocol(_) => (CloseCode::Protocol, "protocol_error"),
        CodecError::BadUtf8 => (CloseCode::BadUtf8, "bad_utf8"),
        CodecError::BadDeflate => (CloseCode::BadUtf8, "bad_deflate"),
        CodecError::TooBig => (CloseCode::TooBig, "too_large"),
    };
    Close { code: code.number(), reason: reason.to_owned() }
}
