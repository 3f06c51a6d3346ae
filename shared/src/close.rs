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
    Protocol = 1002,
    /// A kind of data that is not taken.
    Unsupported = 1003,
    /// Text that is not UTF-8.
    BadUtf8 = 1007,
    /// Refused; the reason is one word.
    Policy = 1008,
    /// A message larger than `max_message_size`.
    TooBig = 1009,
    /// A fault of the gateway's own.
    Internal = 1011,
    /// The gateway stops; another one is there.
    Restart = 1012,
    /// Too much to do, found after the upgrade.
    Overload = 1013,
    /// The session was presented by a newer connection.
    SessionReplaced = 4000,
    /// The token's `exp` has passed.
    TokenExpired = 4001,
    /// Nothing was heard for 60 s.
    Silent = 4002,
    /// Nothing could be written for 30 s.
    Stalled = 4003,
}

/// What a client does by itself after a close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Comes back, with back-off.
    Reconnect,
    /// Comes back with a new token.
    ReconnectWithNewToken,
    /// Comes back, without the message that was too big.
    ReconnectWithoutMessage,
    /// Stays away until its user says otherwise.
    Stay,
}

impl CloseCode {
    /// Every code the gateway sends.
    pub const ALL: [Self; 14] = [
        Self::Normal,
        Self::GoingAway,
        Self::Protocol,
        Self::Unsupported,
        Self::BadUtf8,
        Self::Policy,
        Self::TooBig,
        Self::Internal,
        Self::Restart,
        Self::Overload,
        Self::SessionReplaced,
        Self::TokenExpired,
        Self::Silent,
        Self::Stalled,
    ];

    /// The code's number.
    pub fn number(self) -> u16 {
        self as u16
    }
}

/// What a client does by itself after a close with `code` and `reason`.
///
/// `None` stands for an end without a close frame (1005, 1006).
pub fn advice(code: Option<u16>, reason: &str) -> Advice {
    match code {
        None | Some(1001 | 1005 | 1006 | 1011 | 1012 | 1013 | 4002 | 4003) => Advice::Reconnect,
        Some(4001) => Advice::ReconnectWithNewToken,
        Some(1008) if reason == "token_expired" => Advice::ReconnectWithNewToken,
        Some(1009) => Advice::ReconnectWithoutMessage,
        Some(_) => Advice::Stay,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(code: impl Into<Option<u16>>, reason: &str, expected: Advice) {
        assert_eq!(advice(code.into(), reason), expected);
    }

    #[test]
    fn the_advice_is_that_of_section_3_5() {
        check(None, "", Advice::Reconnect);
        for code in [1001, 1005, 1006, 1011, 1012, 1013, 4002, 4003] {
            check(code, "", Advice::Reconnect);
        }
        check(4001, "", Advice::ReconnectWithNewToken);
        check(1008, "token_expired", Advice::ReconnectWithNewToken);
        check(1009, "", Advice::ReconnectWithoutMessage);
        for code in [1000, 1002, 1003, 1007, 4000, 4999] {
            check(code, "", Advice::Stay);
        }
        check(1008, "kicked", Advice::Stay);
    }
}
