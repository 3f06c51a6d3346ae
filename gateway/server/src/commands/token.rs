//! `gateway token`: a token for a user.

use std::{collections::BTreeMap, process::ExitCode, time::SystemTime};

use clap::Args;
use gateway::config::ConfigSources;
use skein_core::session::auth::{Auth, AuthError, Credentials, JwtKeys, JwtOptions};
use skein_protocol::token::{Audience, Claims, RoomAccess, RoomGrants, is_room_pattern};

use super::load;

/// Arguments of `token`.
#[derive(Args)]
pub(crate) struct TokenArguments {
    /// Id of the user.
    #[arg(long, value_name = "NAME")]
    sub: String,
    /// Name that others see. Without this argument it is the id.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Rooms that the token grants, such as `lobby=rw,news-*=r`; `r` is read, `rw` read and write,
    /// and `rw` if neither is given. May be repeated. Without this argument: every room.
    #[arg(long, value_name = "ROOM[=r|rw]", value_delimiter = ',', value_parser = parse_grant)]
    rooms: Vec<(String, RoomAccess)>,
    /// Lifetime of the token, such as `15m`, `12h`, `30d`.
    #[arg(long, value_name = "TIME", default_value = "1h")]
    ttl: humantime::Duration,
    /// Signs with the secret of this `kid` in `auth.jwt_secrets`. Without this argument: with the
    /// first secret.
    #[arg(long)]
    kid: Option<String>,
}

fn parse_grant(text: &str) -> Result<(String, RoomAccess), String> {
    let (room, access) = text.split_once('=').unwrap_or((text, "rw"));
    let access = match access {
        "r" => RoomAccess::Read,
        "rw" => RoomAccess::ReadWrite,
        _ => return Err("the access to a room is `r` or `rw`".to_owned()),
    };
    if !is_room_pattern(room) {
        return Err("neither the name of a room nor a prefix that ends in `*`".to_owned());
    }
    Ok((room.to_owned(), access))
}

/// Prints a token that this configuration accepts.
pub(crate) fn run(sources: ConfigSources, arguments: TokenArguments) -> ExitCode {
    let config = match load(sources) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let token = match &config.auth {
        Auth::Anonymous => Err("there is no secret to sign with: set auth.mode = jwt, and \
                                auth.jwt_secret or auth.jwt_secrets"
            .to_owned()),
        Auth::Jwt(keys) => sign(keys, arguments),
    };
    // A gateway checks more than the signature.
    let token = token.and_then(|token| {
        let credentials = Credentials { token: Some(token.clone()), ..Credentials::default() };
        match config.auth.identify(&credentials) {
            Ok(_) => Ok(token),
            Err(AuthError::TokenInvalid(why)) => Err(why.to_owned()),
            Err(error) => Err(format!("a gateway would reject the token: {error}")),
        }
    });
    match token {
        Ok(token) => {
            println!("{token}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("gateway: {error}");
            ExitCode::FAILURE
        }
    }
}

fn sign(keys: &JwtKeys, arguments: TokenArguments) -> Result<String, String> {
    let JwtOptions { audience, issuer, .. } = keys.options();
    let TokenArguments { sub, name, rooms, ttl, kid } = arguments;
    if ttl.as_secs() == 0 {
        return Err("--ttl must be at least 1s".to_owned());
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let rooms: BTreeMap<String, RoomAccess> = rooms.into_iter().collect();
    let claims = Claims {
        sub,
        name,
        exp: now.saturating_add(*ttl).as_secs(),
        nbf: None,
        iat: Some(now.as_secs() as f64),
        iss: issuer.first().cloned(),
        aud: audience.first().cloned().map(Audience::One),
        rooms: (!rooms.is_empty()).then_some(RoomGrants(rooms)),
    };
    keys.sign(&claims, kid.as_deref()).map_err(|error| error.to_string())
}
