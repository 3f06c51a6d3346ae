//! Request headers, read as bytes.
//!
//! A header value is bytes, not text (RFC 9110, section 5.5): a byte above ASCII in the cookie of
//! another application must not hide the cookie next to it. Each function here splits bytes and
//! reads only the wanted part. `HeaderValue::to_str` fails for the whole value, and is forbidden in
//! this crate (`clippy.toml`).

use std::borrow::Cow;

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

/// Name of the header with the id of a request.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Yields the elements of a list header (RFC 9110, section 5.6.1) from all of its lines.
pub(super) fn elements(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &[u8]> {
    let lines = headers.get_all(name).into_iter();
    lines
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|element| !element.is_empty())
}

/// Whether a list header has this element, ignoring case.
pub(super) fn has_element(headers: &HeaderMap, name: HeaderName, element: &str) -> bool {
    elements(headers, name).any(|found| found.eq_ignore_ascii_case(element.as_bytes()))
}

/// Returns the token of the first `Authorization: Bearer` (RFC 6750, section 2.1).
pub(super) fn bearer(headers: &HeaderMap) -> Option<Cow<'_, str>> {
    headers.get_all(header::AUTHORIZATION).into_iter().find_map(|value| {
        let value = value.as_bytes().trim_ascii_start();
        let space = value.iter().position(u8::is_ascii_whitespace)?;
        let (scheme, token) = value.split_at(space);
        let is_bearer = scheme.eq_ignore_ascii_case(b"bearer");
        is_bearer.then(|| String::from_utf8_lossy(token.trim_ascii()))
    })
}

/// Returns the value of a cookie, without quotation marks (RFC 6265, section 4.1.1).
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<Cow<'a, str>> {
    let lines = headers.get_all(header::COOKIE).into_iter();
    let mut pairs = lines.flat_map(|value| value.as_bytes().split(|byte| *byte == b';'));
    pairs.find_map(|pair| {
        let equals = pair.iter().position(|byte| *byte == b'=')?;
        let (found, value) = (pair[..equals].trim_ascii(), pair[equals + 1..].trim_ascii());
        let bare = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\""));
        let is_wanted = found == name.as_bytes();
        is_wanted.then(|| String::from_utf8_lossy(bare.unwrap_or(value)))
    })
}

/// Returns the id that a proxy or the client gave this request, if it is short and printable.
pub(super) fn request_id(headers: &HeaderMap) -> Option<&HeaderValue> {
    const BYTES_MAX: usize = 128;
    let id = headers.get(REQUEST_ID)?;
    let bytes = id.as_bytes();
    let is_usable =
        (1..=BYTES_MAX).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic);
    is_usable.then_some(id)
}

/// Returns a value as text if it is UTF-8.
pub(super) fn utf8(value: &HeaderValue) -> Option<&str> {
    std::str::from_utf8(value.as_bytes()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &[u8])]) -> HeaderMap {
        let value = |bytes: &[u8]| HeaderValue::from_bytes(bytes).unwrap();
        lines.iter().map(|(name, bytes)| (HeaderName::from_static(name), value(bytes))).collect()
    }

    #[track_caller]
    fn check_cookie(lines: &[&[u8]], expected: Option<&str>) {
        let lines: Vec<_> = lines.iter().map(|line| ("cookie", *line)).collect();
        assert_eq!(cookie(&headers(&lines), "token").as_deref(), expected, "{lines:?}");
    }

    #[test]
    fn a_cookie_is_found_next_to_cookies_of_any_bytes() {
        check_cookie(&["city=Zürich; token=good".as_bytes()], Some("good"));
        check_cookie(&[b"city=Z\xFCrich; token=good"], Some("good"));
        check_cookie(&[b"\xFF\xFE", b"a; =b; token=\"good\";"], Some("good"));
        check_cookie(&[b"xtoken=a;token=b=c; token=d"], Some("b=c"));
        check_cookie(&[b"token=\xFF"], Some("\u{FFFD}"));
        check_cookie(&[b"Token=a; token"], None);
    }

    #[test]
    fn a_bearer_token_is_found_next_to_other_schemes() {
        let both: [(_, &[u8]); 2] =
            [("authorization", b"Basic Zm9v\xFC"), ("authorization", b"bEaReR  good")];
        assert_eq!(bearer(&headers(&both)).as_deref(), Some("good"));
        // An invalid token still counts, like a token signed with another key.
        let bad: [(_, &[u8]); 1] = [("authorization", b"Bearer g\xFCt")];
        assert_eq!(bearer(&headers(&bad)).as_deref(), Some("g\u{FFFD}t"));
        for none in [&b"Bearer"[..], b"Basic x", b""] {
            assert_eq!(bearer(&headers(&[("authorization", none)])), None);
        }
    }

    #[test]
    fn a_request_id_is_short_and_printable() {
        let long = "x".repeat(129);
        for (id, is_usable) in [
            (&b"0af7651916cd43dd"[..], true),
            (b"a-b_c.d/9", true),
            (b"", false),
            (b"a b", false),
            (b"\xFC", false),
            (long.as_bytes(), false),
        ] {
            assert_eq!(request_id(&headers(&[("x-request-id", id)])).is_some(), is_usable);
        }
    }

    #[test]
    fn a_list_element_beyond_ascii_hides_no_other() {
        let lines: [(_, &[u8]); 2] =
            [("sec-websocket-protocol", b"\xFC, chat.v1,,"), ("sec-websocket-protocol", b" b ")];
        let found = headers(&lines);
        let found: Vec<_> = elements(&found, header::SEC_WEBSOCKET_PROTOCOL).collect();
        assert_eq!(found, [&b"\xFC"[..], b"chat.v1", b"b"]);
    }
}
