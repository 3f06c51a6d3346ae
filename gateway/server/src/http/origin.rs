//! Origins of web pages that may open a WebSocket or an event stream.
//!
//! A browser sends the origin of the page with a handshake, and the cookies of its visitor whatever
//! the page: without this check any page could act as its visitor (RFC 6455, section 10.2).
//! Programs that are no browsers send no origin and are not checked.

use std::{borrow::Cow, fmt, net::Ipv6Addr};

use axum::http::{HeaderMap, HeaderValue, header};

use super::headers::utf8;

/// Origins that may connect, besides the gateway's own pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedOrigins {
    any: bool,
    null: bool,
    origins: Vec<OriginPattern>,
}

/// One origin, or the origins of all hosts below a name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct OriginPattern {
    origin: Origin,
    /// Whether the host stands for all hosts with one or more labels in front of it.
    subdomains: bool,
}

/// Scheme, host and port of a page, in lower-case ASCII.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

/// Rights of a page whose origin is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OriginAccess {
    /// No origin: the client is no browser, or its request belongs to no page.
    NoOrigin,
    /// The page may use the cookies of its visitor.
    WithCredentials,
    /// Any page may connect, so that the cookies of its visitor must not count.
    WithoutCredentials,
}

/// A denied origin and the host it was compared with, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeniedOrigin {
    /// `Origin`
    pub origin: String,
    /// `Host`
    pub host: String,
}

/// An entry of `server.allowed_origins` that can match no origin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no page can have the origin `{entry}`: {advice}")]
pub struct InvalidOrigin {
    entry: String,
    advice: OriginAdvice,
}

/// Suggested replacement.
#[derive(Clone, Debug, PartialEq, Eq)]
enum OriginAdvice {
    Write(String),
    Shape,
}

impl fmt::Display for OriginAdvice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write(entry) => write!(f, "write `{entry}`"),
            Self::Shape => f.write_str(
                "write `https://host`, `https://host:port`, `https://*.domain`, `null`, or `*` for any",
            ),
        }
    }
}

impl AllowedOrigins {
    /// Parses a list of origins. `*` allows any, `https://*.example.org` all hosts below a name,
    /// `null` pages without an origin, such as files and sandboxed frames.
    ///
    /// # Errors
    ///
    /// [`InvalidOrigin`] for the first entry that can match no page.
    pub fn parse<'a>(entries: impl Iterator<Item = &'a str>) -> Result<Self, InvalidOrigin> {
        let mut allowed = Self::default();
        for entry in entries {
            match entry {
                "*" => allowed.any = true,
                "null" => allowed.null = true,
                entry => allowed.origins.push(
                    parse_pattern(entry)
                        .map_err(|advice| InvalidOrigin { entry: entry.to_owned(), advice })?,
                ),
            }
        }
        Ok(allowed)
    }

    /// Returns the rights of a page with these headers. The gateway's own pages are always allowed:
    /// their origin has the host and port of `Host`, with http or, behind a proxy that ends TLS,
    /// https.
    ///
    /// # Errors
    ///
    /// [`DeniedOrigin`] if the page may not connect.
    pub fn allow(&self, headers: &HeaderMap) -> Result<OriginAccess, DeniedOrigin> {
        let mut origins = headers.get_all(header::ORIGIN).iter();
        let Some(value) = origins.next() else { return Ok(OriginAccess::NoOrigin) };
        let is_one = origins.next().is_none();
        let origin = utf8(value).filter(|_| is_one).and_then(Origin::parse);
        if let Some(origin) = &origin
            && (origin.is_own(headers) || self.origins.iter().any(|known| known.allows(origin)))
        {
            return Ok(OriginAccess::WithCredentials);
        }
        let is_null = is_one && value.as_bytes() == b"null";
        if self.any || self.null && is_null {
            return Ok(OriginAccess::WithoutCredentials);
        }
        let host = headers.get(header::HOST);
        Err(DeniedOrigin { origin: for_log(Some(value)), host: for_log(host) })
    }
}

/// Returns the start of a header value, for the log.
fn for_log(value: Option<&HeaderValue>) -> String {
    const CHARS_MAX: usize = 200;
    let text = value.map_or(Cow::Borrowed("-"), |value| String::from_utf8_lossy(value.as_bytes()));
    text.chars().take(CHARS_MAX).collect()
}

/// Parses an entry of the configuration.
fn parse_pattern(entry: &str) -> Result<OriginPattern, OriginAdvice> {
    let Some((scheme, rest)) = entry.split_once("://") else {
        let suggestion = format!("https://{entry}");
        return Err(match parse_pattern(&suggestion) {
            Ok(_) => OriginAdvice::Write(suggestion),
            // `example.org/path` lacks the scheme and has a path.
            Err(OriginAdvice::Write(suggestion)) => OriginAdvice::Write(suggestion),
            Err(OriginAdvice::Shape) => OriginAdvice::Shape,
        });
    };
    match scheme.to_ascii_lowercase().as_str() {
        "ws" => return Err(OriginAdvice::Write(format!("http://{rest}"))),
        "wss" => return Err(OriginAdvice::Write(format!("https://{rest}"))),
        "file" => return Err(OriginAdvice::Write("null".to_owned())),
        _ => {}
    }
    if let Some(end) = rest.find(['/', '?', '#']) {
        let suggestion = format!("{scheme}://{}", &rest[..end]);
        return Err(parse_pattern(&suggestion)
            .map_or(OriginAdvice::Shape, |_| OriginAdvice::Write(suggestion)));
    }
    let below = rest.strip_prefix("*.");
    let bare = format!("{scheme}://{}", below.unwrap_or(rest));
    let origin = Origin::parse(&bare).ok_or(OriginAdvice::Shape)?;
    if rest == "*" {
        return Err(OriginAdvice::Write("*".to_owned()));
    }
    if origin.host.starts_with('.') {
        return Err(OriginAdvice::Write(format!("{scheme}://*{rest}")));
    }
    let is_address =
        origin.host.starts_with('[') || origin.host.parse::<std::net::Ipv4Addr>().is_ok();
    let has_gap = origin.host.trim_end_matches('.').split('.').any(str::is_empty);
    if has_gap || origin.host.contains('*') || below.is_some() && is_address {
        return Err(OriginAdvice::Shape);
    }
    Ok(OriginPattern { origin, subdomains: below.is_some() })
}

impl OriginPattern {
    fn allows(&self, origin: &Origin) -> bool {
        let Origin { scheme, host, port } = &self.origin;
        if *scheme != origin.scheme || *port != origin.port {
            return false;
        }
        if !self.subdomains {
            return *host == origin.host;
        }
        let label =
            origin.host.strip_suffix(host.as_str()).and_then(|front| front.strip_suffix('.'));
        label.is_some_and(|labels| !labels.is_empty() && !labels.starts_with('.'))
    }
}

impl Origin {
    fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let scheme = scheme.to_ascii_lowercase();
        let (host, port) = authority(rest, default_port(&scheme)?)?;
        Some(Self { scheme, host, port })
    }

    /// Whether the page belongs to this gateway, as `Host` names it.
    fn is_own(&self, headers: &HeaderMap) -> bool {
        let (true, Some(default)) =
            (matches!(&*self.scheme, "http" | "https"), default_port(&self.scheme))
        else {
            return false;
        };
        let host = headers.get(header::HOST).and_then(utf8);
        let own = host.and_then(|host| authority(host, default));
        own.is_some_and(|(host, port)| host == self.host && port == self.port)
    }
}

fn default_port(scheme: &str) -> Option<u16> {
    let is_scheme = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    match scheme {
        _ if !is_scheme => None,
        "http" => Some(80),
        "https" => Some(443),
        // Origins of applications (`tauri://localhost`) have no port.
        _ => Some(0),
    }
}

/// Parses `host` or `host:port` to lower-case ASCII (UTS 46, as in URLs).
fn authority(text: &str, default_port: u16) -> Option<(String, u16)> {
    let port_at = match text.rfind(']') {
        Some(end) => text[end..].find(':').map(|at| end + at),
        None => text.find(':'),
    };
    let (host, port) = match port_at.map(|at| (&text[..at], &text[at + 1..])) {
        Some((host, "")) => (host, default_port),
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => {
            (host, port.parse().ok()?)
        }
        Some(_) => return None,
        None => (text, default_port),
    };
    if let Some(address) = host.strip_prefix('[') {
        let address: Ipv6Addr = address.strip_suffix(']')?.parse().ok()?;
        return Some((format!("[{address}]"), port));
    }
    let deny = idna::AsciiDenyList::URL;
    let host = idna::domain_to_ascii_cow(host.as_bytes(), deny).ok()?;
    (!host.is_empty()).then(|| (host.into_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(entries: &[&str]) -> AllowedOrigins {
        AllowedOrigins::parse(entries.iter().copied()).unwrap()
    }

    fn headers(origin: Option<&str>, host: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("host", HeaderValue::from_bytes(host.as_bytes()).unwrap());
        if let Some(origin) = origin {
            headers.insert("origin", HeaderValue::from_bytes(origin.as_bytes()).unwrap());
        }
        headers
    }

    #[track_caller]
    fn check(entries: &[&str], origin: Option<&str>, host: &str, expected: Option<OriginAccess>) {
        let found = allowed(entries).allow(&headers(origin, host));
        assert_eq!(found.ok(), expected, "{origin:?} at {host}, allowed {entries:?}");
    }

    const YES: Option<OriginAccess> = Some(OriginAccess::WithCredentials);
    const ANY: Option<OriginAccess> = Some(OriginAccess::WithoutCredentials);

    #[test]
    fn own_pages_may_connect_with_any_list() {
        for list in [&[][..], &["https://app.example"], &["*"]] {
            check(list, None, "a:8080", Some(OriginAccess::NoOrigin));
            check(list, Some("http://a:8080"), "a:8080", YES);
            check(list, Some("https://A:8080"), "a:8080", YES);
            check(list, Some("https://a"), "a", YES);
            check(list, Some("https://a"), "a:443", YES);
            check(list, Some("https://a:443"), "a", YES);
            check(list, Some("http://a"), "a:80", YES);
            check(list, Some("http://[::1]:8080"), "[0:0::1]:8080", YES);
            check(list, Some("http://xn--mnchen-3ya.example"), "MÜNCHEN.example", YES);
        }
        for bad in
            ["http://a", "http://a:8081", "http://b:8080", "http://a:8080.b", "null", "a", ""]
        {
            check(&[], Some(bad), "a:8080", None);
        }
        check(&[], Some("https://a"), "a:8443", None);
        check(&[], Some("https://a"), "a:80", None);
        // A gateway serves no pages with another scheme.
        check(&[], Some("ftp://a:8080"), "a:8080", None);
        check(&[], Some("app://a"), "a", None);
    }

    #[test]
    fn listed_origins_may_connect_besides_own_pages() {
        let list = &["https://app.example", "http://localhost:3000", "tauri://localhost"];
        for good in ["https://app.example", "http://localhost:3000", "tauri://localhost"] {
            check(list, Some(good), "gw", YES);
        }
        for bad in ["http://app.example", "https://app.example:8443", "null", "https://\u{FC}"] {
            check(list, Some(bad), "gw", None);
        }
    }

    #[test]
    fn any_origin_may_connect_without_credentials() {
        let list = &["*", "https://app.example"];
        check(list, Some("https://app.example"), "gw", YES);
        for any in ["https://anything", "null", "nonsense", "http://gw:1"] {
            check(list, Some(any), "gw", ANY);
        }
        check(&["null"], Some("null"), "gw", ANY);
        check(&["null"], Some("https://a"), "gw", None);
    }

    #[test]
    fn a_star_stands_for_one_label_or_more() {
        let list = &["https://*.example.org", "http://*.dev.test:8080"];
        for good in ["https://a.example.org", "https://A.b.Example.ORG", "http://x.dev.test:8080"] {
            check(list, Some(good), "gw", YES);
        }
        for bad in [
            "https://example.org",
            "https://.example.org",
            "https://aexample.org",
            "http://a.example.org",
            "https://a.example.org:8443",
            "https://a.example.org.evil.test",
            "http://x.dev.test",
        ] {
            check(list, Some(bad), "gw", None);
        }
    }

    #[test]
    fn international_hosts_are_compared_in_ascii() {
        let list = &["https://bücher.example", "https://*.例え.テスト"];
        check(list, Some("https://xn--bcher-kva.example"), "gw", YES);
        check(list, Some("https://a.xn--r8jz45g.xn--zckzah"), "gw", YES);
        check(&["https://xn--bcher-kva.example"], Some("https://xn--bcher-kva.example"), "gw", YES);
        check(list, Some("https://bucher.example"), "gw", None);
    }

    #[test]
    fn two_origin_headers_are_denied() {
        let mut two = headers(Some("https://a"), "a");
        two.append("origin", "https://a".parse().unwrap());
        assert!(allowed(&[]).allow(&two).is_err());
    }

    #[test]
    fn a_denial_has_origin_and_host() {
        let denied = allowed(&[]).allow(&headers(Some("https://b"), "a:80")).unwrap_err();
        assert_eq!((&*denied.origin, &*denied.host), ("https://b", "a:80"));
    }

    #[test]
    fn an_entry_that_matches_no_page_is_rejected_with_advice() {
        let long = "https://host";
        for (entry, advice) in [
            ("app.example", "write `https://app.example`"),
            ("*.app.example", "write `https://*.app.example`"),
            ("https://a/", "write `https://a`"),
            ("https://a/path?x", "write `https://a`"),
            ("a/path", "write `https://a`"),
            ("wss://a:1", "write `https://a:1`"),
            ("ws://a", "write `http://a`"),
            ("file:///x", "write `null`"),
            ("https://*", "write `*`"),
            ("https://.example", "write `https://*.example`"),
            ("https://a..example", long),
            ("https://", long),
            ("https://a:x", long),
            ("https://a:65536", long),
            ("https://a.*.example", long),
            ("https://*a.example", long),
            ("https://*.*.example", long),
            ("https://*.127.0.0.1", long),
            ("https://a b", long),
            ("https://u@a", long),
            ("https://[::1", long),
            ("ht tp://a", long),
            ("**", long),
        ] {
            let Err(error) = AllowedOrigins::parse([entry].into_iter()) else {
                panic!("{entry} is accepted")
            };
            let text = error.to_string();
            assert!(text.contains(advice) && text.contains(entry), "{entry}: {text}");
        }
    }
}
