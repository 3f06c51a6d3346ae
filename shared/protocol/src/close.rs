//! Close codes: one table of why a connection ends and what the client is to do then.
//!
//! 1000–1015 are those of RFC 6455, section 7.4.1, and the IANA registry; 4000–4999 are this
//! protocol's own.

/// Why the gateway closes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum CloseCode {
    /// The work is done.
    Normal = 1000,
    /// The other side leaves.
    GoingAway = 1001,
    /// The other side broke RFC 6455.
    ProtocolError = 1002,
    /// A kind of data that is not taken.
    UnsupportedData = 1003,
    /// Text that is not UTF-8.
    InvalidPayload = 1007,
    /// Refused; the reason is one word.
    PolicyViolation = 1008,
    /// A message larger than `max_message_size`.
    MessageTooBig = 1009,
    /// A fault of the gateway's own.
    InternalError = 1011,
    /// The gateway stops; another one is there.
    ServiceRestart = 1012,
    /// Too much to do, found after the upgrade.
    TryAgainLater = 1013,
    /// The session was presented by a newer connection.
    SessionReplaced = 4000,
    /// The token's `exp` has passed.
    TokenExpired = 4001,
    /// Nothing was heard for 60 s.
    IdleTimeout = 4002,
    /// Nothing could be written for 30 s.
    WriteTimeout = 4003,
}

/// What a client does by itself after a close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReconnectAdvice {
    /// Comes back, with back-off.
    Reconnect,
    /// Comes back with a new token.
    ReconnectWithNewToken,
    /// Comes back, without the message that was too big.
    ReconnectWithoutMessage,
    /// Stays away until its user says otherwise.
    DoNotReconnect,
}

impl CloseCode {
    /// Every code the gateway sends.
    pub const ALL: [Self; 14] = [
        Self::Normal,
        Self::GoingAway,
        Self::ProtocolError,
        Self::UnsupportedData,
        Self::InvalidPayload,
        Self::PolicyViolation,
        Self::MessageTooBig,
        Self::InternalError,
        Self::ServiceRestart,
        Self::TryAgainLater,
        Self::SessionReplaced,
        Self::TokenExpired,
        Self::IdleTimeout,
        Self::WriteTimeout,
    ];

    /// The code's number.
    pub fn number(self) -> u16 {
        self as u16
    }
}

/// What a client does by itself after a close with `code` and `reason`.
///
/// `None` stands for an end without a close frame (1005, 1006).
pub fn reconnect_advice(code: Option<u16>, reason: &str) -> ReconnectAdvice {
    match code {
        None | Some(1001 | 1005 | 1006 | 1011 | 1012 | 1013 | 4002 | 4003) => {
            ReconnectAdvice::Reconnect
        }
        Some(4001) => ReconnectAdvice::ReconnectWithNewToken,
        Some(1008) if reason == "token_expired" => ReconnectAdvice::ReconnectWithNewToken,
        Some(1009) => ReconnectAdvice::ReconnectWithoutMessage,
        Some(_) => ReconnectAdvice::DoNotReconnect,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(code: impl Into<Option<u16>>, reason: &str, expected: ReconnectAdvice) {
        assert_eq!(reconnect_advice(code.into(), reason), expected);
    }

    #[test]
    fn the_advice_is_that_of_section_3_5() {
        check(None, "", ReconnectAdvice::Reconnect);
        for code in [1001, 1005, 1006, 1011, 1012, 1013, 4002, 4003] {
            check(code, "", ReconnectAdvice::Reconnect);
        }
        check(4001, "", ReconnectAdvice::ReconnectWithNewToken);
        check(1008, "token_expired", ReconnectAdvice::ReconnectWithNewToken);
        check(1009, "", ReconnectAdvice::ReconnectWithoutMessage);
        for code in [1000, 1002, 1003, 1007, 4000, 4999] {
            check(code, "", ReconnectAdvice::DoNotReconnect);
        }
        check(1008, "kicked", ReconnectAdvice::DoNotReconnect);
    }
}
