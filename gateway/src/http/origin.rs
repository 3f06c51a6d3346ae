//! Which web pages may open a WebSocket here.
//!
//! Browsers send the page's origin with the handshake, and cookies with it whoever the page is
//! from: without this check any page could speak as its visitor (RFC 6455, section 10.2). Programs
//! that are no browsers send none and are not asked.

use axum::http::HeaderMap;

/// Origins other than the gateway's own host that may connect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedOrigins {
    any: bool,
    origins: Vec<Origin>,
}

/// Scheme, host and port of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

/// The text is no origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an origin is `https://host`, `https://host:port` or `*`, without a path")]
pub struct InvalidOrigin;

impl AllowedOrigins {
    /// Reads a list of origins; `*` allows any. An empty list allows the gateway's own host.
    ///
    /// # Errors
    ///
    /// [`InvalidOrigin`] where an entry is none.
    pub fn parse<'a>(entries: impl Iterator<Item = &'a str>) -> Result<Self, InvalidOrigin> {
        let mut allowed = Self::default();
        for entry in entries {
            if entry == "*" {
                allowed.any = true;
            } else {
                allowed.origins.push(Origin::parse(entry).ok_or(InvalidOrigin)?);
            }
        }
        Ok(allowed)
    }

    /// Whether a handshake with these headers may go on.
    pub fn allow(&self, headers: &HeaderMap) -> bool {
        let mut origins = headers.get_all("origin").iter();
        let Some(origin) = origins.next() else { return true };
        if self.any {
            return true;
        }
        let origin = origin.to_str().ok().and_then(Origin::parse);
        let (Some(origin), None) = (origin, origins.next()) else { return false };
        if !self.origins.is_empty() {
            return self.origins.contains(&origin);
        }
        let host = headers.get("host").and_then(|host| host.to_str().ok());
        let own = host.and_then(|host| authority(host, origin.default_port()));
        own.is_some_and(|(host, port)| host == origin.host && port == origin.port)
    }
}

impl Origin {
    fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let scheme = scheme.to_ascii_lowercase();
        let (host, port) = authority(rest, default_port(&scheme)?)?;
        Some(Self { scheme, host, port })
    }

    fn default_port(&self) -> u16 {
        default_port(&self.scheme).unwrap_or(0)
    }
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        // Pages of applications (`tauri://localhost`) have no port.
        _ if scheme.is_empty() => None,
        _ => Some(0),
    }
}

/// `host` or `host:port`, in lower case.
fn authority(text: &str, default_port: u16) -> Option<(String, u16)> {
    if text.is_empty() || text.contains(['/', '?', '#', '@', ' ']) {
        return None;
    }
    let port_at = match text.rfind(']') {
        Some(end) => text[end..].find(':').map(|at| end + at),
        None => text.find(':'),
    };
    let (host, port) = match port_at {
        Some(at) => (&text[..at], text[at + 1..].parse().ok()?),
        None => (text, default_port),
    };
    (!host.is_empty()).then(|| (host.to_ascii_lowercase(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(allowed: &[&str], origin: Option<&str>, host: &str, expected: bool) {
        let allowed = AllowedOrigins::parse(allowed.iter().copied()).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert("host", host.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert("origin", origin.parse().unwrap());
        }
        assert_eq!(allowed.allow(&headers), expected, "{origin:?} at {host}");
    }

    #[test]
    fn by_default_host_and_port_have_to_be_the_gateways() {
        check(&[], None, "a:8080", true);
        check(&[], Some("http://a:8080"), "a:8080", true);
        check(&[], Some("http://A:8080"), "a:8080", true);
        check(&[], Some("https://a"), "a", true);
        check(&[], Some("https://a:443"), "a", true);
        check(&[], Some("http://[::1]:8080"), "[::1]:8080", true);
        for bad in ["http://a", "http://a:8081", "http://b:8080", "http://a:8080.b", "null", "a"] {
            check(&[], Some(bad), "a:8080", false);
        }
        check(&[], Some("https://a"), "a:8443", false);
    }

    #[test]
    fn a_list_takes_the_place_of_the_own_host() {
        let list = &["https://app.example", "http://localhost:3000"];
        check(list, Some("https://app.example"), "gw", true);
        check(list, Some("http://localhost:3000"), "gw", true);
        check(list, Some("http://app.example"), "gw", false);
        check(list, Some("https://gw"), "gw", false);
        check(&["*"], Some("https://anything"), "gw", true);
        check(&["*"], Some("null"), "gw", true);
    }

    #[test]
    fn an_entry_that_is_no_origin_is_refused() {
        for bad in ["app.example", "https://", "https://a/path", "https://a:x", ""] {
            assert!(AllowedOrigins::parse([bad].into_iter()).is_err(), "{bad:?}");
        }
    }
}
