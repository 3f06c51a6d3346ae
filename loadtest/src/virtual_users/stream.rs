//! The byte stream of one virtual user: TCP, or TLS over TCP.

use std::io::{self, Read, Write};

use mio::net::TcpStream;
use rustls::{ClientConnection, StreamOwned};

use crate::tls::TlsConnector;

/// A non-blocking stream. Every operation may return [`io::ErrorKind::WouldBlock`]; with TLS a
/// write can wait for bytes of the server, and a read can send some.
#[derive(Debug)]
pub(super) enum UserStream {
    /// `ws://`
    Tcp(TcpStream),
    /// `wss://`. Boxed, because it is large.
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl UserStream {
    /// Wraps a connection that may still be connecting.
    pub(super) fn new(tcp: TcpStream, tls: Option<&TlsConnector>) -> io::Result<Self> {
        Ok(match tls {
            None => Self::Tcp(tcp),
            Some(tls) => Self::Tls(Box::new(StreamOwned::new(tls.connect()?, tcp))),
        })
    }

    /// The TCP connection.
    pub(super) fn tcp(&self) -> &TcpStream {
        match self {
            Self::Tcp(tcp) => tcp,
            Self::Tls(tls) => tls.get_ref(),
        }
    }
}

impl Read for UserStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(tcp) => tcp.read(buffer),
            Self::Tls(tls) => tls.read(buffer),
        }
    }
}

impl Write for UserStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(tcp) => tcp.write(bytes),
            Self::Tls(tls) => tls.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(tcp) => tcp.flush(),
            Self::Tls(tls) => tls.flush(),
        }
    }
}
