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
use shared::{
    error::ErrorCode,
    ids::{DisplayName, RoomId, UserId},
    protocol::answer::Person,
    token::{Access, Claims, RoomGrants},
};

/// How clients are told apart.
#[derive(Clone)]
pub enum Auth {
    /// By what they say.
    Anonymous,
    /// By a JSON Web Token signed with HMAC-SHA256 (RFC 7519; RFC 7518, section 3.2).
    Jwt(Arc<JwtKey>),
}

/// What tokens are checked with.
pub struct JwtKey {
    key: DecodingKey,
    validation: Validation,
}

/// Who a client is and what is open to it.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The user.
    pub user: Person,
    /// When it ends.
    pub expires_at: Option<SystemTime>,
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
    /// The token is not signed by us, or says what cannot be.
    #[error("token_invalid")]
    TokenInvalid,
    /// The token has ended.
    #[error("token_expired")]
    TokenExpired,
    /// The user id or name is none.
    #[error("user_invalid")]
    UserInvalid,
}

impl Auth {
    /// Tokens signed with `secret`, valid up to `leeway` after their end.
    pub fn jwt(secret: &str, leeway: Duration) -> Self {
        // The algorithm is pinned here and never taken from the token.
        let mut validation = Validation::new(Algorithm::HS256);
        validation.leeway = leeway.as_secs();
        validation.validate_aud = false;
        validation.set_required_spec_claims(&["exp"]);
        let key = DecodingKey::from_secret(secret.as_bytes());
        Self::Jwt(Arc::new(JwtKey { key, validation }))
    }

    /// Who a client with these credentials is.
    ///
    /// # Errors
    ///
    /// [`AuthError`], whose text is the close reason.
    pub fn identify(&self, credentials: &Credentials) -> Result<Identity, AuthError> {
        match self {
            Self::Anonymous => anonymous(credentials),
            Self::Jwt(key) => key.identify(credentials.token.as_deref()),
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
            Self::Jwt(key) => key.identify(Some(token)).map_err(|error| match error {
                AuthError::TokenExpired => (ErrorCode::Unauthorized, "the token has ended"),
                _ => (ErrorCode::Unauthorized, "the token is not a good one"),
            }),
        }
    }
}

impl JwtKey {
    fn identify(&self, token: Option<&str>) -> Result<Identity, AuthError> {
        use jsonwebtoken::errors::ErrorKind;
        let token = token.ok_or(AuthError::TokenMissing)?;
        let claims = jsonwebtoken::decode::<Claims>(token, &self.key, &self.validation)
            .map_err(|error| match error.kind() {
                ErrorKind::ExpiredSignature => AuthError::TokenExpired,
                _ => AuthError::TokenInvalid,
            })?
            .claims;
        let invalid = |_| AuthError::TokenInvalid;
        let id = user(&claims.sub).ok_or(AuthError::TokenInvalid)?;
        let name = match claims.name {
            Some(name) => name.parse().map_err(invalid)?,
            None => DisplayName::from(&id),
        };
        let leeway = Duration::from_secs(self.validation.leeway);
        Ok(Identity {
            user: Person { id, name },
            // A token that ends beyond what the clock holds does not end.
            expires_at: UNIX_EPOCH
                .checked_add(Duration::from_secs(claims.exp).saturating_add(leeway)),
            grants: claims.rooms,
        })
    }
}

impl Identity {
    /// What is open to the user in `room`.
    pub fn access(&self, room: &RoomId) -> Option<Access> {
        match &self.grants {
            None => Some(Access::ReadWrite),
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
    Ok(Identity { user: Person { id, name }, expires_at: None, grants: None })
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
    use super::*;

    const SECRET: &str = "a secret of at least thirty-two bytes";

    fn now() -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
    }

    fn sign(claims: serde_json::Value, secret: &str) -> Credentials {
        let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
        let token = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap();
        Credentials { token: Some(token), ..Credentials::default() }
    }

    #[track_caller]
    fn check(claims: serde_json::Value, expected: Result<&str, AuthError>) {
        let auth = Auth::jwt(SECRET, Duration::ZERO);
        let identity = auth.identify(&sign(claims, SECRET));
        let id = identity.as_ref().map(|identity| identity.user.id.as_str());
        assert_eq!(id.map_err(|error| *error), expected);
    }

    #[test]
    fn a_token_names_the_user_until_it_ends() {
        check(serde_json::json!({"sub": "ann", "exp": now() + 60}), Ok("ann"));
        check(serde_json::json!({"sub": "ann", "exp": now() + 60, "aud": "x"}), Ok("ann"));
        check(serde_json::json!({"sub": "ann", "exp": now() - 1}), Err(AuthError::TokenExpired));
        // In milliseconds by mistake, and with a fraction.
        check(serde_json::json!({"sub": "ann", "exp": (now() + 60) * 1000}), Ok("ann"));
        check(serde_json::json!({"sub": "ann", "exp": u64::MAX}), Ok("ann"));
        check(serde_json::json!({"sub": "ann", "exp": now() as f64 + 60.5}), Ok("ann"));
        for claims in [
            serde_json::json!({"sub": "ann"}),
            serde_json::json!({"exp": now() + 60}),
            serde_json::json!({"sub": "_ann", "exp": now() + 60}),
            serde_json::json!({"sub": "a b", "exp": now() + 60}),
            serde_json::json!({"sub": "ann", "exp": now() + 60, "rooms": {"a": "w"}}),
            serde_json::json!({"sub": "ann", "exp": now() + 60, "name": "a\u{0}"}),
        ] {
            check(claims, Err(AuthError::TokenInvalid));
        }
    }

    #[test]
    fn another_key_another_algorithm_and_no_token_are_refused() {
        let auth = Auth::jwt(SECRET, Duration::ZERO);
        let claims = serde_json::json!({"sub": "ann", "exp": now() + 60});
        let refused = |credentials| auth.identify(&credentials).err();
        assert_eq!(refused(sign(claims, "another secret")), Some(AuthError::TokenInvalid));
        assert_eq!(refused(Credentials::default()), Some(AuthError::TokenMissing));
        // {"alg":"none"} . {"sub":"ann","exp":99999999999} .
        let none = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbm4iLCJleHAiOjk5OTk5OTk5OTk5fQ.";
        let none = Credentials { token: Some(none.into()), ..Credentials::default() };
        assert_eq!(refused(none), Some(AuthError::TokenInvalid));
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
        for bad in ["", "a b", "_api", "ä"] {
            assert_eq!(identify(Some(bad), None), Err(AuthError::UserInvalid), "{bad:?}");
        }
        let long = "x".repeat(128);
        assert_eq!(identify(Some(&long), None).unwrap().name.as_str().len(), 64);
    }
}
