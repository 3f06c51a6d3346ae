//! Connect options, the handshake request made of them, and its errors.
//!
//! Pure. `client::connection` uses it.

use std::{fmt, io, net::IpAddr, sync::Arc, time::Duration};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tokio_tungstenite::tungstenite::{
    self,
    error::{ProtocolError, SubProtocolError},
    handshake::client::{Request, Response, generate_key},
    http::{HeaderMap, HeaderName, HeaderValue, Uri, header},
};

use skein_protocol::{SUBPROTOCOL, position::Position};

/// All but the unreserved characters of RFC 3986.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// Default time limit for connecting.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the client connects and as which user.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// `ws://host:port/ws`, `…/ws/rooms/{room}` or `…/ws/echo`, or the same with `wss://`; its
    /// query is kept.
    pub url: String,
    /// `?user=`
    pub user: Option<String>,
    /// `?name=`
    pub name: Option<String>,
    /// `?node=`
    pub node: Option<String>,
    /// `?session=`
    pub session: Option<String>,
    /// `?inbox=`: the position of this device in the inbox.
    pub inbox: Option<Position>,
    /// Further query parameters, such as `since` or `ping`.
    pub query: Vec<(String, String)>,
    /// The token, and where the handshake carries it.
    pub token: Option<AuthToken>,
    /// Offered in `Sec-WebSocket-Protocol`, before a token that goes there.
    pub subprotocols: Vec<String>,
    /// `Origin`, as a browser would send it.
    pub origin: Option<String>,
    /// Further headers. They replace those of the handshake.
    pub headers: Vec<(String, String)>,
    /// How a `wss://` connection verifies the server; `None`: by the certificate authorities that
    /// Mozilla trusts (`webpki-roots`).
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// The local address to connect from.
    pub local_address: Option<IpAddr>,
    /// Maximum size in bytes of a message from the server.
    pub message_bytes_max: usize,
    /// Time limit for name resolution, TCP and handshake together.
    pub connect_timeout: Duration,
}

/// A token, and where the handshake carries it.
#[derive(Clone, PartialEq, Eq)]
pub struct AuthToken {
    /// The token.
    pub token: String,
    /// Where the handshake carries it.
    pub location: TokenLocation,
}

/// Where the handshake carries the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenLocation {
    /// `?token=`
    Query,
    /// `Authorization: Bearer`
    Header,
    /// The cookie of this name.
    Cookie(String),
    /// `bearer.<token>` among the subprotocols.
    Subprotocol,
}

// Not derived, so that tokens stay out of logs.
impl fmt::Debug for AuthToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("placement", &self.location).finish_non_exhaustive()
    }
}

/// Why connecting failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The URL is neither a `ws://` nor a `wss://` URL.
    #[error("`{url}` is not a URL of the form ws://host[:port]/path or wss://host[:port]/path")]
    InvalidUrl {
        /// The URL.
        url: String,
    },
    /// A header, cookie or subprotocol contains characters that HTTP does not allow.
    #[error("`{name}` contains characters that a header must not have")]
    InvalidHeader {
        /// The name of the header.
        name: String,
    },
    /// The server's response was not 101.
    #[error("HTTP {status}: {body}")]
    Http {
        /// The HTTP status.
        status: u16,
        /// `Retry-After`, if it is a number of seconds.
        retry_after: Option<Duration>,
        /// The part of the body that arrived with the header.
        body: String,
    },
    /// The server's response was 101, but chose none of the offered subprotocols.
    #[error("the server chose none of the offered subprotocols")]
    NoSubprotocol,
    /// The server's response is not a WebSocket handshake.
    #[error("handshake failed: {0}")]
    Handshake(#[source] Box<tungstenite::Error>),
    /// A network error.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The time limit [`ConnectOptions::connect_timeout`] passed.
    #[error("no connection within {0:?}")]
    TimedOut(Duration),
}

impl ConnectOptions {
    /// Options for `url` that offer `chat.v1` and name no user.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            user: None,
            name: None,
            node: None,
            session: None,
            inbox: None,
            query: Vec::new(),
            token: None,
            subprotocols: vec![SUBPROTOCOL.to_owned()],
            origin: None,
            headers: Vec::new(),
            tls: None,
            local_address: None,
            message_bytes_max: 64 * 1024 * 1024,
            connect_timeout: CONNECT_TIMEOUT,
        }
    }

    /// Sets the user.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// Sets the token.
    pub fn token(mut self, token: impl Into<String>, placement: TokenLocation) -> Self {
        self.token = Some(AuthToken { token: token.into(), location: placement });
        self
    }

    pub(super) fn uri(&self) -> Result<Uri, ConnectError> {
        let bad = || ConnectError::InvalidUrl { url: self.url.clone() };
        let mut url = self.url.clone();
        let mut add = |name: &str, value: &str| {
            url.push(if url.contains('?') { '&' } else { '?' });
            url.extend(utf8_percent_encode(name, RESERVED));
            url.push('=');
            url.extend(utf8_percent_encode(value, RESERVED));
        };
        let token = self.token.as_ref().filter(|token| token.location == TokenLocation::Query);
        let inbox = self.inbox.as_ref().map(Position::to_string);
        let named = [
            ("inbox", inbox.as_ref()),
            ("user", self.user.as_ref()),
            ("name", self.name.as_ref()),
            ("token", token.map(|token| &token.token)),
            ("node", self.node.as_ref()),
            ("session", self.session.as_ref()),
        ];
        for (name, value) in named {
            if let Some(value) = value {
                add(name, value);
            }
        }
        for (name, value) in &self.query {
            add(name, value);
        }
        let uri: Uri = url.parse().map_err(|_| bad())?;
        if !matches!(uri.scheme_str(), Some("ws" | "wss")) || uri.host().is_none() {
            return Err(bad());
        }
        Ok(uri)
    }

    pub(super) fn request(&self, uri: Uri) -> Result<Request, ConnectError> {
        let mut fixed = vec![
            (header::HOST, uri.authority().map(|host| host.to_string()).unwrap_or_default()),
            (header::CONNECTION, "Upgrade".to_owned()),
            (header::UPGRADE, "websocket".to_owned()),
            (header::SEC_WEBSOCKET_VERSION, "13".to_owned()),
            (header::SEC_WEBSOCKET_KEY, generate_key()),
        ];
        let mut subprotocols = self.subprotocols.clone();
        if let Some(AuthToken { token, location: placement }) = &self.token {
            match placement {
                TokenLocation::Query => {}
                TokenLocation::Header => {
                    fixed.push((header::AUTHORIZATION, format!("Bearer {token}")));
                }
                TokenLocation::Cookie(name) => {
                    fixed.push((header::COOKIE, format!("{name}={token}")));
                }
                TokenLocation::Subprotocol => subprotocols.push(format!("bearer.{token}")),
            }
        }
        if !subprotocols.is_empty() {
            fixed.push((header::SEC_WEBSOCKET_PROTOCOL, subprotocols.join(", ")));
        }
        if let Some(origin) = &self.origin {
            fixed.push((header::ORIGIN, origin.clone()));
        }
        let mut headers = HeaderMap::new();
        for (name, value) in fixed {
            headers.insert(name.clone(), header_value(name.as_str(), &value)?);
        }
        for (name, value) in &self.headers {
            let bad = || ConnectError::InvalidHeader { name: name.clone() };
            let known = HeaderName::try_from(name.as_str()).map_err(|_| bad())?;
            headers.insert(known, header_value(name, value)?);
        }
        let mut request = Request::new(());
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        Ok(request)
    }
}

impl ConnectError {
    pub(super) fn from_handshake(error: tungstenite::Error) -> Self {
        match error {
            tungstenite::Error::Http(response) => http_error(*response),
            tungstenite::Error::Io(error) => ConnectError::Io(error),
            tungstenite::Error::Protocol(ProtocolError::SecWebSocketSubProtocolError(
                SubProtocolError::NoSubProtocol,
            )) => ConnectError::NoSubprotocol,
            other => ConnectError::Handshake(Box::new(other)),
        }
    }
}

fn http_error(response: Response) -> ConnectError {
    let status = response.status().as_u16();
    let retry_after = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| text_of(value)?.parse().ok())
        .map(Duration::from_secs);
    let body = response.into_body().unwrap_or_default();
    let body = String::from_utf8_lossy(&body).into_owned();
    ConnectError::Http { status, retry_after, body }
}

/// The value of a header, if it is UTF-8.
pub(super) fn text_of(value: &HeaderValue) -> Option<&str> {
    std::str::from_utf8(value.as_bytes()).ok()
}

fn header_value(name: &str, value: &str) -> Result<HeaderValue, ConnectError> {
    HeaderValue::from_str(value).map_err(|_| ConnectError::InvalidHeader { name: name.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(options: &ConnectOptions) -> Request {
        options.request(options.uri().unwrap()).unwrap()
    }

    #[test]
    fn query_parameters_are_appended_and_encoded() {
        let mut options =
            ConnectOptions::new("ws://h:1/ws?a=b").user("x|y").token("t.t", TokenLocation::Query);
        options.name = Some("Ä b".to_owned());
        options.query = vec![("since".to_owned(), "e:1".to_owned())];
        let uri = options.uri().unwrap();
        let expected = "/ws?a=b&user=x%7Cy&name=%C3%84%20b&token=t.t&since=e%3A1";
        assert_eq!(uri.path_and_query().unwrap().as_str(), expected);
    }

    #[test]
    fn a_token_is_sent_at_its_location_and_never_printed() {
        let options = ConnectOptions::new("ws://h/ws");
        let with = |placement| options.clone().token("s3cret", placement);
        let header = |options: &ConnectOptions, name: &str| {
            request(options).headers().get(name).map(|value| text_of(value).unwrap().to_owned())
        };
        let bearer = header(&with(TokenLocation::Header), "authorization");
        assert_eq!(bearer.as_deref(), Some("Bearer s3cret"));
        let cookie = header(&with(TokenLocation::Cookie("token".to_owned())), "cookie");
        assert_eq!(cookie.as_deref(), Some("token=s3cret"));
        let offered = header(&with(TokenLocation::Subprotocol), "sec-websocket-protocol");
        assert_eq!(offered.as_deref(), Some("chat.v1, bearer.s3cret"));
        assert!(!format!("{:?}", with(TokenLocation::Query)).contains("s3cret"));
    }

    #[test]
    fn options_can_replace_headers_of_the_handshake() {
        let mut options = ConnectOptions::new("ws://h:8080/ws");
        options.origin = Some("http://evil".to_owned());
        options.headers = vec![("Host".to_owned(), "other".to_owned())];
        let request = request(&options);
        assert_eq!(request.headers()["host"], "other");
        assert_eq!(request.headers()["origin"], "http://evil");
        assert_eq!(request.headers()["sec-websocket-version"], "13");
    }

    #[test]
    fn a_url_that_is_not_ws_is_rejected() {
        for bad in ["", "h:1", "http://h/ws", "wss:///ws", "ws:///ws", "ws://h/a b"] {
            let opened = ConnectOptions::new(bad).uri();
            assert!(matches!(opened, Err(ConnectError::InvalidUrl { .. })), "{bad:?}: {opened:?}");
        }
    }
}
