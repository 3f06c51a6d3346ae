//! Who a client is: a token, or in anonymous mode what it says of itself.
//!
//! Pure: the time is an argument. A refusal is a close reason of section 3.5, sent after the
//! handshake, because a browser cannot read the status of a refused one.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use rand::{RngExt as _, distr::Alphanumeric};
use skein_protocol::{
    error::ErrorCode,
    ids::{DisplayName, RoomId, UserId},
    protocol::server_frame::UserInfo,
    token::{Claims, RoomAccess, RoomGrants},
};

use crate::telemetry::log_limiter::LogLimiter;

/// The log line of tokens with a pattern that matches no room.
static UNMATCHABLE: LogLimiter = LogLimiter::new();

/// How clients are told apart.
#[derive(Clone)]
pub enum Auth {
    /// By what they say.
    Anonymous,
    /// By a JSON Web Token signed with HMAC-SHA256 (RFC 7519; RFC 7518, section 3.2).
    Jwt(Arc<JwtKey>),
}

/// How tokens are checked.
#[derive(Clone, Debug, Default)]
pub struct JwtOptions {
    /// The key, shared with those who make tokens.
    pub secret: String,
    /// How far this node's clock and that of a token's maker may differ: for so long a token counts
    /// after its `exp` and before its `nbf`.
    pub leeway: Duration,
    /// The names in `aud` that this gateway answers to. Where there are none, a token with an `aud`
    /// is for somebody else and is refused.
    pub audience: Vec<String>,
    /// The issuers that tokens are taken from; any, where there are none.
    pub issuer: Vec<String>,
}

/// What tokens are checked with.
pub struct JwtKey {
    key: DecodingKey,
    /// Checks the algorithm and the signature; the claims are checked here.
    validation: Validation,
    options: JwtOptions,
}

/// Who a client is and what is open to it.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The user.
    pub user: UserInfo,
    /// When its token expires, as the token says.
    pub expires_at: Option<SystemTime>,
    /// How long the token counts beyond that.
    leeway: Duration,
    grants: Option<RoomGrants>,
}

/// What a client says of itself in the handshake.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// The token from the first source that has one.
    pub token: Option<String>,
    /// `?user=`
    pub user: Option<String>,
    /// `?name=`
    pub name: Option<String>,
}

/// Why a client is not taken; the text is the close reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// There is no token.
    #[error("token_missing")]
    TokenMissing,
    /// The token is not signed with the key, not for this gateway, not valid yet, or malformed: the
    /// text says which, for the log and for an `error` frame.
    #[error("token_invalid")]
    TokenInvalid(&'static str),
    /// The token has ended.
    #[error("token_expired")]
    TokenExpired,
    /// The user id or name is none.
    #[error("user_invalid")]
    UserInvalid,
}

impl Auth {
    /// Tokens, checked as `options` say.
    pub fn jwt(options: JwtOptions) -> Self {
        // The algorithm is pinned here and never taken from the token.
        let mut validation = Validation::new(Algorithm::HS256);
        validation.validate_exp = false;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        let key = DecodingKey::from_secret(options.secret.as_bytes());
        Self::Jwt(Arc::new(JwtKey { key, validation, options }))
    }

    /// Who a client with these credentials is.
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
    /// Who a client is that brings another token.
    ///
    /// # Errors
    ///
    /// What the `error` says.
    pub fn identify_again(&self, token: &str) -> Result<Identity, (ErrorCode, &'static str)> {
        match self {
            Self::Anonymous => Err((ErrorCode::BadRequest, "this gateway takes no tokens")),
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

impl JwtKey {
    fn identify(&self, token: Option<&str>, now: SystemTime) -> Result<Identity, AuthError> {
        use AuthError::{TokenExpired, TokenInvalid, TokenMissing};
        let token = token.ok_or(TokenMissing)?;
        let decoded = jsonwebtoken::decode::<Claims>(token, &self.key, &self.validation);
        let decoded = decoded.map_err(|error| TokenInvalid(why(&error)))?;
        // RFC 7515, section 4.1.11: what a receiver has to understand. There is nothing beyond the
        // standard that this one does.
        if decoded.header.crit.is_some() {
            return Err(TokenInvalid("invalid token: its header has a `crit` not understood here"));
        }
        let claims = decoded.claims;
        let leeway = self.options.leeway;
        let time = |seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
        // A token that ends beyond what the clock holds does not end.
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
            return Err(TokenInvalid("invalid token: its `iss` is none of auth.issuer"));
        }
        let is_for_us = match &claims.aud {
            None => audience.is_empty(),
            Some(named) => audience.iter().any(|own| named.contains(own)),
        };
        if !is_for_us {
            return Err(TokenInvalid("invalid token: its `aud` names none of auth.audience"));
        }
        if let Some(pattern) = claims.rooms.as_ref().and_then(RoomGrants::invalid_pattern) {
            // Left out it could give more than was meant: a longer pattern may take away.
            if let Some(suppressed) = UNMATCHABLE.should_log() {
                tracing::warn!(
                    pattern,
                    suppressed,
                    "tokens are refused whose `rooms` has a pattern that matches no room: it is a \
                     name, or the beginning of one with `*` at its end"
                );
            }
            return Err(TokenInvalid(
                "invalid token: its `rooms` has a pattern that matches no room",
            ));
        }
        let id = user(&claims.sub).ok_or(TokenInvalid("invalid token: its `sub` is no user id"))?;
        // Who made the token is not the user, who must not be locked out for its name.
        let name = claims.name.as_deref().and_then(DisplayName::sanitized);
        let name = name.unwrap_or_else(|| DisplayName::from(&id));
        Ok(Identity { user: UserInfo { id, name }, expires_at, leeway, grants: claims.rooms })
    }
}

/// Which part of a token is wrong that could not be decoded.
fn why(error: &jsonwebtoken::errors::Error) -> &'static str {
    use jsonwebtoken::errors::ErrorKind;
    match error.kind() {
        ErrorKind::InvalidSignature => "invalid token: its signature is of another key",
        ErrorKind::InvalidAlgorithm => "invalid token: its `alg` is not HS256",
        ErrorKind::Json(_) => "invalid token: a claim is absent or of another type",
        _ => "invalid token",
    }
}

impl Identity {
    /// Until when the user may stay connected.
    pub fn ends_at(&self) -> Option<SystemTime> {
        self.expires_at?.checked_add(self.leeway)
    }

    /// What is open to the user in `room`.
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

/// A user id that a client may have.
fn user(id: &str) -> Option<UserId> {
    id.parse().ok().filter(|id: &UserId| !id.is_reserved())
}

fn guest() -> UserId {
    let letters: String = rand::rng()
        .sample_iter(Alphanumeric)
        .take(6)
        .map(|letter| char::from(letter).to_ascii_lowercase())
        .collect();
    format!("guest-{letters}").parse().expect("made of the allowed letters")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SECRET: &str = "a secret of at least thirty-two bytes";

    /// The present, for these tests.
    const NOW: u64 = 1_800_000_000;

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(NOW)
    }

    fn sign(claims: &serde_json::Value, secret: &str) -> Credentials {
        let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
        let token = jsonwebtoken::encode(&jsonwebtoken::Header::default(), claims, &key).unwrap();
        Credentials { token: Some(token), ..Credentials::default() }
    }

    fn key(options: JwtOptions) -> Arc<JwtKey> {
        match Auth::jwt(JwtOptions { secret: SECRET.to_owned(), ..options }) {
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
    fn a_token_names_the_user_until_it_ends() {
        let strict = JwtOptions::default();
        let five = JwtOptions { leeway: Duration::from_secs(5), ..JwtOptions::default() };
        check(&strict, json!({"sub": "ann", "exp": NOW + 60}), Ok("ann"));
        check(&strict, json!({"sub": "ann", "exp": NOW + 1}), Ok("ann"));
        // RFC 7519, section 4.1.4: not on its end, nor after.
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
    fn a_name_in_a_token_is_cleaned_and_locks_nobody_out() {
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
    fn a_token_counts_from_its_nbf_on() {
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
        // Made in the future by another clock: RFC 7519 has no rule against it.
        check(&strict, json!({"sub": "ann", "exp": NOW + 60, "iat": NOW + 99}), Ok("ann"));
        let iat = json!({"sub": "ann", "exp": NOW + 60, "iat": "now"});
        check(&strict, iat, Err("token_invalid"));
    }

    #[test]
    fn a_token_for_another_audience_or_of_another_issuer_is_refused() {
        let token = |aud, iss| json!({"sub": "ann", "exp": NOW + 60, "aud": aud, "iss": iss});
        let (none, any) = (json!(null), JwtOptions::default());
        check(&any, token(none.clone(), json!("x")), Ok("ann"));
        // RFC 7519, section 4.1.3: a principal that is not named has to refuse the token.
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
    fn another_key_another_algorithm_and_no_token_are_refused() {
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
        // An extension that has to be understood, and is not (RFC 7515, section 4.1.11).
        let secret = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
        for crit in [vec!["b64".to_owned()], vec![]] {
            let header = jsonwebtoken::Header { crit: Some(crit), ..Default::default() };
            let token = jsonwebtoken::encode(&header, &claims, &secret).unwrap();
            assert_eq!(refused(Some(&token)), Err("token_invalid".to_owned()));
        }
    }

    #[test]
    fn the_anonymous_are_who_they_say_or_guests() {
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
