//! The errors of Redis, by their cause.

use redis::{ErrorKind, RedisError};

use skein_core::bus::BusError;

/// Whether a script ran on a server that the nodes have not agreed on.
pub(super) fn is_unagreed(error: &RedisError) -> bool {
    error.code() == Some("STALE")
}

/// Whether a room's slot is on another server, migrating, or on none.
pub(super) fn is_slot_error(error: &RedisError) -> bool {
    matches!(error.code(), Some("MOVED" | "ASK" | "TRYAGAIN" | "CLUSTERDOWN"))
}

/// Whether a request failed for good ([`BusError::Rejected`]) or for a time: Redis is down, out of
/// memory, has too few replicas or a full disk, or denies a permission.
pub(super) fn to_bus_error(error: &RedisError) -> BusError {
    match error.code() {
        _ if is_denied(error) => BusError::Unavailable,
        Some("FULL") => BusError::MemoryFull,
        Some("UNSEENQUOTA") => BusError::UnseenQuota,
        Some("UNSEENBYTES") => BusError::UnseenBytes,
        Some("ERR" | "WRONGTYPE") => BusError::Rejected,
        _ => BusError::Unavailable,
    }
}

/// Whether Redis denies its user a permission.
pub(super) fn is_denied(error: &RedisError) -> bool {
    // An error of a command in a script has no such code, and Redis 7.0 words it differently than
    // 7.2.
    let in_script = ["The user executing the script", "ACL failure in script"];
    error.code() == Some("NOPERM")
        || error.detail().is_some_and(|text| in_script.iter().any(|said| text.contains(said)))
}

/// Whether an error persists until an operator acts.
pub(super) fn is_persistent(error: &RedisError) -> bool {
    is_denied(error) || error.kind() == ErrorKind::RESP3NotSupported || is_too_old(error)
}

/// The text of the error of a server that is too old.
pub(super) const TOO_OLD: &str = "Redis is older than 7.0";

fn is_too_old(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Client && error.to_string().contains(TOO_OLD)
}
