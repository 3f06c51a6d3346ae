//! Authentication: identifies a client by a token or, in anonymous mode, by its own claims.
//!
//! The checks of a token take the time as an argument and have no side effects except a log line.
//! An authentication error is the reason of a close frame, sent after the handshake, because a
//! browser cannot read the status of a rejected handshake.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, TokenData, Validation, errors::ErrorKind,
};
use rand::{RngExt as _, distr::Alphanumeric};
use secrecy::{ExposeSecret as _, SecretString};
use skein_protocol::{
    error::ErrorCode,
    ids::{DisplayName, RoomId, UserId},
    protocol::server_frame::UserInfo,
    token::{Claims, RoomAccess, RoomGrants},
};

use crate::telemetry::log_limiter::LogLimiter;

/// Limits the log line about tokens with a pattern that matches no room.
static UNMATCHABLE: LogLimiter = LogLimiter::new();

/// The authentication of clients.
#[derive(Clone)]
pub enum Auth {
    /// By the user id that the client states.
    Anonymous,
    /// By a JSON Web Token signed with HMAC-SHA256 (RFC 7519; RFC 7518, section 3.2).
    Jwt(Arc<JwtKeys>),
}

/// A key, shared with issuers of tokens.
#[derive(Clone, Debug)]
pub struct JwtSecret {
    /// The name that people see.
    pub name: String,
    /// The `kid` of tokens that are signed with this key; if absent, it may be any.
    pub kid: Option<String>,
    /// The key.
    pub secret: SecretString,
}

/// Options of token checks.
#[derive(Clone, Debug, Default)]
pub struct JwtOptions {
    /// The keys in the order in which a token is checked with them. Tokens are signed with the
    /// first.
    pub secrets: Vec<JwtSecret>,
    /// The allowed difference between the clocks of this node and of a token's issuer: a token is
    /// valid for this time after its `exp` and before its `nbf`.
    pub leeway: Duration,
    /// The names in `aud` that this gateway accepts. If empty, a token with an `aud` is meant for
    /// another audience and is rejected.
    pub audience: Vec<String>,
    /// The accepted issuers; if empty, any.
    pub issuer: Vec<String>,
}

/// The keys and the options of token checks.
pub struct JwtKeys {
    /// In the order of the options.
    keys: Vec<DecodingKey>,
    /// Checks the algorithm and the signature; the claims are checked in this module.
    validation: Validation,
    options: JwtOptions,
}

/// An authenticated client and its access rights.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The user.
    pub user: UserInfo,
    /// The `exp` of its token.
    pub expires_at: Option<SystemTime>,
    /// The time for which the token is valid beyond that.
    leeway: Duration,
    grants: Option<RoomGrants>,
}

/// The credentials of a handshake.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// The token from the first source that has one.
    pub token: Option<String>,
    /// `?user=`
    pub user: Option<String>,
    /// `?name=`
    pub name: Option<String>,
}

/// The reason why a client is rejected; its text is the close reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No token.
    #[error("token_missing")]
    TokenMissing,
    /// The token has a wrong signature or audience, is not valid yet, or is malformed. The text
    /// names the fault, for the log and for an `error` frame.
    #[error("token_invalid")]
    TokenInvalid(&'static str),
    /// The token has expired.
    #[error("token_expired")]
    TokenExpired,
    /// The user id or name is invalid.
    #[error("user_invalid")]
    UserInvalid,
}

impl Auth {
    /// Authentication by tokens.
    pub fn jwt(options: JwtOptions) -> Self {
        // The algorithm is pinned here and never taken from the token.
        let mut validation = Validation::new(Algorithm::HS256);
        validation.validate_exp = false;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        let key =
            |secret: &JwtSecret| DecodingKey::from_secret(secret.secret.expose_secret().as_bytes());
        let keys = options.secrets.iter().map(key).collect();
        Self::Jwt(Arc::new(JwtKeys { keys, validation, options }))
    }

    /// Identifies a client by its credentials.
    ///
    /// # Errors
    ///
    /// [`AuthError`], whose text is the close reason.
    pub fn identify(&self, credentials: &Credentials) -> Result<Identity, AuthError> {
        match self {
            Self::Anonymous => anonymous(credentials),
            Self::Jwt(key) => key.identify(credentials.token.as_deref(), SystemTime::now()),
        }
    }
}

impl Auth {
    /// Identifies a client by a new token, for `refresh`.
    ///
    /// # Errors
    ///
    /// The code and the text of the `error` frame.
    pub fn identify_again(&self, token: &str) -> Result<Identity, (ErrorCode, &'static str)> {
        match self {
            Self::Anonymous => Err((ErrorCode::BadRequest, "this gateway does not use tokens")),
            Self::Jwt(key) => {
                key.identify(Some(token), SystemTime::now()).map_err(|error| match error {
                    AuthError::TokenExpired => (ErrorCode::Unauthorized, "the token has expired"),
                    AuthError::TokenInvalid(why) => (ErrorCode::Unauthorized, why),
                    _ => (ErrorCode::Unauthorized, "invalid token"),
                })
            }
        }
    }
}

/// The reason why a token cannot be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// No key has this `kid`.
    #[error("no secret has the kid `{0}`")]
    UnknownKid(String),
    /// There is no key.
    #[error("no secret is configured")]
    NoSecret,
    /// The claims are too large, or cannot be written as JSON.
    #[error("the token cannot be signed: {0}")]
    Failed(#[from] jsonwebtoken::errors::Error),
}

impl JwtKeys {
    /// The options.
    pub fn options(&self) -> &JwtOptions {
        &self.options
    }

    /// Signs a token with the key named by `kid`, or with the first.
    ///
    /// # Errors
    ///
    /// [`SignError`].
    pub fn sign(&self, claims: &Claims, kid: Option<&str>) -> Result<String, SignError> {
        let mut secrets = self.options.secrets.iter();
        let JwtSecret { kid, secret, .. } = match kid {
            None => secrets.next().ok_or(SignError::NoSecret)?,
            Some(kid) => secrets
                .find(|secret| secret.kid.as_deref() == Some(kid))
                .ok_or_else(|| SignError::UnknownKid(kid.to_owned()))?,
        };
        let header = Header { kid: kid.clone(), ..Header::default() };
        let key = EncodingKey::from_secret(secret.expose_secret().as_bytes());
        Ok(jsonwebtoken::encode(&header, claims, &key)?)
    }

    /// Decodes a token whose signature matches a key.
    ///
    /// A token with the `kid` of a key is checked with that key alone. One with another `kid` is
    /// checked with the keys that have none, one without a `kid` with all keys.
    fn decode(&self, token: &str) -> Result<TokenData<Claims>, AuthError> {
        let secrets = &self.options.secrets;
        let has_kid = |secret: &JwtSecret, kid: &str| secret.kid.as_deref() == Some(kid);
        let kid = match secrets.iter().any(|secret| secret.kid.is_some()) {
            true => jsonwebtoken::decode_header(token).ok().and_then(|header| header.kid),
            false => None,
        };
        let is_known =
            kid.as_ref().is_some_and(|kid| secrets.iter().any(|secret| has_kid(secret, kid)));
        let is_candidate = |secret: &JwtSecret| match &kid {
            None => true,
            Some(kid) if is_known => has_kid(secret, kid),
            Some(_) => secret.kid.is_none(),
        };
        let candidates = secrets.iter().zip(&self.keys).filter(|(secret, _)| is_candidate(secret));
        let mut fault = "invalid token: no key of auth.jwt_secrets has its `kid`";
        for (_, key) in candidates {
            match jsonwebtoken::decode::<Claims>(token, key, &self.validation) {
                Ok(decoded) => return Ok(decoded),
                Err(error) => {
                    fault = why(&error);
                    if !matches!(error.kind(), ErrorKind::InvalidSignature) {
                        break;
                    }
                }
            }
        }
        Err(AuthError::TokenInvalid(fault))
    }

    fn identify(&self, token: Option<&str>, now: SystemTime) -> Result<Identity, AuthError> {
        use AuthError::{TokenExpired, TokenInvalid, TokenMissing};
        let token = token.ok_or(TokenMissing)?;
        let decoded = self.decode(token)?;
        // RFC 7515, section 4.1.11: extensions that a receiver must understand. This one
        // understands none beyond the standard.
        if decoded.header.crit.is_some() {
            return Err(TokenInvalid("invalid token: unsupported `crit` in its header"));
        }
        let claims = decoded.claims;
        let leeway = self.options.leeway;
        let time = |seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
        // A token that ends beyond the range of the clock does not end.
        let expires_at = time(claims.exp);
        let ends_at = expires_at.and_then(|at| at.checked_add(leeway));
        if ends_at.is_some_and(|end| now >= end) {
            return Err(TokenExpired);
        }
        if let Some(nbf) = claims.nbf
            && time(nbf).is_none_or(|begin| now.checked_add(leeway).is_some_and(|now| now < begin))
        {
            return Err(TokenInvalid("invalid token: its `nbf` is in the future"));
        }
        let JwtOptions { issuer, audience, .. } = &self.options;
        if !issuer.is_empty() && !claims.iss.is_some_and(|iss| issuer.contains(&iss)) {
            return Err(TokenInvalid("invalid token: its `iss` is not in auth.issuer"));
        }
        let is_for_us = match &claims.aud {
            None => audience.is_empty(),
            Some(named) => audience.iter().any(|own| named.contains(own)),
        };
        if !is_for_us {
            return Err(TokenInvalid("invalid token: its `aud` is not in auth.audience"));
        }
        if let Some(pattern) = claims.rooms.as_ref().and_then(RoomGrants::invalid_pattern) {
            // Ignoring the pattern could grant more than intended: a longer pattern may revoke
            // access.
            if let Some(suppressed) = UNMATCHABLE.should_log() {
                tracing::warn!(
                    pattern,
                    suppressed,
                    "token rejected: its `rooms` has a pattern that matches no room. A pattern is \
                     a room name, or a prefix followed by `*`"
                );
            }
            return Err(TokenInvalid(
                "invalid token: its `rooms` has a pattern that matches no room",
            ));
        }
        let id =
            user(&claims.sub).ok_or(TokenInvalid("invalid token: its `sub` is not a user id"))?;
        // The user did not choose the token's `name`, and must not be locked out because of it.
        let name = claims.name.as_deref().and_then(DisplayName::sanitized);
        let name = name.unwrap_or_else(|| DisplayName::from(&id));
        Ok(Identity { user: UserInfo { id, name }, expires_at, leeway, grants: claims.rooms })
    }
}

/// The fault of a token that could not be decoded.
fn why(error: &jsonwebtoken::errors::Error) -> &'static str {
    match error.kind() {
        ErrorKind::InvalidSignature => "invalid token: its signature does not match the key",
        ErrorKind::InvalidAlgorithm => "invalid token: its `alg` is not HS256",
        ErrorKind::Json(_) => "invalid token: a claim is missing or has a wrong type",
        _ => "invalid token",
    }
}

impl Identity {
    /// The time until which the user may stay connected.
    pub fn ends_at(&self) -> Option<SystemTime> {
        self.expires_at?.checked_add(self.leeway)
    }

    /// The user's access to `room`.
    pub fn access(&self, room: &RoomId) -> Option<RoomAccess> {
        match &self.grants {
            None => Some(RoomAccess::ReadWrite),
            Some(grants) => grants.access(room),
        }
    }
}

fn anonymous(credentials: &Credentials) -> Result<Identity, AuthError> {
    let id = match &credentials.user {
        Some(id) => user(id).ok_or(AuthError::UserInvalid)?,
        None => guest(),
    };
    let name = match credentials.name.as_deref() {
        Some(name) if !name.is_empty() => name.parse().map_err(|_| AuthError::UserInvalid)?,
        _ => DisplayName::from(&id),
    };
    let user = UserInfo { id, name };
    Ok(Identity { user, expires_at: None, leeway: Duration::ZERO, grants: None })
}

/// A user id that clients may use.
fn user(id: &str) -> Option<UserId> {
    id.parse().ok().filter(|id: &UserId| !id.is_reserved())
}

fn guest() -> UserId {
    let letters: String = rand::rng()
        .sample_iter(Alphanumeric)
        .take(6)
        .map(|letter| char::from(letter).to_ascii_lowercase())
        .collect();
    format!("guest-{letters}").parse().expect("a user id")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SECRET: &str = "a secret of at least thirty-two bytes";

    /// The current time of these tests.
    const NOW: u64 = 1_800_000_000;

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(NOW)
    }

    fn sign(claims: &serde_json::Value, secret: &str) -> Credentials {
        let key = EncodingKey::from_secret(secret.as_bytes());
        let token = jsonwebtoken::encode(&Header::default(), claims, &key).unwrap();
        Credentials { token: Some(token), ..Credentials::default() }
    }

    fn secret(kid: Option<&str>, secret: &str) -> JwtSecret {
        JwtSecret { name: "test".to_owned(), kid: kid.map(str::to_owned), secret: secret.into() }
    }

    fn key(options: JwtOptions) -> Arc<JwtKeys> {
        let secrets = match options.secrets.is_empty() {
            true => vec![secret(None, SECRET)],
            false => options.secrets,
        };
        match Auth::jwt(JwtOptions { secrets, ..options }) {
            Auth::Jwt(key) => key,
            Auth::Anonymous => unreachable!(),
        }
    }

    #[track_caller]
    fn check(options: &JwtOptions, claims: serde_json::Value, expected: Result<&str, &str>) {
        let identity = key(options.clone()).identify(sign(&claims, SECRET).token.as_deref(), now());
        let id = identity.as_ref().map(|identity| identity.user.id.as_str());
        assert_eq!(id.map_err(ToString::to_string), expected.map_err(str::to_owned), "{claims}");
    }

    #[test]
    fn token_identifies_the_user_until_it_expires() {
        let strict = JwtOptions::default();
        let five = JwtOptions { leeway: Duration::from_secs(5), ..JwtOptions::default() };
        check(&strict, json!({"sub": "ann", "exp": NOW + 60}), Ok("ann"));
        check(&strict, json!({"sub": "ann", "exp": NOW + 1}), Ok("ann"));
        // RFC 7519, section 4.1.4: not at its end, nor after.
        check(&strict, json!({"sub": "ann", "exp": NOW}), Err("token_expired"));
        check(&five, json!({"sub": "ann", "exp": NOW - 4}), Ok("ann"));
        check(&five, json!({"sub": "ann", "exp": NOW - 5}), Err("token_expired"));
        // In milliseconds by mistake, and with a fraction.
        check(&strict, json!({"sub": "ann", "exp": (NOW + 60) * 1000}), Ok("ann"));
        check(&five, json!({"sub": "ann", "exp": u64::MAX}), Ok("ann"));
        check(&strict, json!({"sub": "ann", "exp": NOW as f64 + 60.5}), Ok("ann"));
        for claims in [
            json!({"sub": "ann"}),
            json!({"exp": NOW + 60}),
            json!({"sub": "ann", "exp": "tomorrow"}),
            json!({"sub": "ann", "exp": null}),
            json!({"sub": "_ann", "exp": NOW + 60}),
            json!({"sub": "a b", "exp": NOW + 60}),
            json!({"sub": 7, "exp": NOW + 60}),
            json!({"sub": "..", "exp": NOW + 60}),
            json!({"sub": "ann", "exp": NOW + 60, "rooms": {"a": "w"}}),
            json!({"sub": "ann", "exp": NOW + 60, "rooms": {"a*b": "r", "*": "rw"}}),
        ] {
            check(&strict, claims, Err("token_invalid"));
        }
    }

    #[test]
    fn token_is_checked_with_the_key_of_its_kid_or_with_each() {
        let [old, new, plain] = ["old key", "new key", "plain key"].map(|key| key.repeat(5));
        let keys = key(JwtOptions {
            secrets: vec![
                secret(Some("old"), &old),
                secret(Some("new"), &new),
                secret(None, &plain),
            ],
            ..JwtOptions::default()
        });
        let identified = |kid: Option<&str>, key: &str| {
            let header = Header { kid: kid.map(str::to_owned), ..Header::default() };
            let claims = json!({"sub": "ann", "exp": NOW + 60});
            let key = EncodingKey::from_secret(key.as_bytes());
            let token = jsonwebtoken::encode(&header, &claims, &key).unwrap();
            keys.identify(Some(&token), now()).map(|identity| identity.user.id.to_string())
        };
        let mismatch =
            Err(AuthError::TokenInvalid("invalid token: its signature does not match the key"));
        for key in [&old, &new, &plain] {
            assert!(identified(None, key).is_ok(), "without a kid: {key}");
        }
        for (kid, key, expected) in [
            ("old", &old, true),
            ("new", &new, true),
            ("old", &new, false),
            ("new", &plain, false),
            // Another issuer may name its key as it likes.
            ("other", &plain, true),
            ("other", &old, false),
        ] {
            match identified(Some(kid), key) {
                Ok(_) => assert!(expected, "{kid} {key}"),
                error => assert!(!expected && error == mismatch, "{kid} {key}: {error:?}"),
            }
        }
        assert_eq!(identified(None, "another key"), mismatch);
        let only_named =
            key(JwtOptions { secrets: vec![secret(Some("a"), &old)], ..JwtOptions::default() });
        let header = Header { kid: Some("b".to_owned()), ..Header::default() };
        let claims = json!({"sub": "ann", "exp": NOW + 60});
        let token = jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(b"x"));
        let error = only_named.identify(Some(&token.unwrap()), now()).unwrap_err();
        assert!(matches!(error, AuthError::TokenInvalid(text) if text.contains("`kid`")));
    }

    #[test]
    fn token_is_signed_with_the_first_key_or_a_named_one() {
        let keys = key(JwtOptions {
            secrets: vec![secret(None, SECRET), secret(Some("b"), "another secret of this test")],
            ..JwtOptions::default()
        });
        let claims = Claims { sub: "ann".to_owned(), exp: NOW + 60, ..Claims::default() };
        for (kid, expected) in [(None, None), (Some("b"), Some("b"))] {
            let token = keys.sign(&claims, kid).unwrap();
            let header = jsonwebtoken::decode_header(&token).unwrap();
            assert_eq!(header.kid.as_deref(), expected);
            assert!(keys.identify(Some(&token), now()).is_ok());
        }
        assert!(matches!(keys.sign(&claims, Some("c")), Err(SignError::UnknownKid(_))));
        let shown = format!("{:?}", keys.options());
        assert!(!shown.contains("secret of"), "{shown}");
    }

    #[test]
    fn name_in_a_token_is_sanitized_and_never_rejected() {
        let key = key(JwtOptions::default());
        let longest = "x".repeat(64);
        for (name, expected) in [
            (json!("Ann Example"), "Ann Example"),
            (json!("x".repeat(500)), &*longest),
            (json!("\u{202E}nnA\0"), "nnA"),
            (json!("\u{200B} "), "ann"),
            (json!(""), "ann"),
            (json!(null), "ann"),
            (json!({"first": "Ann"}), "ann"),
        ] {
            let claims = json!({"sub": "ann", "exp": NOW + 60, "name": name});
            let identity = key.identify(sign(&claims, SECRET).token.as_deref(), now());
            assert_eq!(identity.unwrap().user.name.as_str(), expected, "{claims}");
        }
    }

    #[test]
    fn token_is_valid_from_its_nbf_on() {
        let strict = JwtOptions::default();
        let five = JwtOptions { leeway: Duration::from_secs(5), ..JwtOptions::default() };
        let token = |nbf| json!({"sub": "ann", "exp": NOW + 3600, "nbf": nbf});
        check(&strict, token(json!(NOW)), Ok("ann"));
        check(&strict, token(json!(NOW + 1)), Err("token_invalid"));
        check(&strict, token(json!(NOW as f64 + 0.5)), Err("token_invalid"));
        check(&five, token(json!(NOW + 5)), Ok("ann"));
        check(&five, token(json!(NOW + 6)), Err("token_invalid"));
        check(&five, token(json!(u64::MAX)), Err("token_invalid"));
        let endless = JwtOptions { leeway: Duration::MAX, ..JwtOptions::default() };
        check(&endless, token(json!(NOW + 60)), Ok("ann"));
        check(&strict, token(json!(-1)), Ok("ann"));
        check(&strict, token(json!(null)), Ok("ann"));
        check(&strict, token(json!("now")), Err("token_invalid"));
        // Issued in the future by another clock: RFC 7519 has no rule against it.
        check(&strict, json!({"sub": "ann", "exp": NOW + 60, "iat": NOW + 99}), Ok("ann"));
        let iat = json!({"sub": "ann", "exp": NOW + 60, "iat": "now"});
        check(&strict, iat, Err("token_invalid"));
    }

    #[test]
    fn token_of_another_audience_or_issuer_is_rejected() {
        let token = |aud, iss| json!({"sub": "ann", "exp": NOW + 60, "aud": aud, "iss": iss});
        let (none, any) = (json!(null), JwtOptions::default());
        check(&any, token(none.clone(), json!("x")), Ok("ann"));
        // RFC 7519, section 4.1.3: a principal that is not named must reject the token.
        for aud in [json!("skein"), json!(["skein"]), json!([]), json!(""), json!(7)] {
            check(&any, token(aud, none.clone()), Err("token_invalid"));
        }
        let own = vec!["skein".to_owned(), "https://gw.example".to_owned()];
        let named = JwtOptions { audience: own, ..JwtOptions::default() };
        for aud in [json!("skein"), json!(["x", "https://gw.example"])] {
            check(&named, token(aud, none.clone()), Ok("ann"));
        }
        for aud in [none.clone(), json!("Skein"), json!(["x"]), json!([]), json!([["skein"]])] {
            check(&named, token(aud, none.clone()), Err("token_invalid"));
        }
        let issued = JwtOptions { issuer: vec!["https://id.example".into()], ..any };
        check(&issued, token(none.clone(), json!("https://id.example")), Ok("ann"));
        for iss in [json!(null), json!("https://id.example/"), json!(["https://id.example"])] {
            check(&issued, token(none.clone(), iss), Err("token_invalid"));
        }
    }

    #[test]
    fn wrong_key_wrong_algorithm_and_missing_token_are_rejected() {
        let key = key(JwtOptions::default());
        let claims = json!({"sub": "ann", "exp": NOW + 60});
        let refused = |token: Option<&str>| {
            key.identify(token, now()).map(|_| ()).map_err(|error| error.to_string())
        };
        let other = sign(&claims, "another secret").token;
        assert_eq!(refused(other.as_deref()), Err("token_invalid".to_owned()));
        assert_eq!(refused(None), Err("token_missing".to_owned()));
        // {"alg":"none"} . {"sub":"ann","exp":99999999999} .
        let none = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbm4iLCJleHAiOjk5OTk5OTk5OTk5fQ.";
        assert_eq!(refused(Some(none)), Err("token_invalid".to_owned()));
        // An extension that must be understood, and is not (RFC 7515, section 4.1.11).
        let secret = EncodingKey::from_secret(SECRET.as_bytes());
        for crit in [vec!["b64".to_owned()], vec![]] {
            let header = Header { crit: Some(crit), ..Default::default() };
            let token = jsonwebtoken::encode(&header, &claims, &secret).unwrap();
            assert_eq!(refused(Some(&token)), Err("token_invalid".to_owned()));
        }
    }

    #[test]
    fn anonymous_users_have_the_stated_id_or_a_guest_id() {
        let identify = |user: Option<&str>, name: Option<&str>| {
            let credentials =
                Credentials { user: user.map(Into::into), name: name.map(Into::into), token: None };
            Auth::Anonymous.identify(&credentials).map(|identity| identity.user)
        };
        let ann = identify(Some("ann"), Some("Ann ä")).unwrap();
        assert_eq!((ann.id.as_str(), ann.name.as_str()), ("ann", "Ann ä"));
        let guest = identify(None, None).unwrap();
        assert!(guest.id.as_str().starts_with("guest-") && guest.id.as_str().len() == 12);
        for bad in ["", "a b", "_api", "ä", "."] {
            assert_eq!(identify(Some(bad), None), Err(AuthError::UserInvalid), "{bad:?}");
        }
        for bad in [" ", "\u{200B}", "A\u{202E}nn", &"x".repeat(65)] {
            assert_eq!(identify(None, Some(bad)), Err(AuthError::UserInvalid), "{bad:?}");
        }
        let long = "x".repeat(128);
        assert_eq!(identify(Some(&long), None).unwrap().name.as_str().len(), 64);
    }
}
