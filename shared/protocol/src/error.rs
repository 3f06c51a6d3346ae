//! Error codes: one table of what can be refused and whether to try again.

use serde::{Deserialize, Serialize};

/// Why a frame was refused, as `error.code` on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The frame is not what the protocol says: bad JSON, a missing or ill-typed field.
    BadRequest,
    /// The frame's `type` is not known here.
    UnknownType,
    /// The token is missing or bad.
    Unauthorized,
    /// The token does not allow it.
    Forbidden,
    /// There is no such thing.
    NotFound,
    /// The connection has not joined the room it speaks of.
    NotJoined,
    /// The room has as many members as it may have.
    RoomFull,
    /// The room's password is another.
    WrongPassword,
    /// A room of that name is there already.
    RoomExists,
    /// A field or message is larger than its limit.
    TooLarge,
    /// The connection holds as many as it may hold.
    LimitReached,
    /// Too many in too short a time. `retry_after_ms` says when to go on.
    RateLimited,
    /// The node has more to do than it can. Send again later with the same `id`.
    Overloaded,
    /// The bus is away. Keep the message and send it again with the same `id`.
    Unavailable,
    /// A fault of the gateway's own; its log has more.
    Internal,
}

impl ErrorCode {
    /// Every code, in the order of the protocol's list.
    pub const ALL: [Self; 15] = [
        Self::BadRequest,
        Self::UnknownType,
        Self::Unauthorized,
        Self::Forbidden,
        Self::NotFound,
        Self::NotJoined,
        Self::RoomFull,
        Self::WrongPassword,
        Self::RoomExists,
        Self::TooLarge,
        Self::LimitReached,
        Self::RateLimited,
        Self::Overloaded,
        Self::Unavailable,
        Self::Internal,
    ];

    /// The code as it stands on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::UnknownType => "unknown_type",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::NotJoined => "not_joined",
            Self::RoomFull => "room_full",
            Self::WrongPassword => "wrong_password",
            Self::RoomExists => "room_exists",
            Self::TooLarge => "too_large",
            Self::LimitReached => "limit_reached",
            Self::RateLimited => "rate_limited",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
        }
    }

    /// Whether the same frame may succeed later, so that a client should send it again.
    pub fn is_retryable(self) -> bool {
        match self {
            Self::RateLimited | Self::Overloaded | Self::Unavailable => true,
            Self::BadRequest
            | Self::UnknownType
            | Self::Unauthorized
            | Self::Forbidden
            | Self::NotFound
            | Self::NotJoined
            | Self::RoomFull
            | Self::WrongPassword
            | Self::RoomExists
            | Self::TooLarge
            | Self::LimitReached
            | Self::Internal => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_a_code_is_its_text_in_json() {
        for code in ErrorCode::ALL {
            assert_eq!(serde_json::to_string(&code).unwrap(), format!("\"{}\"", code.as_str()));
        }
    }
}
