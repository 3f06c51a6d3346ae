//! What a server has to be, and a gateway has to be allowed there: looked at when a connection is made,
//! and again while it lasts, since an operator may change it.
//!
//! Each condition that is not met has a name in `/ready` and one line a minute in the log. Where it is a
//! permission, what is asked of Redis is answered `unavailable` meanwhile, and attempts become rare.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use redis::{
    ErrorKind, RedisError, RedisResult, ServerErrorKind, Value, aio::MultiplexedConnection,
};

use super::{server::RedisServer, untrusted};
use skein_core::telemetry::log_limiter::LogLimiter;

/// The first version with what is needed: sharded pub/sub, flags of scripts.
const MAJOR_MIN: u32 = 7;
/// In how many looks one is at the permissions, while nothing shows that one is missing: every 10 s.
const PERMISSIONS_EVERY: u32 = 5;
/// What a user of Redis for gateways is allowed.
const PERMISSIONS: &str = "~gw:* &gw:* +@all -@dangerous +info +config|get";

/// The conditions of one server.
#[derive(Debug, Default)]
pub(super) struct Requirements {
    state: Mutex<RequirementState>,
    permission_line: LogLimiter,
    policy_line: LogLimiter,
    version_line: LogLimiter,
}

#[derive(Debug, Default)]
struct RequirementState {
    /// What is forbidden, by what finds that out.
    forbidden: BTreeMap<Detector, String>,
    /// The user of Redis that this node is, where it may be asked.
    user: Option<String>,
    /// The policy by which keys are thrown away when the memory is full.
    policy: Option<String>,
    /// How often it was looked.
    checks: u32,
    /// It could not be found out, which was said.
    policy_unknown: bool,
    /// The version, where it is too old.
    too_old: Option<String>,
}

/// What finds out that something is forbidden, and that it is no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Detector {
    /// A call; the next look tells whether that still is so.
    Call,
    /// A look at all commands.
    Check,
    /// The subscriber.
    Subscriber,
}

/// Whether the user of Redis that this node is may not do what it has to.
pub(super) fn is_forbidden(error: &RedisError) -> bool {
    // Of a command in a script it is no code, and Redis 7.0 says it otherwise than 7.2.
    let in_script = ["The user executing the script", "ACL failure in script"];
    error.code() == Some("NOPERM")
        || error.detail().is_some_and(|text| in_script.iter().any(|said| text.contains(said)))
}

/// Whether an error stays until an operator does something.
pub(super) fn is_persistent(error: &RedisError) -> bool {
    is_forbidden(error) || error.kind() == ErrorKind::RESP3NotSupported || is_too_old(error)
}

const TOO_OLD: &str = "Redis is older than 7.0";

fn is_too_old(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Client && error.to_string().contains(TOO_OLD)
}

impl Requirements {
    /// The name of what is not met, for `/ready`.
    pub(super) fn unmet(&self) -> Option<&'static str> {
        let state = self.state.lock();
        if state.too_old.is_some() {
            Some("redis_version")
        } else if !state.forbidden.is_empty() {
            Some("redis_permission")
        } else {
            None
        }
    }

    /// Whether Redis may throw keys away when its memory is full, and with them acknowledged messages.
    pub(super) fn evicts_keys(&self) -> bool {
        self.state.lock().policy.as_ref().is_some_and(|policy| policy != "noeviction")
    }

    /// The version, where it is too old.
    pub(super) fn too_old(&self) -> Option<String> {
        self.state.lock().too_old.clone()
    }

    /// Whether something is forbidden.
    pub(super) fn is_forbidden(&self) -> bool {
        !self.state.lock().forbidden.is_empty()
    }

    /// Notes an error, if it is about a permission.
    pub(super) fn record(&self, finder: Detector, error: &RedisError) {
        if is_forbidden(error) {
            self.forbid(finder, error.to_string());
        }
    }

    fn forbid(&self, finder: Detector, what: String) {
        let user = {
            let state = &mut *self.state.lock();
            state.forbidden.insert(finder, what.clone());
            state.user.clone()
        };
        if let Some(suppressed) = self.permission_line.should_log() {
            let user = user.unwrap_or_else(|| "of cluster.redis_url, or `default`".to_owned());
            tracing::error!(%user, what, needs = PERMISSIONS, suppressed,
                "Redis forbids its user what a gateway has to do: ACL SETUSER; not ready until then");
        }
    }

    /// What `finder` had found is allowed now.
    pub(super) fn allow(&self, finder: Detector) {
        if self.state.lock().forbidden.remove(&finder).is_some() && !self.is_forbidden() {
            tracing::info!("Redis allows its user what a gateway has to do");
        }
    }

    /// Checks what `INFO server` says.
    ///
    /// # Errors
    ///
    /// The version, where it is older than 7.0.
    pub(super) fn check_version(&self, info: &str) -> RedisResult<()> {
        let version = field(info, "redis_version").unwrap_or("of no version").trim();
        let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
        let is_old = major.is_none_or(|major| major < MAJOR_MIN);
        self.record_version(is_old.then(|| version.to_owned()))
    }

    /// Notes the version, where it is too old.
    pub(super) fn record_version(&self, too_old: Option<String>) -> RedisResult<()> {
        self.state.lock().too_old.clone_from(&too_old);
        let Some(found) = too_old else { return Ok(()) };
        if let Some(suppressed) = self.version_line.should_log() {
            tracing::error!(%found, suppressed, "{TOO_OLD}, which gateways need; not ready until then");
        }
        Err((ErrorKind::Client, TOO_OLD, found).into())
    }

    /// Looks at what may have changed: the policy, and where something was forbidden what is.
    pub(super) async fn check(
        &self,
        server: &RedisServer,
        connection: &mut MultiplexedConnection,
        permitted: &redis::Script,
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
        if is_due || self.is_forbidden() {
            self.check_permissions(server, connection, permitted).await?;
        }
        Ok(())
    }

    async fn check_permissions(
        &self,
        server: &RedisServer,
        connection: &mut MultiplexedConnection,
        permitted: &redis::Script,
    ) -> RedisResult<()> {
        let Some(group) = server.owned.borrow().first().copied() else { return Ok(()) };
        let named = |name: &str| server.keyspace.key(group, name);
        let reply: RedisResult<Value> = permitted
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
                    self.forbid(Detector::Check, untrusted::texts(missing).join(" "));
                }
                Ok(())
            }
            Err(error) if is_forbidden(&error) => {
                self.forbid(Detector::Check, error.to_string());
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
                // A hosted Redis forbids CONFIG; this it mostly allows.
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
                "Redis tells its maxmemory-policy neither by CONFIG GET nor by INFO memory: it has to be \
                 noeviction, or acknowledged messages are thrown away when the memory is full"
            );
        }
        if self.evicts_keys()
            && let Some(suppressed) = self.policy_line.should_log()
        {
            let policy = policy.unwrap_or_default();
            tracing::error!(%policy, suppressed,
                "Redis has a maxmemory-policy that throws keys away, and with them acknowledged \
                 messages: set it to noeviction; not ready until then");
        }
    }
}

/// Whether Redis has answered, if only by an error.
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

/// A field of what `INFO` says.
fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redis_before_7_is_too_old_and_valkey_is_not() {
        let conditions = Requirements::default();
        let error = conditions.check_version("redis_version:6.2.14\r\nx:y").unwrap_err();
        assert!(is_persistent(&error) && error.to_string().contains("6.2.14"), "{error}");
        assert_eq!(conditions.unmet(), Some("redis_version"));
        for good in
            ["redis_version:7.0.15\r\n", "a:b\r\nredis_version:7.2.4\r\nvalkey_version:8.0.1"]
        {
            assert!(conditions.check_version(good).is_ok());
        }
        assert_eq!((conditions.unmet(), conditions.too_old()), (None, None));
        assert!(conditions.check_version("").is_err());
    }

    #[test]
    fn what_is_forbidden_is_so_until_whoever_found_it_finds_it_allowed() {
        let conditions = Requirements::default();
        let forbidden = redis::make_extension_error("NOPERM".to_owned(), None);
        conditions.record(Detector::Subscriber, &forbidden);
        conditions.record(Detector::Call, &redis::make_extension_error("OOM".to_owned(), None));
        assert_eq!(conditions.unmet(), Some("redis_permission"));
        conditions.allow(Detector::Call);
        assert!(conditions.is_forbidden());
        conditions.allow(Detector::Subscriber);
        assert_eq!(conditions.unmet(), None);
    }

    #[test]
    fn a_policy_that_is_not_noeviction_evicts() {
        let conditions = Requirements::default();
        conditions.record_policy(None);
        assert!(!conditions.evicts_keys());
        conditions.record_policy(Some("volatile-lru".to_owned()));
        assert!(conditions.evicts_keys());
        conditions.record_policy(Some("noeviction".to_owned()));
        assert!(!conditions.evicts_keys());
    }
}
