//! `/ws/echo`: returns what it receives, for testing a connection or a WebSocket implementation.

use skein_protocol::close::CloseCode;
use skein_websocket::{DecoderEvent, Opcode};

use skein_core::connection::outbox::{Close, Outbox};

/// Reply of `/ws/echo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EchoMode {
    /// Text comes back after `Echo: `, and `bye` closes the connection.
    Prefix,
    /// Everything comes back unchanged, for conformance suites.
    Verbatim,
    /// There is no `/ws/echo`.
    Off,
}

/// State of an echo connection.
#[derive(Clone, Copy, Debug)]
pub struct Echo {
    /// Kind of reply.
    pub mode: EchoMode,
}

impl Echo {
    /// Replies to a text or binary message.
    pub fn handle(&mut self, message: &DecoderEvent<'_>, outbox: &Outbox) {
        match *message {
            DecoderEvent::Text(text) if self.mode == EchoMode::Verbatim => {
                outbox.push_message(skein_websocket::encode(Opcode::Text, &[text.as_bytes()]));
            }
            DecoderEvent::Text(text) if text.eq_ignore_ascii_case("bye") => {
                let code = CloseCode::Normal.number();
                outbox.close(Close { code, reason: String::new() });
            }
            DecoderEvent::Text(text) => {
                outbox.push_message(skein_websocket::encode(
                    Opcode::Text,
                    &[b"Echo: ", text.as_bytes()],
                ));
            }
            DecoderEvent::Binary(bytes) => {
                outbox.push_message(skein_websocket::encode(Opcode::Binary, &[bytes]));
            }
            DecoderEvent::Ping(_)
            | DecoderEvent::Pong(_)
            | DecoderEvent::Close(_)
            | DecoderEvent::Fragment(_) => {}
        }
    }
}
