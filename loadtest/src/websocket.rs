//! The client half of a WebSocket, reduced to the minimum: the handshake, a reader of server frames
//! that holds no memory between messages, and the few frames that a client sends.
//!
//! Pure. `skein_client` is made for correctness with one connection; this module is made for a
//! hundred thousand connections in one process, or half a million frames a second.

use std::borrow::Cow;

/// Size limit of the handshake response's head.
const HEAD_BYTES_MAX: usize = 8 * 1024;
/// Size limit of a message whose payload is kept; the protocol allows the server less.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// The key of the example in RFC 6455, and the response to it. A fixed key saves a SHA-1; the key
/// is no secret, it only prevents answers from caches.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
/// A fixed mask. Masks prevent scripts in browsers from choosing the bytes on the wire, which is no
/// risk here.
const MASK: [u8; 4] = [0x37, 0xFA, 0x21, 0x3D];

/// Protocol errors of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WebSocketError {
    /// The handshake response is not HTTP.
    #[error("the handshake response is not HTTP")]
    NotHttp,
    /// The response has status 101, but does not match our key.
    #[error("the handshake response has a wrong Sec-WebSocket-Accept")]
    WrongKey,
    /// A frame violates RFC 6455.
    #[error("a frame violates RFC 6455")]
    BadFrame,
    /// A message exceeds the size limit of the protocol.
    #[error("a message exceeds the size limit")]
    TooLarge,
}

/// Bytes of the handshake request.
pub(crate) fn handshake_request(host: &str, path: &str) -> Vec<u8> {
    handshake_request_with(host, path, "")
}

/// As [`handshake_request`], with further header lines, each with its line end.
pub(crate) fn handshake_request_with(host: &str, path: &str, lines: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\
         Sec-WebSocket-Protocol: {}\r\n{lines}\r\n",
        skein_protocol::SUBPROTOCOL
    )
    .into_bytes()
}

/// The server's response to a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandshakeResponse {
    /// Status 101. Frames begin at offset `end`.
    Upgraded { end: usize },
    /// Another HTTP status.
    Rejected { status: u16 },
}

/// Parses the handshake response; `None` while it is incomplete.
pub(crate) fn parse_response(bytes: &[u8]) -> Result<Option<HandshakeResponse>, WebSocketError> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return if bytes.len() < HEAD_BYTES_MAX { Ok(None) } else { Err(WebSocketError::NotHttp) };
    };
    let text = std::str::from_utf8(&bytes[..end]).map_err(|_| WebSocketError::NotHttp)?;
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 "));
    let status = status.and_then(|rest| rest.get(..3)?.parse::<u16>().ok());
    let status = status.ok_or(WebSocketError::NotHttp)?;
    if status != 101 {
        return Ok(Some(HandshakeResponse::Rejected { status }));
    }
    let accept = lines.filter_map(|line| line.split_once(':')).find_map(|(name, value)| {
        name.eq_ignore_ascii_case("sec-websocket-accept").then(|| value.trim())
    });
    if accept == Some(ACCEPT) {
        Ok(Some(HandshakeResponse::Upgraded { end: end + 4 }))
    } else {
        Err(WebSocketError::WrongKey)
    }
}

/// A text frame of a client.
pub(crate) fn text(payload: &str) -> Vec<u8> {
    frame(0x1, payload.as_bytes())
}

/// A ping frame.
pub(crate) fn ping(payload: &[u8]) -> Vec<u8> {
    frame(0x9, payload)
}

/// A pong frame with the payload of the ping.
pub(crate) fn pong(payload: &[u8]) -> Vec<u8> {
    frame(0xA, payload)
}

/// A close frame.
pub(crate) fn close(code: u16) -> Vec<u8> {
    frame(0x8, &code.to_be_bytes())
}

fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80 | opcode];
    match payload.len() {
        short @ 0..=125 => frame.push(0x80 | short as u8),
        medium @ 126..=0xFFFF => {
            frame.push(0x80 | 126);
            frame.extend_from_slice(&(medium as u16).to_be_bytes());
        }
        long => {
            frame.push(0x80 | 127);
            frame.extend_from_slice(&(long as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(&MASK);
    frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

/// A message or control frame of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum WsFrame<'a> {
    /// A data message; `None` if payloads are not kept. A message that is contained in one push is
    /// not copied.
    Message(Option<Cow<'a, [u8]>>),
    /// A ping.
    Ping(Vec<u8>),
    /// A pong.
    Pong(Vec<u8>),
    /// A close frame: its code and reason.
    Close(Option<u16>, String),
}

#[cfg(test)]
impl WsFrame<'_> {
    /// The same frame with an owned payload.
    pub(crate) fn into_owned(self) -> WsFrame<'static> {
        match self {
            Self::Message(message) => {
                WsFrame::Message(message.map(|message| Cow::Owned(message.into_owned())))
            }
            Self::Ping(payload) => WsFrame::Ping(payload),
            Self::Pong(payload) => WsFrame::Pong(payload),
            Self::Close(code, reason) => WsFrame::Close(code, reason),
        }
    }
}

/// Reads server frames from a byte stream. It holds no memory between messages.
#[derive(Debug, Default)]
pub(crate) struct FrameReader {
    /// Whether the payload of messages is returned.
    pub(crate) keeps_payload: bool,
    /// The beginning of an incomplete frame.
    rest: Vec<u8>,
    /// The incomplete message.
    message: Vec<u8>,
    /// Bytes still to skip of a payload that is not kept, and whether they end a message.
    skip: u64,
    skip_ends_message: bool,
}

impl FrameReader {
    /// A reader that returns the payload of messages.
    pub(crate) fn with_payload() -> Self {
        Self { keeps_payload: true, ..Self::default() }
    }

    /// Reads `bytes` and passes each complete message and control frame to `on`.
    pub(crate) fn push(
        &mut self,
        bytes: &[u8],
        mut on: impl FnMut(WsFrame<'_>),
    ) -> Result<(), WebSocketError> {
        let gathered;
        let mut input = if self.rest.is_empty() {
            bytes
        } else {
            self.rest.extend_from_slice(bytes);
            gathered = std::mem::take(&mut self.rest);
            &gathered
        };
        while !input.is_empty() {
            if self.skip > 0 {
                input = self.skip_over(input, &mut on);
                continue;
            }
            let Some(header) = FrameHeader::read(input)? else { break };
            let payload = &input[header.bytes..];
            if header.opcode < 0x8 && !self.keeps_payload {
                self.skip = header.length;
                self.skip_ends_message = header.fin;
                if header.length == 0 && header.fin {
                    on(WsFrame::Message(None));
                }
                input = payload;
                continue;
            }
            if header.length > (MESSAGE_BYTES_MAX - self.message.len()) as u64 {
                return Err(WebSocketError::TooLarge);
            }
            let length = header.length as usize;
            let Some((payload, remaining)) = payload.split_at_checked(length) else { break };
            self.take(&header, payload, &mut on)?;
            input = remaining;
        }
        self.rest = input.to_vec();
        Ok(())
    }

    fn skip_over<'a>(&mut self, input: &'a [u8], on: &mut impl FnMut(WsFrame<'_>)) -> &'a [u8] {
        let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(input.len());
        self.skip -= skipped as u64;
        if self.skip == 0 && self.skip_ends_message {
            on(WsFrame::Message(None));
        }
        &input[skipped..]
    }

    fn take(
        &mut self,
        header: &FrameHeader,
        payload: &[u8],
        on: &mut impl FnMut(WsFrame<'_>),
    ) -> Result<(), WebSocketError> {
        match header.opcode {
            0x0..=0x2 if header.fin && self.message.is_empty() => {
                on(WsFrame::Message(Some(Cow::Borrowed(payload))));
            }
            0x0..=0x2 => {
                self.message.extend_from_slice(payload);
                if header.fin {
                    on(WsFrame::Message(Some(Cow::Owned(std::mem::take(&mut self.message)))));
                }
            }
            0x8 => {
                let code = payload.split_first_chunk::<2>();
                let reason = code.map(|(_, reason)| String::from_utf8_lossy(reason).into_owned());
                let code = code.map(|(code, _)| u16::from_be_bytes(*code));
                on(WsFrame::Close(code, reason.unwrap_or_default()));
            }
            0x9 => on(WsFrame::Ping(payload.to_vec())),
            0xA => on(WsFrame::Pong(payload.to_vec())),
            _ => return Err(WebSocketError::BadFrame),
        }
        Ok(())
    }
}

struct FrameHeader {
    fin: bool,
    opcode: u8,
    /// Size of the header.
    bytes: usize,
    /// Size of the payload.
    length: u64,
}

impl FrameHeader {
    fn read(input: &[u8]) -> Result<Option<Self>, WebSocketError> {
        let &[first, second, ref rest @ ..] = input else { return Ok(None) };
        // No extension was offered, and servers do not mask.
        if first & 0x70 != 0 || second & 0x80 != 0 {
            return Err(WebSocketError::BadFrame);
        }
        let (bytes, length) = match second {
            126 => match rest.first_chunk::<2>() {
                Some(length) => (4, u64::from(u16::from_be_bytes(*length))),
                None => return Ok(None),
            },
            127 => match rest.first_chunk::<8>() {
                Some(length) => (10, u64::from_be_bytes(*length)),
                None => return Ok(None),
            },
            short => (2, u64::from(short)),
        };
        let (fin, opcode) = (first & 0x80 != 0, first & 0x0F);
        if opcode >= 0x8 && (length > 125 || !fin) {
            return Err(WebSocketError::BadFrame);
        }
        Ok(Some(Self { fin, opcode, bytes, length }))
    }
}

#[cfg(test)]
mod tests {
    use skein_websocket::{Decoder, DecoderEvent as Decoded, Opcode, encode, encode_close};

    use super::*;

    const GOOD: &str = "HTTP/1.1 101 x\r\nUpgrade: websocket\r\nsec-websocket-ACCEPT:  s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

    #[test]
    fn accept_is_derived_from_the_fixed_key() {
        use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
        assert_eq!(derive_accept_key(KEY.as_bytes()), ACCEPT);
        assert!(String::from_utf8(handshake_request("h", "/")).unwrap().contains(KEY));
        assert_eq!(
            parse_response(GOOD.as_bytes()),
            Ok(Some(HandshakeResponse::Upgraded { end: GOOD.len() }))
        );
    }

    #[test]
    fn incomplete_response_is_awaited() {
        for cut in 0..GOOD.len() {
            assert_eq!(parse_response(&GOOD.as_bytes()[..cut]), Ok(None));
        }
    }

    #[test]
    fn rejections_and_invalid_responses_are_distinguished() {
        let rejected = b"HTTP/1.1 429 Too Many\r\nRetry-After: 1\r\n\r\nbody";
        assert_eq!(parse_response(rejected), Ok(Some(HandshakeResponse::Rejected { status: 429 })));
        let wrong = GOOD.replace("s3pP", "xxxx");
        assert_eq!(parse_response(wrong.as_bytes()), Err(WebSocketError::WrongKey));
        assert_eq!(parse_response(b"SSH-2.0\r\n\r\n"), Err(WebSocketError::NotHttp));
        assert_eq!(parse_response(&[b'x'; HEAD_BYTES_MAX]), Err(WebSocketError::NotHttp));
    }

    #[test]
    fn gateway_decoder_reads_client_frames() {
        let mut decoder = Decoder::new(1 << 20);
        for length in [0, 5, 125, 126, 70_000] {
            let payload = "x".repeat(length);
            let mut bytes = text(&payload);
            let (_, received) = decoder.next(&mut bytes).unwrap();
            assert_eq!(received, Some(Decoded::Text(&payload)));
        }
        assert_eq!(decoder.next(&mut pong(b"p")).unwrap().1, Some(Decoded::Pong(b"p")));
        let closed = Some(Decoded::Close(Some((1000, ""))));
        assert_eq!(decoder.next(&mut close(1000)).unwrap().1, closed);
    }

    /// A stream that a server may send, and the frames that it contains.
    fn stream() -> (Vec<u8>, Vec<WsFrame<'static>>) {
        let long = vec![b'y'; 70_000];
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&encode(Opcode::Text, &[b"hello"]));
        bytes.extend_from_slice(&encode(Opcode::Ping, &[b"p"]));
        bytes.extend_from_slice(&encode(Opcode::Binary, &[&long]));
        bytes.extend_from_slice(&encode(Opcode::Pong, &[]));
        bytes.extend_from_slice(&[0x01, 2, b'a', b'b', 0x80, 1, b'c']);
        bytes.extend_from_slice(&encode(Opcode::Text, &[]));
        bytes.extend_from_slice(&encode_close(1012, "draining"));
        let message = |bytes: &[u8]| WsFrame::Message(Some(bytes.to_vec().into()));
        let received = vec![
            message(b"hello"),
            WsFrame::Ping(b"p".to_vec()),
            message(&long),
            WsFrame::Pong(Vec::new()),
            message(b"abc"),
            message(b""),
            WsFrame::Close(Some(1012), "draining".to_owned()),
        ];
        (bytes, received)
    }

    #[test]
    fn frames_are_read_in_chunks_of_any_size() {
        let (bytes, expected) = stream();
        for step in [1, 2, 3, 7, 1000, 200_000] {
            let mut reader = FrameReader { keeps_payload: true, ..FrameReader::default() };
            let mut received = Vec::new();
            for piece in bytes.chunks(step) {
                reader.push(piece, |one| received.push(one.into_owned())).unwrap();
            }
            assert_eq!(received, expected, "in steps of {step}");
            assert_eq!(reader.rest.capacity() + reader.message.capacity(), 0);
        }
    }

    #[test]
    fn skipped_messages_are_counted_and_not_kept() {
        let (bytes, expected) = stream();
        let expected: Vec<WsFrame<'_>> = expected
            .into_iter()
            .map(|one| match one {
                WsFrame::Message(_) => WsFrame::Message(None),
                other => other,
            })
            .collect();
        for step in [1, 5, 4096] {
            let (mut reader, mut received) = (FrameReader::default(), Vec::new());
            for piece in bytes.chunks(step) {
                reader.push(piece, |one| received.push(one.into_owned())).unwrap();
                assert!(reader.rest.len() < 140);
            }
            assert_eq!(received, expected, "in steps of {step}");
        }
    }

    #[test]
    fn invalid_and_oversized_frames_are_errors() {
        let check = |bytes: &[u8], expected| {
            let mut reader = FrameReader { keeps_payload: true, ..FrameReader::default() };
            assert_eq!(reader.push(bytes, |_| ()), Err(expected), "{bytes:?}");
        };
        check(&[0xC1, 0], WebSocketError::BadFrame);
        check(&[0x81, 0x80, 0, 0, 0, 0], WebSocketError::BadFrame);
        check(&[0x09, 0], WebSocketError::BadFrame);
        check(&[0x89, 126, 0, 126], WebSocketError::BadFrame);
        check(&[0x83, 0], WebSocketError::BadFrame);
        check(&[0x82, 127, 0, 0, 0, 0, 1, 0, 0, 0], WebSocketError::TooLarge);
    }
}
