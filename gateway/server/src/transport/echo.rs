//! `/ws/echo`: says back what it hears, to try a connection or a WebSocket implementation by.

use skein_protocol::close::CloseCode;
use skein_websocket::{DecoderEvent, Opcode};

use skein_core::outbox::{Close, Outbox};

/// How `/ws/echo` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EchoMode {
    /// Text comes back behind `Echo: `, and `bye` ends the connection.
    Prefix,
    /// Everything comes back unchanged, for conformance suites.
    Verbatim,
    /// There is no `/ws/echo`.
    Off,
}

/// The state of an echo connection: none but its mode.
#[derive(Clone, Copy, Debug)]
pub struct Echo {
    /// How to answer.
    pub mode: EchoMode,
}

impl Echo {
    /// Answers a text or binary message.
    pub fn handle(&mut self, message: &DecoderEvent<'_>, outbox: &Outbox) {
        match *message {
            DecoderEvent::Text(text) if self.mode == EchoMode::Verbatim => {
                outbox.push(skein_websocket::encode(Opcode::Text, &[text.as_bytes()]));
            }
            DecoderEvent::Text(text) if text.eq_ignore_ascii_case("bye") => {
                let code = CloseCode::Normal.number();
                outbox.close(Close { code, reason: String::new() });
            }
            DecoderEvent::Text(text) => {
                outbox.push(skein_websocket::encode(Opcode::Text, &[b"Echo: ", text.as_bytes()]));
            }
            DecoderEvent::Binary(bytes) => {
                outbox.push(skein_websocket::encode(Opcode::Binary, &[bytes]))
            }
            DecoderEvent::Ping(_)
            | DecoderEvent::Pong(_)
            | DecoderEvent::Close(_)
            | DecoderEvent::Fragment(_) => {}
        }
    }
}
