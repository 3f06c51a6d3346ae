//! Close codes: one table of the reasons to close a connection, and whether a client reconnects.
//!
//! 1000–1015 are defined by RFC 6455, section 7.4.1, and the IANA registry; 4000–4999 are private
//! to this protocol.

/// A close code that this protocol defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum CloseCode {
    /// The client or the application is done.
    Normal = 1000,
    /// A peer is going away. The gateway sends 1012 instead when it stops.
    GoingAway = 1001,
    /// The peer violated RFC 6455.
    ProtocolError = 1002,
    /// A type of data that the peer does not accept. The gateway accepts text and binary.
    UnsupportedData = 1003,
    /// Text that is not UTF-8, or a compressed message that cannot be inflated.
    InvalidPayload = 1007,
    /// Rejected by policy; the reason is one word.
    PolicyViolation = 1008,
    /// A message is larger than `max_message_size`.
    MessageTooBig = 1009,
    /// A bug in the gateway.
    InternalError = 1011,
    /// The gateway stops; another gateway is available.
    ServiceRestart = 1012,
    /// Overload, found after the upgrade.
    TryAgainLater = 1013,
    /// A newer connection presented the session.
    SessionReplaced = 4000,
    /// The token has expired.
    TokenExpired = 4001,
    /// The gateway received nothing for 60 s.
    IdleTimeout = 4002,
    /// The gateway could write nothing for 30 s.
    WriteTimeout = 4003,
}

/// Whether and how a client reconnects by itself after a close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReconnectAdvice {
    /// Reconnect with back-off.
    Reconnect,
    /// Reconnect with a new token.
    ReconnectWithNewToken,
    /// Reconnect, and do not send the message that was too big again.
    ReconnectWithoutMessage,
    /// Do not reconnect before the application asks for it.
    DoNotReconnect,
}

impl CloseCode {
    /// Every code of this table. The gateway begins no close with 1001 or 1003. It can send other
    /// codes of 3000 to 4999, where the application passes one to `disconnect`.
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

    /// The number on the wire.
    pub fn number(self) -> u16 {
        self as u16
    }
}

/// Whether and how a client reconnects after a close with `code` and `reason`.
///
/// `None` means that the connection ended without a close frame (1005, 1006).
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
    fn advice_follows_the_protocol() {
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
