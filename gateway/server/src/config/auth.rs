//! Options of the identification of users and of the server API.

use std::str::FromStr;

use humantime::Duration;
use skein_core::session::auth::{Auth, JwtOptions};

use super::{
    reader::{OptionReader, options},
    values::{Bounds, CommaList},
};
use crate::http::{ROUTE_COOKIE, api::ApiKeys};

/// Shortest key that HS256 allows (RFC 7518, section 3.2).
const JWT_SECRET_BYTES_MIN: usize = 32;

/// How users are identified.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum AuthMode {
    /// By the name that they choose.
    Anonymous,
    /// By a token.
    Jwt,
}

options! {
    /// Identification of users.
    AuthSection in "auth" {
        /// How users are identified: `anonymous` (clients choose their own name) or `jwt` (by a
        /// token).
        mode: AuthMode = "anonymous", one_of &[
            ("anonymous", AuthMode::Anonymous), ("jwt", AuthMode::Jwt),
        ];
        /// Whether a cluster may run in `anonymous` mode. No effect in `jwt` mode.
        allow_anonymous: bool = "false";
        /// Key that signs tokens (HS256), at least 32 bytes. Required in `jwt` mode.
        jwt_secret: String = "", secret;
        /// Tolerated difference of clocks: a token is valid for this long after its `exp` and
        /// before its `nbf`. At most 1h.
        leeway: Duration = "5s", within Bounds::up_to_an_hour();
        /// Accepted audiences: the `aud` of a token must name one of them. Empty: a token with an
        /// `aud` is rejected.
        audience: CommaList<String> = "";
        /// Accepted issuers: the `iss` of a token must be one of them. Empty: any.
        issuer: CommaList<String> = "";
        /// Name of the cookie that may carry a token.
        cookie: CookieName = "token";
    }
}

options! {
    /// The server API.
    ApiSection in "api" {
        /// Keys of the server API with the names that the log shows for them, as
        /// `web:<key>,ops:<key>`; at least 16 characters each. Empty: the server API is disabled.
        keys: CommaList<NamedKey> = "", secret;
        /// Whether `/api/docs` and `/api/openapi.json` are served, without a key.
        docs: bool = "true";
    }
}

impl AuthSection {
    /// Whether any client can impersonate any user of the cluster.
    pub(super) fn is_open(&self, is_cluster: bool) -> bool {
        self.mode == AuthMode::Anonymous && is_cluster
    }

    /// Checks the options together.
    pub(super) fn check(&self, is_cluster: bool, reader: &mut OptionReader) {
        let (is_jwt, bytes) = (self.mode == AuthMode::Jwt, self.jwt_secret.len());
        if is_jwt && bytes < JWT_SECRET_BYTES_MIN {
            reader.error(
                "auth.jwt_secret",
                format!(
                    "is {bytes} bytes long; auth.mode = jwt requires at least \
                     {JWT_SECRET_BYTES_MIN} (RFC 7518, section 3.2): create one with \
                     `openssl rand -base64 48`"
                ),
            );
        }
        if !is_jwt && bytes > 0 {
            reader.error(
                "auth.jwt_secret",
                "has no effect with auth.mode = anonymous, which admits everyone: set auth.mode = \
                 jwt, or remove the secret",
            );
        }
        if self.is_open(is_cluster) {
            if !self.allow_anonymous {
                reader.error(
                    "auth.mode",
                    "is `anonymous`, so that any client of the cluster can impersonate any user: \
                     set `jwt`, or, for a cluster that is open on purpose, set \
                     auth.allow_anonymous = true",
                );
            }
            reader.warn(
                "ANONYMOUS MODE in a cluster: any client can read every room and impersonate any \
                 user; set auth.mode = jwt",
            );
        }
    }

    /// The identification of users.
    pub(super) fn auth(self) -> Auth {
        match self.mode {
            AuthMode::Anonymous => Auth::Anonymous,
            AuthMode::Jwt => Auth::jwt(JwtOptions {
                secret: self.jwt_secret,
                leeway: *self.leeway,
                audience: self.audience.0,
                issuer: self.issuer.0,
            }),
        }
    }
}

impl ApiSection {
    /// Checks that every key has one name.
    pub(super) fn check(&self, reader: &mut OptionReader) {
        let keys: Vec<&str> = self.keys.0.iter().map(|NamedKey(_, key)| key.as_str()).collect();
        if keys.iter().enumerate().any(|(at, key)| keys[..at].contains(key)) {
            reader.error(
                "api.keys",
                "contains a key twice, so that the log cannot tell which application used it: use \
                 different keys",
            );
        }
    }

    /// The keys of the server API.
    pub(super) fn keys(self) -> ApiKeys {
        let keys = self.keys.0.into_iter().map(|NamedKey(name, key)| (name, key));
        ApiKeys::new(keys, self.docs)
    }
}

/// API key with its name: `<name>:<key>`.
pub(super) struct NamedKey(String, String);

impl FromStr for NamedKey {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, key) = text.split_once(':').ok_or("a key is <name>:<key>")?;
        if name.is_empty() || key.len() < 16 {
            return Err("a key is <name>:<key>, with a key of 16 characters or more");
        }
        if !key.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
            return Err(
                "a key must consist of printable ASCII characters, since clients send it in a header",
            );
        }
        Ok(Self(name.to_owned(), key.to_owned()))
    }
}

/// Name of a cookie (RFC 6265, section 4.1.1: a token of RFC 9110, section 5.6.2).
pub(super) struct CookieName(pub(super) String);

impl FromStr for CookieName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_token =
            |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if text.is_empty() || !text.bytes().all(is_token) {
            return Err("a cookie name consists of letters, digits and !#$%&'*+-.^_`|~");
        }
        if text == ROUTE_COOKIE {
            return Err("this name is reserved: nginx finds the node of a client by this cookie");
        }
        Ok(Self(text.to_owned()))
    }
}
