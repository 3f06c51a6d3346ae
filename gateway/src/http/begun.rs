//! A connection of which the first bytes were read already.
//!
//! hyper takes 16 KiB for its buffers as soon as it has a connection. Whoever connects and says
//! nothing, or little and slowly, is not worth that: the first request's header is collected here,
//! in as many bytes as came, and hyper gets the connection when it is whole.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf as _, Bytes};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// How much one read takes.
const PIECE_BYTES: usize = 4096;

/// A connection, and what of it was read and not used.
#[derive(Debug)]
pub(super) struct Begun {
    head: Bytes,
    socket: TokioIo<TcpStream>,
}

impl Begun {
    /// Reads until the header of a request is there, or more than `bytes_max`, or what is no HTTP.
    /// What is wrong with it is for an HTTP parser to say.
    pub(super) async fn read(socket: TcpStream, bytes_max: usize) -> io::Result<Self> {
        let mut head = Vec::new();
        loop {
            socket.readable().await?;
            if read_piece(&socket, &mut head)? && (is_whole(&head) || head.len() > bytes_max) {
                return Ok(Self { head: head.into(), socket: TokioIo::new(socket) });
            }
        }
    }

    /// The socket, and what was read of it and not used.
    pub(super) fn into_parts(self) -> (TcpStream, Bytes) {
        (self.socket.into_inner(), self.head)
    }
}

/// Returns whether there was something to read.
fn read_piece(socket: &TcpStream, head: &mut Vec<u8>) -> io::Result<bool> {
    let mut piece = [0; PIECE_BYTES];
    match socket.try_read(&mut piece) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => {
            let piece = &piece[..count];
            // Empty lines before a request mean nothing (RFC 9112, section 2.2).
            let is_new_line = |byte: &u8| matches!(byte, b'\r' | b'\n');
            let skip = if head.is_empty() {
                piece.iter().take_while(|b| is_new_line(b)).count()
            } else {
                0
            };
            head.extend_from_slice(&piece[skip..]);
            Ok(!head.is_empty())
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a header is there up to its empty line, or what cannot be one. As an HTTP parser has it,
/// a line may end in LF alone.
fn is_whole(head: &[u8]) -> bool {
    let is_http = head.first().is_some_and(u8::is_ascii_alphabetic);
    // An empty line ends in what came last, or stands further in front where more followed.
    !is_http
        || head.windows(2).any(|two| two == b"\n\n")
        || head.windows(3).any(|three| three == b"\n\r\n")
}

impl Read for Begun {
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

impl Write for Begun {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
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
        Pin::new(&mut self.socket).poll_write_vectored(context, slices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_whole_with_its_empty_line_or_when_it_is_none() {
        for whole in ["GET / HTTP/1.1\r\n\r\n", "GET /\n\n", "GET /\n\r\nrest", "\u{16}\u{3}", "{"]
        {
            assert!(is_whole(whole.as_bytes()), "{whole:?}");
        }
        for begun in ["G", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nA: b\r\n\r", "GET /\r\r"] {
            assert!(!is_whole(begun.as_bytes()), "{begun:?}");
        }
    }
}
