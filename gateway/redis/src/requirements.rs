//! Requirements: the version, settings and permissions that a Redis server must have. They are
//! checked when a connection is made and while it lasts, since an operator may change them.
//!
//! Each unmet requirement has a name in `/ready` and one log line a minute. While a permission is
//! missing, requests to Redis are answered `unavailable`, and attempts become rare.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use redis::{
    ErrorKind, RedisError, RedisResult, ServerErrorKind, Value, aio::MultiplexedConnection,
};

use super::{
    error::{TOO_OLD, is_denied},
    server::RedisServer,
    untrusted,
};
use skein_core::telemetry::log_limiter::LogLimiter;

/// The first version with the required features: sharded pub/sub and script flags.
const MAJOR_MIN: u32 = 7;
/// One in this many checks covers the permissions while none is known to be missing: every 10 s.
const PERMISSIONS_EVERY: u32 = 5;
/// The permissions of a Redis user for gateways.
const PERMISSIONS: &str = "~gw:* &gw:* +@all -@dangerous +info +config|get";

/// The requirements of one server.
#[derive(Debug, Default)]
pub(super) struct Requirements {
    state: Mutex<RequirementState>,
    permission_line: LogLimiter,
    policy_line: LogLimiter,
    version_line: LogLimiter,
}

#[derive(Debug, Default)]
struct RequirementState {
    /// Denied permissions, by what detected them.
    denied: BTreeMap<Detector, String>,
    /// The Redis user of this node, if it may be queried.
    user: Option<String>,
    /// The policy by which Redis evicts keys when its memory is full.
    policy: Option<String>,
    /// The number of checks so far.
    checks: u32,
    /// The policy cannot be read, which was logged.
    policy_unknown: bool,
    /// The server's version, if it is too old.
    too_old: Option<String>,
}

/// Detects that a permission is denied, and that it is granted again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Detector {
    /// A call; the next check finds out whether the permission is still denied.
    Call,
    /// A check of all commands.
    Check,
    /// The subscriber.
    Subscriber,
}

impl Requirements {
    /// The name of the first unmet requirement, as `/ready` reports it.
    pub(super) fn unmet(&self) -> Option<&'static str> {
        let state = self.state.lock();
        if state.too_old.is_some() {
            Some("redis_version")
        } else if !state.denied.is_empty() {
            Some("redis_permission")
        } else {
            None
        }
    }

    /// Whether Redis may evict keys, and acknowledged messages with them, when its memory is full.
    pub(super) fn evicts_keys(&self) -> bool {
        self.state.lock().policy.as_ref().is_some_and(|policy| policy != "noeviction")
    }

    /// The server's version, if it is too old.
    pub(super) fn too_old(&self) -> Option<String> {
        self.state.lock().too_old.clone()
    }

    /// Whether a permission is denied.
    pub(super) fn is_denied(&self) -> bool {
        !self.state.lock().denied.is_empty()
    }

    /// Records an error, if it is a denied permission.
    pub(super) fn record(&self, detector: Detector, error: &RedisError) {
        if is_denied(error) {
            self.deny(detector, error.to_string());
        }
    }

    fn deny(&self, detector: Detector, permission: String) {
        let user = {
            let state = &mut *self.state.lock();
            state.denied.insert(detector, permission.clone());
            state.user.clone()
        };
        if let Some(suppressed) = self.permission_line.should_log() {
            let user = user.unwrap_or_else(|| "of cluster.redis_url, or `default`".to_owned());
            tracing::error!(%user, permission, needs = PERMISSIONS, suppressed,
                "Redis denies its user a permission that gateways need: grant it with ACL SETUSER; not ready until then");
        }
    }

    /// Records that the permission that `detector` found denied is granted.
    pub(super) fn allow(&self, detector: Detector) {
        if self.state.lock().denied.remove(&detector).is_some() && !self.is_denied() {
            tracing::info!("Redis grants its user all permissions that gateways need");
        }
    }

    /// Checks the version in the reply of `INFO server`.
    ///
    /// # Errors
    ///
    /// The version is older than 7.0.
    pub(super) fn check_version(&self, info: &str) -> RedisResult<()> {
        let version = field(info, "redis_version").unwrap_or("of unknown version").trim();
        let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
        let is_old = major.is_none_or(|major| major < MAJOR_MIN);
        self.record_version(is_old.then(|| version.to_owned()))
    }

    /// Records the version, if it is too old.
    pub(super) fn record_version(&self, too_old: Option<String>) -> RedisResult<()> {
        self.state.lock().too_old.clone_from(&too_old);
        let Some(found) = too_old else { return Ok(()) };
        if let Some(suppressed) = self.version_line.should_log() {
            tracing::error!(%found, suppressed, "{TOO_OLD}: upgrade it to 7.0 or newer; not ready until then");
        }
        Err((ErrorKind::Client, TOO_OLD, found).into())
    }

    /// Checks what may have changed: the eviction policy, and the permissions if it is their turn
    /// or one is denied.
    pub(super) async fn check(
        &self,
        server: &RedisServer,
        connection: &mut MultiplexedConnection,
        permission_check: &redis::Script,
    ) -> RedisResult<()> {
        let is_due = {
            let looks = &mut self.state.lock().checks;
            *looks += 1;
            *looks % PERMISSIONS_EVERY == 1
        };
        self.check_policy(connection).await?;
        if self.state.lock().user.is_none() {
            let user: RedisResult<String> =
                redis::cmd("ACL").arg("WHOAMI").query_async(connection).await;
            self.state.lock().user = user.ok();
        }
        if is_due || self.is_denied() {
            self.check_permissions(server, connection, permission_check).await?;
        }
        Ok(())
    }

    async fn check_permissions(
        &self,
        server: &RedisServer,
        connection: &mut MultiplexedConnection,
        permission_check: &redis::Script,
    ) -> RedisResult<()> {
        let Some(group) = server.owned.borrow().first().copied() else { return Ok(()) };
        let named = |name: &str| server.keyspace.key(group, name);
        let reply: RedisResult<Value> = permission_check
            .key(named("permitted"))
            .arg(named("permitted"))
            .invoke_async(connection)
            .await;
        match reply {
            Ok(reply) => {
                let missing: Vec<untrusted::Lossy> = redis::from_redis_value(reply)?;
                if missing.is_empty() {
                    self.allow(Detector::Call);
                    self.allow(Detector::Check);
                } else {
                    self.deny(Detector::Check, untrusted::texts(missing).join(" "));
                }
                Ok(())
            }
            Err(error) if is_denied(&error) => {
                self.deny(Detector::Check, error.to_string());
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn check_policy(&self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let asked: RedisResult<(String, String)> =
            redis::cmd("CONFIG").arg("GET").arg("maxmemory-policy").query_async(connection).await;
        let policy = match asked {
            Ok((_, policy)) => Some(policy),
            Err(error) if is_answer(&error) => {
                // A hosted Redis denies CONFIG, but mostly allows INFO.
                let info: RedisResult<String> =
                    redis::cmd("INFO").arg("memory").query_async(connection).await;
                match info {
                    Ok(info) => field(&info, "maxmemory_policy").map(str::to_owned),
                    Err(error) if is_answer(&error) => None,
                    Err(error) => return Err(error),
                }
            }
            Err(error) => return Err(error),
        };
        self.record_policy(policy);
        Ok(())
    }

    fn record_policy(&self, policy: Option<String>) {
        let is_unknown = policy.is_none();
        let is_news = {
            let state = &mut *self.state.lock();
            state.policy.clone_from(&policy);
            is_unknown && !std::mem::replace(&mut state.policy_unknown, is_unknown)
        };
        if is_news {
            tracing::warn!(
                "neither CONFIG GET nor INFO memory shows the maxmemory-policy of Redis: make sure that it is \
                 noeviction, or Redis evicts acknowledged messages when its memory is full"
            );
        }
        if self.evicts_keys()
            && let Some(suppressed) = self.policy_line.should_log()
        {
            let policy = policy.unwrap_or_default();
            tracing::error!(%policy, suppressed,
                "the maxmemory-policy of Redis evicts keys, and acknowledged messages with them: set \
                 it to noeviction; not ready until then");
        }
    }
}

/// Whether Redis has replied, if only with an error.
fn is_answer(error: &RedisError) -> bool {
    match error.kind() {
        ErrorKind::Server(kind) => !matches!(
            kind,
            ServerErrorKind::BusyLoading | ServerErrorKind::MasterDown | ServerErrorKind::ReadOnly
        ),
        ErrorKind::Extension | ErrorKind::Parse | ErrorKind::UnexpectedReturnType => true,
        _ => false,
    }
}

/// The value of a field of `INFO`.
fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::is_persistent;

    #[test]
    fn redis_before_7_is_too_old_and_valkey_is_not() {
        let requirements = Requirements::default();
        let error = requirements.check_version("redis_version:6.2.14\r\nx:y").unwrap_err();
        assert!(is_persistent(&error) && error.to_string().contains("6.2.14"), "{error}");
        assert_eq!(requirements.unmet(), Some("redis_version"));
        for good in
            ["redis_version:7.0.15\r\n", "a:b\r\nredis_version:7.2.4\r\nvalkey_version:8.0.1"]
        {
            assert!(requirements.check_version(good).is_ok());
        }
        assert_eq!((requirements.unmet(), requirements.too_old()), (None, None));
        assert!(requirements.check_version("").is_err());
    }

    #[test]
    fn permission_check_has_every_command_of_the_scripts() {
        let scripts = concat!(env!("CARGO_MANIFEST_DIR"), "/src/scripts");
        let check = include_str!("scripts/check_permissions.lua");
        let mut called = 0;
        for file in std::fs::read_dir(scripts).unwrap() {
            let path = file.unwrap().path();
            let script = std::fs::read_to_string(&path).unwrap();
            for call in script.split("redis.call('").chain(script.split("redis.pcall('")).skip(1) {
                let command = call.split('\'').next().unwrap();
                if !command.is_empty() && command.chars().all(|c| c.is_ascii_uppercase()) {
                    called += 1;
                    let listed = check.contains(&format!("{{ '{command}'"));
                    assert!(listed, "{command} of {}", path.display());
                }
            }
        }
        assert!(called > 100, "{called}");
    }

    #[test]
    fn a_permission_is_denied_until_its_detector_finds_it_granted() {
        let requirements = Requirements::default();
        let denied = redis::make_extension_error("NOPERM".to_owned(), None);
        requirements.record(Detector::Subscriber, &denied);
        requirements.record(Detector::Call, &redis::make_extension_error("OOM".to_owned(), None));
        assert_eq!(requirements.unmet(), Some("redis_permission"));
        requirements.allow(Detector::Call);
        assert!(requirements.is_denied());
        requirements.allow(Detector::Subscriber);
        assert_eq!(requirements.unmet(), None);
    }

    #[test]
    fn every_policy_but_noeviction_evicts() {
        let requirements = Requirements::default();
        requirements.record_policy(None);
        assert!(!requirements.evicts_keys());
        requirements.record_policy(Some("volatile-lru".to_owned()));
        assert!(requirements.evicts_keys());
        requirements.record_policy(Some("noeviction".to_owned()));
        assert!(!requirements.evicts_keys());
    }
}
