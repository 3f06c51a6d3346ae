//! Room passwords: hashed with argon2id, checked through a fair queue, and protected against
//! guessing.
//!
//! A check takes about 20 ms of a core and 19 MiB. A password that matched is remembered by a keyed
//! digest and costs nothing again; clients that present the same password at the same time share a
//! check. A wrong password is charged to the address, to the room and to the user at that address,
//! who must wait ever longer. Users without failures have a share of each rate of their own, so
//! that a guessing user does not use it up for them.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use argon2::{
    Argon2, Params, PasswordHash, PasswordHasher as _, PasswordVerifier as _,
    password_hash::SaltString,
};
use aws_lc_rs::hmac;
use parking_lot::Mutex;
use skein_protocol::ids::{RoomId, UserId};
use tokio::{sync::Semaphore, time::Instant};

use super::fair_queue::{FairQueue, QueueSlot};
use crate::{
    limits::{Rate, RateLimiters},
    telemetry::{
        log_limiter::LogLimiter,
        metrics::{Metrics, PasswordResult},
    },
};

/// The most passwords remembered as matching.
const REMEMBERED_MAX: usize = 10_000;
/// The most users per address remembered as having failed.
const FAILED_MAX: usize = 20_000;
/// The failures of a user before the first wait, which is one second; each further failure doubles
/// it.
const FREE_FAILURES: u32 = 3;
const BACK_OFF_MAX: Duration = Duration::from_secs(60);
/// The time for which failures are remembered.
const FAILED_FOR: Duration = Duration::from_secs(600);
/// The wait reported to a client when the queue is full.
const QUEUE_FULL_DELAY: Duration = Duration::from_secs(1);

/// Limits of password attempts.
#[derive(Clone, Debug)]
pub struct PasswordLimits {
    /// Wrong passwords from one address.
    pub failures_per_ip: Rate,
    /// Wrong passwords for one room, from all addresses.
    pub failures_per_room: Rate,
    /// The most time that a check may wait for its slot.
    pub wait_max: Duration,
}

impl Default for PasswordLimits {
    fn default() -> Self {
        let minute = Duration::from_secs(60);
        Self {
            failures_per_ip: Rate::new(30, minute, 30),
            failures_per_room: Rate::new(60, minute, 60),
            wait_max: Duration::from_secs(2),
        }
    }
}

/// A presented room password, without the password.
#[derive(Clone, Debug)]
pub struct PasswordAttempt {
    /// The address as limits count it; `None` if unknown.
    pub address: Option<IpAddr>,
    /// The user.
    pub user: UserId,
    /// The room.
    pub room: RoomId,
}

/// The outcome of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PasswordOutcome {
    /// The password matches.
    Matches,
    /// The password is wrong.
    Wrong,
    /// The password was not checked; retry after this time.
    RetryAfter(Duration),
}

/// The share of a rate: users with recent failures, users without, and new passwords.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum AttemptPool {
    Failed,
    Clean,
    New,
}

type Digest = [u8; 32];
type AttemptSource = (Option<IpAddr>, UserId);

/// Hashes and checks passwords on blocking threads (argon2id, RFC 9106, with the crate's
/// parameters: 19 MiB, 2 passes).
#[derive(Debug)]
pub struct Passwords {
    limits: ArcSwap<PasswordLimits>,
    metrics: Arc<Metrics>,
    queue: FairQueue<Option<IpAddr>>,
    /// The key of the digests, so that nobody else can compute one.
    key: hmac::Key,
    /// Digests of a hash and its matching password, in two maps that are used alternately.
    matching: Mutex<[HashMap<Digest, ()>; 2]>,
    /// Checks under way.
    checks_running: Mutex<HashMap<Digest, Arc<SharedCheck>>>,
    /// The number of failures of a user and the time of the last one, in two maps that are used
    /// alternately.
    failed: Mutex<[HashMap<AttemptSource, (u32, Instant)>; 2]>,
    by_address: RateLimiters<(Option<IpAddr>, AttemptPool)>,
    by_room: RateLimiters<(RoomId, AttemptPool)>,
    log: LogLimiter,
}

impl Passwords {
    /// Starts without remembered passwords and failures.
    pub fn new(limits: PasswordLimits, metrics: Arc<Metrics>) -> Arc<Self> {
        // A quarter of the cores, so that messages do not wait for passwords.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self {
            limits: ArcSwap::from_pointee(limits),
            metrics,
            queue: FairQueue::new((cores / 4).clamp(1, 8)),
            key: hmac::Key::new(hmac::HMAC_SHA256, &rand::random::<Digest>()),
            matching: Mutex::default(),
            checks_running: Mutex::default(),
            failed: Mutex::default(),
            by_address: RateLimiters::default(),
            by_room: RateLimiters::default(),
            log: LogLimiter::default(),
        })
    }

    /// Replaces the limits.
    pub fn set_limits(&self, limits: PasswordLimits) {
        self.limits.store(limits.into());
    }

    /// Hashes a password, as a PHC string with its own salt.
    ///
    /// # Errors
    ///
    /// The time to wait, if the address has had too many hashes made, or too many wait.
    pub async fn hash(
        self: &Arc<Self>,
        address: Option<IpAddr>,
        password: String,
    ) -> Result<String, Duration> {
        if address.is_some() {
            let (rate, now) = (self.limits.load().failures_per_ip, Instant::now());
            self.by_address.take((address, AttemptPool::New), rate, now)?;
        }
        let slot = self.slot(address, true).await.ok_or(QUEUE_FULL_DELAY)?;
        let hash = compute(slot, move || {
            let salt = SaltString::encode_b64(&rand::random::<[u8; 16]>());
            let salt = salt.expect("16 bytes are a valid salt");
            let hash = Argon2::default().hash_password(password.as_bytes(), &salt);
            hash.expect("the crate's own parameters are valid").to_string()
        });
        Ok(hash.await)
    }

    /// Checks whether `password` matches `hash`.
    pub async fn check(
        self: &Arc<Self>,
        attempt: PasswordAttempt,
        hash: String,
        password: String,
    ) -> PasswordOutcome {
        let checked = self.check_once(&attempt, hash, password).await;
        let result = match checked {
            PasswordOutcome::Matches => PasswordResult::Correct,
            PasswordOutcome::Wrong => PasswordResult::Wrong,
            PasswordOutcome::RetryAfter(_) => PasswordResult::RateLimited,
        };
        self.metrics.room_password_checks.of(result).inc();
        if checked != PasswordOutcome::Matches
            && let Some(suppressed) = self.log.should_log()
        {
            tracing::warn!(room = %attempt.room, user = %attempt.user,
                address = ?attempt.address, suppressed, "room password rejected");
        }
        checked
    }

    async fn check_once(
        self: &Arc<Self>,
        attempt: &PasswordAttempt,
        hash: String,
        password: String,
    ) -> PasswordOutcome {
        let digest = self.digest_of(&hash, &password);
        if self.is_known(&digest) {
            return PasswordOutcome::Matches;
        }
        let source = (attempt.address, attempt.user.clone());
        let (failures, wait) = self.failures_of(&source, Instant::now());
        if !wait.is_zero() {
            return PasswordOutcome::RetryAfter(wait);
        }
        let has_no_failures = failures == 0;
        let checks_running = CheckGuard::join(self, digest);
        let slot =
            tokio::time::timeout(self.limits.load().wait_max, checks_running.check.slot.acquire());
        let Ok(_slot) = slot.await else { return PasswordOutcome::RetryAfter(QUEUE_FULL_DELAY) };
        let outcome = *checks_running.check.outcome.lock();
        let matches = match outcome {
            Some(matches) => matches,
            None => match self.compute_once(attempt, has_no_failures, hash, password).await {
                Ok(matches) => matches,
                Err(wait) => return PasswordOutcome::RetryAfter(wait),
            },
        };
        *checks_running.check.outcome.lock() = Some(matches);
        if !matches {
            self.note_failure(source, Instant::now());
            return PasswordOutcome::Wrong;
        }
        let [newer, older] = &mut *self.matching.lock();
        if newer.len() >= REMEMBERED_MAX / 2 {
            *older = std::mem::take(newer);
        }
        newer.insert(digest, ());
        PasswordOutcome::Matches
    }

    /// Checks a password that no other client presents at the moment. The attempt is charged first
    /// and refunded if it matches, so that the checks under way never exceed the failures allowed.
    async fn compute_once(
        &self,
        attempt: &PasswordAttempt,
        has_no_failures: bool,
        hash: String,
        password: String,
    ) -> Result<bool, Duration> {
        let PasswordLimits { failures_per_ip, failures_per_room, .. } = **self.limits.load();
        let pool = if has_no_failures { AttemptPool::Clean } else { AttemptPool::Failed };
        let (address, room) = ((attempt.address, pool), (attempt.room.clone(), pool));
        let now = Instant::now();
        self.by_address.take(address, failures_per_ip, now)?;
        if let Err(wait) = self.by_room.take(room.clone(), failures_per_room, now) {
            self.by_address.refund(&address, 1, failures_per_ip);
            return Err(wait);
        }
        let Some(slot) = self.slot(attempt.address, has_no_failures).await else {
            self.by_address.refund(&address, 1, failures_per_ip);
            self.by_room.refund(&room, 1, failures_per_room);
            return Err(QUEUE_FULL_DELAY);
        };
        let matches = compute(slot, move || {
            let hash = PasswordHash::new(&hash);
            hash.is_ok_and(|hash| {
                costs_no_more_than_ours(&hash)
                    && Argon2::default().verify_password(password.as_bytes(), &hash).is_ok()
            })
        });
        let matches = matches.await;
        if matches {
            self.by_address.refund(&address, 1, failures_per_ip);
            self.by_room.refund(&room, 1, failures_per_room);
        }
        Ok(matches)
    }

    fn digest_of(&self, hash: &str, password: &str) -> Digest {
        let mut context = hmac::Context::with_key(&self.key);
        for part in [hash.as_bytes(), &[0], password.as_bytes()] {
            context.update(part);
        }
        let tag = context.sign();
        tag.as_ref().try_into().expect("HMAC-SHA256 has 32 bytes")
    }

    fn is_known(&self, digest: &Digest) -> bool {
        self.matching.lock().iter().any(|known| known.contains_key(digest))
    }

    async fn slot(
        &self,
        address: Option<IpAddr>,
        first: bool,
    ) -> Option<QueueSlot<Option<IpAddr>>> {
        let slot = self.queue.wait(address, first);
        tokio::time::timeout(self.limits.load().wait_max, slot).await.ok().flatten()
    }

    /// The recent failures of a user, and the time that the user must still wait.
    fn failures_of(&self, source: &AttemptSource, now: Instant) -> (u32, Duration) {
        let failed = self.failed.lock();
        let Some((count, at)) = failed.iter().find_map(|map| map.get(source)).copied() else {
            return (0, Duration::ZERO);
        };
        let since = now.saturating_duration_since(at);
        if since >= FAILED_FOR {
            return (0, Duration::ZERO);
        }
        let doubled = count.checked_sub(FREE_FAILURES).map(|more| 1_u64 << more.min(16));
        let back_off = Duration::from_secs(doubled.unwrap_or(0)).min(BACK_OFF_MAX);
        (count, back_off.saturating_sub(since))
    }

    fn note_failure(&self, source: AttemptSource, now: Instant) {
        let (count, _) = self.failures_of(&source, now);
        let [newer, older] = &mut *self.failed.lock();
        if newer.len() >= FAILED_MAX / 2 {
            *older = std::mem::take(newer);
        }
        newer.insert(source, (count.saturating_add(1), now));
    }
}

/// A check under way: one client computes it, and the others take its outcome.
#[derive(Debug)]
struct SharedCheck {
    slot: Semaphore,
    outcome: Mutex<Option<bool>>,
}

impl Default for SharedCheck {
    fn default() -> Self {
        Self { slot: Semaphore::new(1), outcome: Mutex::default() }
    }
}

/// One client's part in a shared check.
struct CheckGuard {
    passwords: Arc<Passwords>,
    digest: Digest,
    check: Arc<SharedCheck>,
}

impl CheckGuard {
    fn join(passwords: &Arc<Passwords>, digest: Digest) -> Self {
        let check = passwords.checks_running.lock().entry(digest).or_default().clone();
        Self { passwords: passwords.clone(), digest, check }
    }
}

impl Drop for CheckGuard {
    fn drop(&mut self) {
        let mut checks_running = self.passwords.checks_running.lock();
        // The reference in the map, and this one.
        if Arc::strong_count(&self.check) <= 2 {
            checks_running.remove(&self.digest);
        }
    }
}

async fn compute<T: Send + 'static>(
    slot: QueueSlot<Option<IpAddr>>,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let work = move || {
        // Held also if the caller has gone.
        let _slot = slot;
        work()
    };
    tokio::task::spawn_blocking(work).await.expect("hashing does not panic")
}

/// Whether checking a hash takes no more memory and time than a hash made here. The hash comes from
/// Redis, and its own parameters set the cost.
fn costs_no_more_than_ours(hash: &PasswordHash<'_>) -> bool {
    Params::try_from(hash).is_ok_and(|params| {
        params.m_cost() <= Params::DEFAULT_M_COST
            && params.t_cost() <= Params::DEFAULT_T_COST
            && params.p_cost() <= Params::DEFAULT_P_COST
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passwords(limits: PasswordLimits) -> (Arc<Passwords>, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new());
        (Passwords::new(limits, metrics.clone()), metrics)
    }

    fn attempt(address: u8, user: &str, room: &str) -> PasswordAttempt {
        let address = Some(IpAddr::from([192, 0, 2, address]));
        PasswordAttempt { address, user: user.parse().unwrap(), room: room.parse().unwrap() }
    }

    /// Fails at once, since it is not a hash.
    const NO_HASH: &str = "no hash";

    async fn fail(passwords: &Arc<Passwords>, attempt: PasswordAttempt) -> PasswordOutcome {
        passwords.check(attempt, NO_HASH.to_owned(), format!("{}", rand::random::<u64>())).await
    }

    #[tokio::test]
    async fn password_matches_only_its_own_hash() {
        let (passwords, metrics) = passwords(PasswordLimits::default());
        let hash = passwords.hash(None, "open sesame".to_owned()).await.unwrap();
        assert!(hash.starts_with("$argon2id$") && !hash.contains("sesame"));
        let check = async |user: &str, password: &str| {
            passwords.check(attempt(1, user, "r"), hash.clone(), password.to_owned()).await
        };
        // Simultaneous attempts share a check.
        let both = tokio::join!(check("ann", "open sesame"), check("bob", "open sesame"));
        assert_eq!(both, (PasswordOutcome::Matches, PasswordOutcome::Matches));
        assert!(passwords.checks_running.lock().is_empty());
        assert_eq!(check("cat", "open barley").await, PasswordOutcome::Wrong);
        assert_eq!(fail(&passwords, attempt(1, "dan", "r")).await, PasswordOutcome::Wrong);
        let count = |of| metrics.room_password_checks.of(of).get();
        assert_eq!((count(PasswordResult::Correct), count(PasswordResult::Wrong)), (2, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn failing_user_waits_longer_each_time() {
        let (passwords, _) = passwords(PasswordLimits::default());
        for _ in 0..FREE_FAILURES {
            assert_eq!(fail(&passwords, attempt(1, "eve", "r")).await, PasswordOutcome::Wrong);
        }
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            let wait = Duration::from_secs(seconds);
            assert_eq!(
                fail(&passwords, attempt(1, "eve", "r")).await,
                PasswordOutcome::RetryAfter(wait)
            );
            tokio::time::advance(wait).await;
            assert_eq!(fail(&passwords, attempt(1, "eve", "r")).await, PasswordOutcome::Wrong);
        }
        // The same name at another address is a different source.
        assert_eq!(fail(&passwords, attempt(2, "eve", "r")).await, PasswordOutcome::Wrong);
        tokio::time::advance(FAILED_FOR).await;
        assert_eq!(fail(&passwords, attempt(1, "eve", "r")).await, PasswordOutcome::Wrong);
    }

    #[tokio::test(start_paused = true)]
    async fn guesses_are_limited_per_address_and_per_room() {
        let (passwords, _) = passwords(PasswordLimits::default());
        let mut wrong = [0; 2];
        // Users who have failed once, and users who are new in each round.
        for round in 0..200 {
            for (kind, user) in
                [format!("eve{}", round % 40), format!("new{round}")].iter().enumerate()
            {
                let room = format!("room{round}");
                let checked = fail(&passwords, attempt(1, user, &room)).await;
                wrong[kind] += usize::from(checked == PasswordOutcome::Wrong);
            }
        }
        assert!(wrong.iter().sum::<usize>() <= 60, "30 with failures and 30 without");
        // Another address continues, until the room's rate is exceeded.
        let mut wrong = 0;
        for address in 2..=202 {
            let checked = fail(&passwords, attempt(address, "mallory", "r")).await;
            wrong += usize::from(checked == PasswordOutcome::Wrong);
        }
        assert_eq!(wrong, 60);
        // A matching password is not charged.
        assert_eq!(fail(&passwords, attempt(203, "ann", "other")).await, PasswordOutcome::Wrong);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(fail(&passwords, attempt(203, "bob", "r")).await, PasswordOutcome::Wrong);
    }
}
