//! A TCP connection that buffers the header of its first request, and times out writes.
//!
//! hyper allocates 16 KiB of buffers per connection. A client that connects and sends nothing, or
//! little and slowly, must not cost that much: the header of the first request is collected here,
//! in as many bytes as arrived, and hyper gets the connection once the header is complete. hyper
//! also has no timeout for a client that sends requests and does not read the responses.

use std::{
    future::Future as _,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::Sleep};

/// Bytes of one read.
const CHUNK_BYTES: usize = 4096;

/// Default of the write timeout; a response can replace it.
const WRITE_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// Write timeout of a connection, shared with the handlers of its requests.
#[derive(Clone, Debug)]
pub(super) struct WriteTimeout(Arc<WriteTimeoutState>);

#[derive(Debug)]
struct WriteTimeoutState {
    max_ms: AtomicU64,
    has_expired: AtomicBool,
}

impl WriteTimeout {
    fn new() -> Self {
        let max_ms = AtomicU64::new(WRITE_TIMEOUT_DEFAULT.as_millis() as u64);
        Self(Arc::new(WriteTimeoutState { max_ms, has_expired: AtomicBool::new(false) }))
    }

    /// Replaces the timeout, from the next blocked write on.
    pub(super) fn set(&self, max: Duration) {
        let max_ms = u64::try_from(max.as_millis()).unwrap_or(u64::MAX);
        self.0.max_ms.store(max_ms, Ordering::Relaxed);
    }

    fn get(&self) -> Duration {
        Duration::from_millis(self.0.max_ms.load(Ordering::Relaxed))
    }

    /// Whether the connection ended because of this timeout.
    pub(super) fn has_expired(&self) -> bool {
        self.0.has_expired.load(Ordering::Acquire)
    }
}

/// A TCP connection with the bytes that were read and not yet used.
#[derive(Debug)]
pub(super) struct BufferedHead {
    head: Bytes,
    socket: TokioIo<TcpStream>,
    /// Set while a write is blocked: the end of the write timeout.
    deadline: Option<Pin<Box<Sleep>>>,
    limit: WriteTimeout,
}

impl BufferedHead {
    /// Reads until the header of a request is complete, or longer than `bytes_max`, or not HTTP.
    /// The HTTP parser reports errors in it.
    ///
    /// # Errors
    ///
    /// The errors of the socket, and `UnexpectedEof`.
    pub(super) async fn read(socket: TcpStream, bytes_max: usize) -> io::Result<Self> {
        let mut head = Vec::new();
        loop {
            socket.readable().await?;
            let seen = head.len();
            read_chunk(&socket, &mut head)?;
            if head.len() > seen && (is_complete(&head, seen) || head.len() > bytes_max) {
                let socket = TokioIo::new(socket);
                let limit = WriteTimeout::new();
                return Ok(Self { head: head.into(), socket, deadline: None, limit });
            }
        }
    }

    /// Passes on the result of a write, or `TimedOut` if writes are blocked for too long.
    fn check_write(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.deadline = None;
            return written;
        }
        let new = || Box::pin(tokio::time::sleep(self.limit.get()));
        let until = self.deadline.get_or_insert_with(new);
        until.as_mut().poll(context).map(|()| {
            self.limit.0.has_expired.store(true, Ordering::Release);
            Err(io::ErrorKind::TimedOut.into())
        })
    }

    /// Returns the shared write timeout.
    pub(super) fn write_timeout(&self) -> WriteTimeout {
        self.limit.clone()
    }

    /// Returns the socket and the unused bytes.
    pub(super) fn into_parts(self) -> (TcpStream, Bytes) {
        (self.socket.into_inner(), self.head)
    }
}

/// Appends the available bytes to `head`.
fn read_chunk(socket: &TcpStream, head: &mut Vec<u8>) -> io::Result<()> {
    let mut chunk = [0; CHUNK_BYTES];
    match socket.try_read(&mut chunk) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => {
            // Empty lines before a request are ignored (RFC 9112, section 2.2).
            let is_new_line = |byte: &&u8| matches!(byte, b'\r' | b'\n');
            let lines = if head.is_empty() {
                chunk[..count].iter().take_while(is_new_line).count()
            } else {
                0
            };
            head.extend_from_slice(&chunk[lines..count]);
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether `head` has a complete header with its empty line, or is no HTTP. The first `seen` bytes
/// were checked before. As in HTTP parsers, a line may end in LF alone.
fn is_complete(head: &[u8], seen: usize) -> bool {
    let is_http = head.first().is_some_and(u8::is_ascii_alphabetic);
    let new = &head[seen.saturating_sub(2)..];
    !is_http
        || new.windows(2).any(|end| end == b"\n\n")
        || new.windows(3).any(|end| end == b"\n\r\n")
}

impl Read for BufferedHead {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if self.head.is_empty() {
            return Pin::new(&mut self.socket).poll_read(context, buffer);
        }
        let count = self.head.len().min(buffer.remaining());
        buffer.put_slice(&self.head[..count]);
        self.head.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl Write for BufferedHead {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(context, bytes);
        self.check_write(context, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(context, slices);
        self.check_write(context, written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_whole_with_its_empty_line_or_when_it_is_none() {
        for whole in ["GET / HTTP/1.1\r\n\r\n", "GET /\n\n", "GET /\n\r\nrest", "\u{16}\u{3}", "{"]
        {
            assert!(is_complete(whole.as_bytes(), 0), "{whole:?}");
        }
        for partial in ["G", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nA: b\r\n\r", "GET /\r\r"] {
            assert!(!is_complete(partial.as_bytes(), 0), "{partial:?}");
        }
    }

    #[test]
    fn it_is_found_wherever_it_was_cut() {
        for whole in ["GET / HTTP/1.1\r\nA: b\r\n\r\n", "GET /\n\n", "GET /\n\r\n"] {
            for seen in 0..whole.len() {
                assert!(is_complete(whole.as_bytes(), seen), "{whole:?} after {seen}");
            }
        }
    }
}
