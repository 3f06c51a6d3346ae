//! Payloads of frames: unmasking, and parsing by opcode.

use super::{CodecError, DecoderEvent, Opcode};

/// Parses a complete payload by its opcode.
pub(super) fn decode_payload(
    opcode: Opcode,
    payload: &[u8],
) -> Result<DecoderEvent<'_>, CodecError> {
    Ok(match opcode {
        Opcode::Text => {
            DecoderEvent::Text(std::str::from_utf8(payload).map_err(|_| CodecError::InvalidUtf8)?)
        }
        Opcode::Binary | Opcode::Continuation => DecoderEvent::Binary(payload),
        Opcode::Ping => DecoderEvent::Ping(payload),
        Opcode::Pong => DecoderEvent::Pong(payload),
        Opcode::Close => DecoderEvent::Close(parse_close(payload)?),
    })
}

/// Parses the code and reason of a close frame (RFC 6455, sections 5.5.1 and 7.4).
fn parse_close(payload: &[u8]) -> Result<Option<(u16, &str)>, CodecError> {
    let (code, reason) = match payload {
        [] => return Ok(None),
        [_] => return Err(CodecError::Protocol("close frame with half a code")),
        [high, low, reason @ ..] => (u16::from_be_bytes([*high, *low]), reason),
    };
    // 1012 to 1014 were registered with IANA later; 1004 to 1006 and 1015 must not be sent.
    if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
        return Err(CodecError::Protocol("close code that must not be sent"));
    }
    let reason = std::str::from_utf8(reason).map_err(|_| CodecError::InvalidUtf8)?;
    Ok(Some((code, reason)))
}

/// Masks or unmasks `payload` (RFC 6455, section 5.3), eight bytes at a time.
pub(super) fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    let [a, b, c, d] = mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (words, rest) = payload.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip([a, b, c, d, a, b, c]) {
        *byte ^= mask;
    }
}
