//! Options of the identification of users and of the server API.

use std::{collections::BTreeSet, str::FromStr};

use humantime::Duration;
use skein_core::session::auth::{Auth, JwtOptions, JwtSecret};

use super::{
    reader::{OptionReader, options},
    secrets::SecretKind,
    values::{Bounds, CommaList},
};
use crate::http::{ROUTE_COOKIE, api::ApiKeys};

/// Shortest key that HS256 allows (RFC 7518, section 3.2).
const JWT_SECRET_BYTES_MIN: usize = 32;
/// Most secrets that a token may be checked with: each may cost a signature.
const JWT_SECRETS_MAX: usize = 16;

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
        /// Key that signs tokens (HS256), at least 32 bytes. `jwt` mode requires it or
        /// `auth.jwt_secrets`.
        jwt_secret: String = "", secret SecretKind::Text;
        /// Further keys that sign tokens, at most 16, each as `<kid>:<key>` or `<key>`. A token with
        /// a `kid` in its header is checked with the key of that name; others are checked with
        /// `auth.jwt_secret` and then with each key in order. `gateway token` signs with the first.
        jwt_secrets: CommaList<JwtSecretEntry> = "", secret SecretKind::JwtSecrets;
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
        keys: CommaList<NamedKey> = "", secret SecretKind::ApiKeys;
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
        let is_jwt = self.mode == AuthMode::Jwt;
        let (secret, list) = (&self.jwt_secret, &self.jwt_secrets.0);
        let (key, list_key) = ("auth.jwt_secret", "auth.jwt_secrets");
        let is_unreadable = reader.is_unreadable(key) || reader.is_unreadable(list_key);
        let advice = format!(
            "auth.mode = jwt requires at least {JWT_SECRET_BYTES_MIN} (RFC 7518, section 3.2): \
             create one with `openssl rand -base64 48`"
        );
        let is_short = |secret: &str| secret.len() < JWT_SECRET_BYTES_MIN;
        if is_jwt && is_short(secret) && !(secret.is_empty() && (is_unreadable || !list.is_empty()))
        {
            reader.error(key, format!("is {} bytes long; {advice}", secret.len()));
        }
        for (at, entry) in list.iter().enumerate().filter(|(_, entry)| is_short(&entry.secret)) {
            let bytes = entry.secret.len();
            reader.error(list_key, format!("entry {} is {bytes} bytes long; {advice}", at + 1));
        }
        if list.len() > JWT_SECRETS_MAX {
            reader.error(list_key, format!("has {} entries; at most 16", list.len()));
        }
        let mut kids = BTreeSet::new();
        for kid in list.iter().filter_map(|entry| entry.kid.as_ref()) {
            if !kids.insert(kid) {
                reader.error(list_key, format!("has two entries with the kid `{kid}`"));
            }
        }
        for (key, is_given) in [(key, !secret.is_empty()), (list_key, !list.is_empty())] {
            if !is_jwt && is_given {
                reader.error(
                    key,
                    "has no effect with auth.mode = anonymous, which admits everyone: set \
                     auth.mode = jwt, or remove the secret",
                );
            }
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
                secrets: secrets_of(self.jwt_secret, self.jwt_secrets.0),
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
        let keys: Vec<&str> = self.keys.0.iter().map(|NamedKey { key, .. }| key.as_str()).collect();
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
        let keys = self.keys.0.into_iter().map(|NamedKey { name, key }| (name, key));
        ApiKeys::new(keys, self.docs)
    }
}

/// The secrets in the order in which a token is checked with them, each with the name that people
/// see.
fn secrets_of(secret: String, list: Vec<JwtSecretEntry>) -> Vec<JwtSecret> {
    let first = (!secret.is_empty()).then(|| JwtSecret {
        name: "auth.jwt_secret".to_owned(),
        kid: None,
        secret: secret.into(),
    });
    let rest = list.into_iter().enumerate().map(|(at, JwtSecretEntry { kid, secret })| JwtSecret {
        name: kid.clone().unwrap_or_else(|| format!("entry {} of auth.jwt_secrets", at + 1)),
        kid,
        secret: secret.into(),
    });
    first.into_iter().chain(rest).collect()
}

/// Key that signs tokens, with or without a name: `<kid>:<key>` or `<key>`.
///
/// A text whose part before the first colon cannot be a `kid` is a key. `:<key>` is a key that
/// contains a colon behind what could be a `kid`.
pub(super) struct JwtSecretEntry {
    pub(super) kid: Option<String>,
    secret: String,
}

impl FromStr for JwtSecretEntry {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_kid = |kid: &str| {
            let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            kid.len() <= 64 && kid.bytes().all(is_part)
        };
        Ok(match text.split_once(':') {
            Some(("", secret)) => Self { kid: None, secret: secret.to_owned() },
            Some((kid, secret)) if is_kid(kid) => {
                Self { kid: Some(kid.to_owned()), secret: secret.to_owned() }
            }
            Some(_) | None => Self { kid: None, secret: text.to_owned() },
        })
    }
}

/// API key with its name: `<name>:<key>`.
pub(super) struct NamedKey {
    pub(super) name: String,
    key: String,
}

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
        Ok(Self { name: name.to_owned(), key: key.to_owned() })
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
