//! Negotiation of permessage-deflate in `Sec-WebSocket-Extensions` (RFC 6455, section 9.1; RFC
//! 7692, sections 5 and 7).
//!
//! A header that violates the grammar fails the handshake. An offer that a server must not accept
//! (a parameter that is unknown, repeated, or has an invalid value) is declined, and the next offer
//! is considered: clients list their offers by preference.

use std::fmt;

/// The name of the only supported extension.
const DEFLATE: &str = "permessage-deflate";

/// Size of the LZ77 window, as the base-2 logarithm of bytes: 8 to 15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowBits(u8);

impl WindowBits {
    /// The largest window, which is the default.
    pub const MAX: Self = Self(15);

    /// `None` outside 8 to 15.
    pub fn new(bits: u8) -> Option<Self> {
        (8..=15).contains(&bits).then_some(Self(bits))
    }

    /// The number of bits.
    pub fn get(self) -> u8 {
        self.0
    }

    /// Parses a decimal number without leading zeros (RFC 7692, section 7.1.2).
    fn parse(text: &str) -> Option<Self> {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
        text.parse().ok().filter(|_| digits).and_then(Self::new)
    }
}

/// The negotiated parameters. Both directions compress each message by itself, so no state is kept
/// between messages, and one compressed message serves many connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeflateParams {
    /// The window that the client requested of the server.
    server_max_window_bits: Option<WindowBits>,
}

impl DeflateParams {
    /// The window to compress with.
    pub fn window(self) -> WindowBits {
        self.server_max_window_bits.unwrap_or(WindowBits::MAX)
    }
}

/// Formats the parameters for the header of the response.
impl fmt::Display for DeflateParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{DEFLATE}; server_no_context_takeover; client_no_context_takeover")?;
        match self.server_max_window_bits {
            Some(window) => write!(f, "; server_max_window_bits={}", window.0),
            None => Ok(()),
        }
    }
}

/// The header violates the grammar of extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed Sec-WebSocket-Extensions")]
pub struct MalformedExtensions;

/// Accepts the first acceptable offer of permessage-deflate. The header can have several lines.
///
/// # Errors
///
/// [`MalformedExtensions`], also if the malformed part follows an acceptable offer.
pub fn negotiate<'a>(
    lines: impl IntoIterator<Item = &'a str>,
) -> Result<Option<DeflateParams>, MalformedExtensions> {
    let mut chosen = None;
    for line in lines {
        let mut parser = ExtensionsParser { rest: line };
        while let Some(name) = parser.next_extension()? {
            let mut offer = DeflateOffer::default();
            while let Some((parameter, value)) = parser.next_parameter()? {
                offer.add_parameter(parameter, value.as_deref());
            }
            if name == DEFLATE && !offer.declined {
                chosen = chosen.or(Some(DeflateParams {
                    server_max_window_bits: offer.server_max_window_bits,
                }));
            }
        }
    }
    Ok(chosen)
}

/// The parameters of one offer.
#[derive(Default)]
struct DeflateOffer<'a> {
    seen: Vec<&'a str>,
    server_max_window_bits: Option<WindowBits>,
    declined: bool,
}

impl<'a> DeflateOffer<'a> {
    fn add_parameter(&mut self, parameter: &'a str, value: Option<&str>) {
        let known = match (parameter, value) {
            ("server_no_context_takeover" | "client_no_context_takeover", None) => true,
            ("server_max_window_bits", Some(bits)) => {
                self.server_max_window_bits = WindowBits::parse(bits);
                self.server_max_window_bits.is_some()
            }
            // A hint, or the permission to limit the client's window. The gateway does not use it:
            // it inflates clients' messages with the largest window.
            ("client_max_window_bits", None) => true,
            ("client_max_window_bits", Some(bits)) => WindowBits::parse(bits).is_some(),
            _ => false,
        };
        self.declined |= !known || self.seen.contains(&parameter);
        self.seen.push(parameter);
    }
}

/// Parses a line of the header. Whitespace is allowed between any two tokens.
struct ExtensionsParser<'a> {
    rest: &'a str,
}

impl<'a> ExtensionsParser<'a> {
    /// The name of the next extension, after empty list elements.
    fn next_extension(&mut self) -> Result<Option<&'a str>, MalformedExtensions> {
        while self.take_delimiter(',') {}
        if self.rest.is_empty() {
            return Ok(None);
        }
        self.token().map(Some)
    }

    /// The next parameter of the current extension, and its value.
    fn next_parameter(&mut self) -> Result<Option<(&'a str, Option<String>)>, MalformedExtensions> {
        if !self.take_delimiter(';') {
            let ends = self.rest.is_empty() || self.rest.starts_with(',');
            return if ends { Ok(None) } else { Err(MalformedExtensions) };
        }
        let name = self.token()?;
        if !self.take_delimiter('=') {
            return Ok(Some((name, None)));
        }
        let value =
            if self.rest.starts_with('"') { self.quoted()? } else { self.token()?.to_owned() };
        Ok(Some((name, Some(value))))
    }

    /// Consumes `delimiter` and the whitespace around it.
    fn take_delimiter(&mut self, delimiter: char) -> bool {
        self.skip_whitespace();
        let Some(rest) = self.rest.strip_prefix(delimiter) else { return false };
        self.rest = rest;
        self.skip_whitespace();
        true
    }

    fn skip_whitespace(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t']);
    }

    fn token(&mut self) -> Result<&'a str, MalformedExtensions> {
        let end = self.rest.find(|c| !is_token(c)).unwrap_or(self.rest.len());
        let (token, rest) = self.rest.split_at(end);
        self.rest = rest;
        self.skip_whitespace();
        if token.is_empty() { Err(MalformedExtensions) } else { Ok(token) }
    }

    /// A quoted string, whose content must be a token.
    fn quoted(&mut self) -> Result<String, MalformedExtensions> {
        let mut value = String::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            let c = match c {
                '"' => {
                    self.rest = &self.rest[at + 1..];
                    self.skip_whitespace();
                    return if value.is_empty() { Err(MalformedExtensions) } else { Ok(value) };
                }
                '\\' => chars.next().ok_or(MalformedExtensions)?.1,
                c => c,
            };
            if !is_token(c) {
                return Err(MalformedExtensions);
            }
            value.push(c);
        }
        Err(MalformedExtensions)
    }
}

/// Whether the character is allowed in a token (RFC 9110, section 5.6.2).
fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(lines: &[&str], answer: Result<Option<&str>, MalformedExtensions>) {
        const PREFIX: &str =
            "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
        let got = negotiate(lines.iter().copied());
        let got = got.map(|deflate| deflate.map(|deflate| deflate.to_string()));
        let answer = answer.map(|rest| rest.map(|rest| format!("{PREFIX}{rest}")));
        assert_eq!(got, answer, "{lines:?}");
    }

    #[test]
    fn an_offer_is_accepted_with_its_window() {
        for plain in [
            "permessage-deflate",
            "permessage-deflate; client_max_window_bits",
            "permessage-deflate; client_max_window_bits=8",
            "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
            "permessage-deflate;client_max_window_bits=\"1\\5\"",
            " ,\tpermessage-deflate ;\tclient_max_window_bits = 15 , ,",
        ] {
            check(&[plain], Ok(Some("")));
        }
        for bits in 8..=15 {
            let answer = format!("; server_max_window_bits={bits}");
            for quote in ["", "\""] {
                let offer =
                    format!("permessage-deflate; server_max_window_bits={quote}{bits}{quote}");
                check(&[&offer], Ok(Some(&answer)));
            }
        }
    }

    #[test]
    fn the_first_acceptable_offer_is_accepted() {
        check(&[], Ok(None));
        check(&[""], Ok(None));
        check(&["x-webkit-deflate-frame, permessage-foo; a=\"b\""], Ok(None));
        check(
            &["foo", "permessage-deflate; server_max_window_bits=10", "permessage-deflate"],
            Ok(Some("; server_max_window_bits=10")),
        );
        check(
            &["permessage-deflate; server_max_window_bits=9, permessage-deflate"],
            Ok(Some("; server_max_window_bits=9")),
        );
        check(&["permessage-deflate; unknown, permessage-deflate"], Ok(Some("")));
    }

    #[test]
    fn offers_with_invalid_parameters_are_declined() {
        for parameters in [
            "unknown",
            "unknown=1",
            "server_no_context_takeover=1",
            "client_no_context_takeover=true",
            "server_max_window_bits",
            "server_max_window_bits=7",
            "server_max_window_bits=16",
            "server_max_window_bits=08",
            "server_max_window_bits=+9",
            "server_max_window_bits=9a",
            "server_max_window_bits=999999999999",
            "client_max_window_bits=0",
            "client_max_window_bits=16",
            "client_max_window_bits=\"010\"",
            "server_no_context_takeover; server_no_context_takeover",
            "server_max_window_bits=10; server_max_window_bits=10",
            "client_max_window_bits; client_max_window_bits=10",
        ] {
            check(&[&format!("permessage-deflate; {parameters}")], Ok(None));
            check(
                &[&format!("permessage-deflate; {parameters}, permessage-deflate")],
                Ok(Some("")),
            );
        }
        check(&["Permessage-Deflate"], Ok(None));
    }

    #[test]
    fn a_malformed_header_fails_the_negotiation() {
        for bad in [
            ";",
            "=",
            "permessage-deflate;",
            "permessage-deflate; ;",
            "permessage-deflate; =9",
            "permessage-deflate; server_max_window_bits=",
            "permessage-deflate; server_max_window_bits=\"\"",
            "permessage-deflate; server_max_window_bits=\"9",
            "permessage-deflate; server_max_window_bits=\"9 \"",
            "permessage-deflate; server_max_window_bits=\"9\"9",
            "permessage-deflate; a=b=c",
            "permessage-deflate client_max_window_bits",
            "permessage-deflate; a, b c",
            "per(message)",
            "größe",
            "a=b",
        ] {
            check(&[bad], Err(MalformedExtensions));
            check(&["permessage-deflate", bad], Err(MalformedExtensions));
        }
    }
}
