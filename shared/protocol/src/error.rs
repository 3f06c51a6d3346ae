//! Error codes: one table of the reasons to reject a client frame, and whether to retry.

use serde::{Deserialize, Serialize};

/// Why a client frame was rejected: `error.code` on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The frame violates the protocol: invalid JSON, a missing field or one of the wrong type.
    BadRequest,
    /// The frame's `type` is unknown to the gateway.
    UnknownType,
    /// The token is missing or invalid.
    Unauthorized,
    /// The token does not allow the operation.
    Forbidden,
    /// The room, user or session does not exist.
    NotFound,
    /// The connection has not joined the room.
    NotJoined,
    /// The room has reached its maximum number of members.
    RoomFull,
    /// The room's password does not match.
    WrongPassword,
    /// A room with this id exists already.
    RoomExists,
    /// A field or message is larger than its limit.
    TooLarge,
    /// The connection has reached a limit of what it may hold, such as rooms or watches.
    LimitReached,
    /// The connection exceeds a rate limit. `retry_after_ms` says when to retry.
    RateLimited,
    /// The node is overloaded. Send the frame again later with the same `id`.
    Overloaded,
    /// The bus is down. Keep the message and send it again with the same `id`.
    Unavailable,
    /// A bug in the gateway; its log has the details.
    Internal,
}

impl ErrorCode {
    /// Every code, in the order of docs/protocol.md.
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

    /// The code on the wire.
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

    /// Whether the same frame can succeed later, so that a client should send it again.
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
    fn as_str_and_json_agree() {
        for code in ErrorCode::ALL {
            assert_eq!(serde_json::to_string(&code).unwrap(), format!("\"{}\"", code.as_str()));
        }
    }
}
