//! Where to connect and as whom, and why that may fail: the handshake's request and its errors.
//!
//! Pure. `client::connection` is the user.

use std::{fmt, io, net::IpAddr, time::Duration};

use tokio_tungstenite::tungstenite::{
    self,
    error::{ProtocolError, SubProtocolError},
    handshake::client::{Request, Response, generate_key},
    http::{HeaderMap, HeaderName, HeaderValue, Uri, header},
};

use skein_protocol::{SUBPROTOCOL, position::Position};

/// How long opening may take, unless [`ConnectOptions`] say otherwise.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where to connect and as whom.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// `ws://host:port/ws`, `…/ws/rooms/{room}` or `…/ws/echo`; a query is kept.
    pub url: String,
    /// `?user=`
    pub user: Option<String>,
    /// `?name=`
    pub name: Option<String>,
    /// `?node=`
    pub node: Option<String>,
    /// `?session=`
    pub session: Option<String>,
    /// `?inbox=`: what this device has of the inbox.
    pub inbox: Option<Position>,
    /// More of the query, such as `since` or `ping`.
    pub query: Vec<(String, String)>,
    /// The token, and where it is put.
    pub token: Option<AuthToken>,
    /// What is offered in `Sec-WebSocket-Protocol`, before a token that goes there.
    pub subprotocols: Vec<String>,
    /// `Origin`, as a browser would send it.
    pub origin: Option<String>,
    /// More headers. One that the handshake has anyway is replaced.
    pub headers: Vec<(String, String)>,
    /// The address to connect from.
    pub local_address: Option<IpAddr>,
    /// The largest message taken from the server.
    pub message_bytes_max: usize,
    /// How long opening may take: name, TCP and handshake together.
    pub connect_timeout: Duration,
}

/// A token and where it is put.
#[derive(Clone, PartialEq, Eq)]
pub struct AuthToken {
    /// The token itself.
    pub token: String,
    /// Where it is put.
    pub location: TokenLocation,
}

/// Where a token is put.
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

/// Why no connection came to be.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The URL is none of `ws://`. TLS is left to a proxy.
    #[error("`{url}` is no URL of the form ws://host[:port]/path")]
    InvalidUrl {
        /// The URL.
        url: String,
    },
    /// A header, cookie or subprotocol holds what HTTP does not allow.
    #[error("`{name}` holds what a header may not")]
    InvalidHeader {
        /// The header.
        name: String,
    },
    /// The server answered, but not with 101.
    #[error("HTTP {status}: {body}")]
    Http {
        /// The HTTP status.
        status: u16,
        /// `Retry-After`, where it is a number of seconds.
        retry_after: Option<Duration>,
        /// As much of the body as came with the head.
        body: String,
    },
    /// The server answered 101 and chose none of the subprotocols that were offered.
    #[error("the server chose none of the subprotocols offered")]
    NoSubprotocol,
    /// The server answered with something that is no WebSocket handshake.
    #[error("handshake: {0}")]
    Handshake(#[source] Box<tungstenite::Error>),
    /// The network failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It took longer than [`ConnectOptions::connect_timeout`].
    #[error("no handshake within {0:?}")]
    TimedOut(Duration),
}

impl ConnectOptions {
    /// Options for `url`, offering `chat.v1`, as nobody in particular.
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
            local_address: None,
            message_bytes_max: 64 * 1024 * 1024,
            connect_timeout: CONNECT_TIMEOUT,
        }
    }

    /// The same as `user`.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// The same with a token.
    pub fn token(mut self, token: impl Into<String>, placement: TokenLocation) -> Self {
        self.token = Some(AuthToken { token: token.into(), location: placement });
        self
    }

    pub(super) fn uri(&self) -> Result<Uri, ConnectError> {
        let bad = || ConnectError::InvalidUrl { url: self.url.clone() };
        let mut url = self.url.clone();
        let mut add = |name: &str, value: &str| {
            url.push(if url.contains('?') { '&' } else { '?' });
            url.push_str(&percent_encode(name));
            url.push('=');
            url.push_str(&percent_encode(value));
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
        if uri.scheme_str() != Some("ws") || uri.host().is_none() {
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
                    fixed.push((header::AUTHORIZATION, format!("Bearer {token}")))
                }
                TokenLocation::Cookie(name) => {
                    fixed.push((header::COOKIE, format!("{name}={token}")))
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

/// A header's value, where it is UTF-8.
pub(super) fn text_of(value: &HeaderValue) -> Option<&str> {
    std::str::from_utf8(value.as_bytes()).ok()
}

fn header_value(name: &str, value: &str) -> Result<HeaderValue, ConnectError> {
    HeaderValue::from_str(value).map_err(|_| ConnectError::InvalidHeader { name: name.to_owned() })
}

/// Encodes everything but the unreserved characters of RFC 3986.
fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(options: &ConnectOptions) -> Request {
        options.request(options.uri().unwrap()).unwrap()
    }

    #[test]
    fn the_query_is_added_and_encoded() {
        let mut options =
            ConnectOptions::new("ws://h:1/ws?a=b").user("x|y").token("t.t", TokenLocation::Query);
        options.name = Some("Ä b".to_owned());
        options.query = vec![("since".to_owned(), "e:1".to_owned())];
        let uri = options.uri().unwrap();
        let expected = "/ws?a=b&user=x%7Cy&name=%C3%84%20b&token=t.t&since=e%3A1";
        assert_eq!(uri.path_and_query().unwrap().as_str(), expected);
    }

    #[test]
    fn a_token_is_put_where_it_belongs_and_is_never_printed() {
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
    fn headers_of_the_handshake_can_be_replaced() {
        let mut options = ConnectOptions::new("ws://h:8080/ws");
        options.origin = Some("http://evil".to_owned());
        options.headers = vec![("Host".to_owned(), "other".to_owned())];
        let request = request(&options);
        assert_eq!(request.headers()["host"], "other");
        assert_eq!(request.headers()["origin"], "http://evil");
        assert_eq!(request.headers()["sec-websocket-version"], "13");
    }

    #[test]
    fn what_is_no_ws_url_is_refused() {
        for bad in ["", "h:1", "http://h/ws", "wss://h/ws", "ws:///ws", "ws://h/a b"] {
            let opened = ConnectOptions::new(bad).uri();
            assert!(matches!(opened, Err(ConnectError::InvalidUrl { .. })), "{bad:?}: {opened:?}");
        }
    }
}
