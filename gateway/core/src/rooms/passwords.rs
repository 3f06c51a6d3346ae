//! Passwords of rooms: hashed with argon2id, checked in queue that are fair, and guessed slowly.
//!
//! A check takes some 20 ms of a core and 19 MiB. A password that was found to fit is known by a keyed
//! digest and costs nothing again; those source present the same one at the same time share a check. What
//! does not fit is charged to the address, to the room and to the user at that address, which has to
//! wait ever longer. Users source have not failed yet have a part of each rate for themselves, so that
//! those source attempt do not use it up for them.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use argon2::{
    Argon2, Params, PasswordHash, PasswordHasher as _, PasswordVerifier as _,
    password_hash::SaltString,
};
use parking_lot::Mutex;
use sha1::{Digest as _, Sha1};
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

/// How many passwords are remembered as fitting.
const REMEMBERED_MAX: usize = 10_000;
/// How many users at an address are remembered as having failed.
const FAILED_MAX: usize = 20_000;
/// How many times a user may fail before having to wait, then for a second, and twice as long each
/// time.
const FREE_FAILURES: u32 = 3;
const BACK_OFF_MAX: Duration = Duration::from_secs(60);
/// How long failures are remembered.
const FAILED_FOR: Duration = Duration::from_secs(600);
/// What a client is told to wait where too many wait for their slot.
const QUEUE_FULL_DELAY: Duration = Duration::from_secs(1);

/// How much may be guessed.
#[derive(Clone, Debug)]
pub struct PasswordLimits {
    /// Passwords that do not fit, of one address.
    pub failures_per_ip: Rate,
    /// The same of one room, by all addresses.
    pub failures_per_room: Rate,
    /// How long a check may wait for its slot.
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

/// Where a password comes from, and what for.
#[derive(Clone, Debug)]
pub struct PasswordAttempt {
    /// The address, as limits count it; `None` where it is not known.
    pub address: Option<IpAddr>,
    /// The user.
    pub user: UserId,
    /// The room.
    pub room: RoomId,
}

/// What became of a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PasswordOutcome {
    /// It is the room's.
    Matches,
    /// It is not.
    Wrong,
    /// It was not checked: try again after this time.
    RetryAfter(Duration),
}

/// What a rate is for: those source have failed lately, those source have not, and new passwords.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum AttemptPool {
    Failed,
    Clean,
    New,
}

type Digest = [u8; 20];
type AttemptSource = (Option<IpAddr>, UserId);

/// Hashes and checks passwords (argon2id, RFC 9106, with the crate's parameters: 19 MiB, 2 passes),
/// outside of the runtime's own threads.
#[derive(Debug)]
pub struct Passwords {
    limits: PasswordLimits,
    metrics: Arc<Metrics>,
    queue: FairQueue<Option<IpAddr>>,
    /// What digests are made with, so that nobody can compute one.
    key: [u8; 20],
    /// Digests of a hash and a password that fits it, in two maps that take queue.
    fitting: Mutex<[HashMap<Digest, ()>; 2]>,
    /// Checks that are under way.
    running: Mutex<HashMap<Digest, Arc<SharedCheck>>>,
    /// How often users have failed, and when last, in two maps that take queue.
    failed: Mutex<[HashMap<AttemptSource, (u32, Instant)>; 2]>,
    by_address: RateLimiters<(Option<IpAddr>, AttemptPool)>,
    by_room: RateLimiters<(RoomId, AttemptPool)>,
    log: LogLimiter,
}

impl Passwords {
    /// Nothing is known yet.
    pub fn new(limits: PasswordLimits, metrics: Arc<Metrics>) -> Arc<Self> {
        // A quarter of the cores, so that messages do not wait for passwords.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self {
            limits,
            metrics,
            queue: FairQueue::new((cores / 4).clamp(1, 8)),
            key: rand::random(),
            fitting: Mutex::default(),
            running: Mutex::default(),
            failed: Mutex::default(),
            by_address: RateLimiters::default(),
            by_room: RateLimiters::default(),
            log: LogLimiter::default(),
        })
    }

    /// The hash of a password, as a PHC string with a salt of its own.
    ///
    /// # Errors
    ///
    /// How long to wait, where the address has too many made, or too many wait.
    pub async fn hash(
        self: &Arc<Self>,
        address: Option<IpAddr>,
        password: String,
    ) -> Result<String, Duration> {
        if address.is_some() {
            let (rate, now) = (self.limits.failures_per_ip, Instant::now());
            self.by_address.take((address, AttemptPool::New), rate, now)?;
        }
        let slot = self.slot(address, true).await.ok_or(QUEUE_FULL_DELAY)?;
        let hash = compute(slot, move || {
            let salt = SaltString::encode_b64(&rand::random::<[u8; 16]>());
            let salt = salt.expect("16 bytes are a salt");
            let hash = Argon2::default().hash_password(password.as_bytes(), &salt);
            hash.expect("the parameters are the crate's own").to_string()
        });
        Ok(hash.await)
    }

    /// Whether `password` fits `hash`.
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
            tracing::warn!(room = %attempt.room, user = %attempt.user, address = ?attempt.address, suppressed,
                "a wrong password of a room; `suppressed` more were not logged since the last line");
        }
        checked
    }

    async fn check_once(
        self: &Arc<Self>,
        attempt: &PasswordAttempt,
        hash: String,
        password: String,
    ) -> PasswordOutcome {
        let digest = Sha1::new().chain_update(self.key).chain_update(&hash).chain_update([0]);
        let digest: Digest = digest.chain_update(&password).finalize().into();
        if self.is_known(&digest) {
            return PasswordOutcome::Matches;
        }
        let source = (attempt.address, attempt.user.clone());
        let (failures, wait) = self.failures_of(&source, Instant::now());
        if !wait.is_zero() {
            return PasswordOutcome::RetryAfter(wait);
        }
        let is_clean = failures == 0;
        let running = CheckGuard::join(self, digest);
        let slot = tokio::time::timeout(self.limits.wait_max, running.check.slot.acquire());
        let Ok(_turn) = slot.await else { return PasswordOutcome::RetryAfter(QUEUE_FULL_DELAY) };
        let outcome = *running.check.outcome.lock();
        let fits = match outcome {
            Some(fits) => fits,
            None => match self.compute_once(attempt, is_clean, hash, password).await {
                Ok(fits) => fits,
                Err(wait) => return PasswordOutcome::RetryAfter(wait),
            },
        };
        *running.check.outcome.lock() = Some(fits);
        if !fits {
            self.note_failure(source, Instant::now());
            return PasswordOutcome::Wrong;
        }
        let [newer, older] = &mut *self.fitting.lock();
        if newer.len() >= REMEMBERED_MAX / 2 {
            *older = std::mem::take(newer);
        }
        newer.insert(digest, ());
        PasswordOutcome::Matches
    }

    /// Checks a password that nobody else presents at the moment. It is charged beforehand, and what
    /// fits is given back, so that no more are under way than may fail.
    async fn compute_once(
        &self,
        attempt: &PasswordAttempt,
        is_clean: bool,
        hash: String,
        password: String,
    ) -> Result<bool, Duration> {
        let PasswordLimits { failures_per_ip, failures_per_room, .. } = self.limits;
        let pool = if is_clean { AttemptPool::Clean } else { AttemptPool::Failed };
        let (address, room) = ((attempt.address, pool), (attempt.room.clone(), pool));
        let now = Instant::now();
        self.by_address.take(address, failures_per_ip, now)?;
        if let Err(wait) = self.by_room.take(room.clone(), failures_per_room, now) {
            self.by_address.refund(&address, 1, failures_per_ip);
            return Err(wait);
        }
        let Some(slot) = self.slot(attempt.address, is_clean).await else {
            self.by_address.refund(&address, 1, failures_per_ip);
            self.by_room.refund(&room, 1, failures_per_room);
            return Err(QUEUE_FULL_DELAY);
        };
        let fits = compute(slot, move || {
            let hash = PasswordHash::new(&hash);
            hash.is_ok_and(|hash| {
                costs_no_more_than_ours(&hash)
                    && Argon2::default().verify_password(password.as_bytes(), &hash).is_ok()
            })
        });
        let fits = fits.await;
        if fits {
            self.by_address.refund(&address, 1, failures_per_ip);
            self.by_room.refund(&room, 1, failures_per_room);
        }
        Ok(fits)
    }

    fn is_known(&self, digest: &Digest) -> bool {
        self.fitting.lock().iter().any(|known| known.contains_key(digest))
    }

    async fn slot(
        &self,
        address: Option<IpAddr>,
        first: bool,
    ) -> Option<QueueSlot<Option<IpAddr>>> {
        let slot = self.queue.wait(address, first);
        tokio::time::timeout(self.limits.wait_max, slot).await.ok().flatten()
    }

    /// How often a user has failed lately, and how long it has to wait for that.
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

/// A check that is under way: one has the slot to do it, and the others find what came of it.
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

/// One's part in a check that others may wait for as well.
struct CheckGuard {
    passwords: Arc<Passwords>,
    digest: Digest,
    check: Arc<SharedCheck>,
}

impl CheckGuard {
    fn join(passwords: &Arc<Passwords>, digest: Digest) -> Self {
        let check = passwords.running.lock().entry(digest).or_default().clone();
        Self { passwords: passwords.clone(), digest, check }
    }
}

impl Drop for CheckGuard {
    fn drop(&mut self) {
        let mut running = self.passwords.running.lock();
        // The map's and this one.
        if Arc::strong_count(&self.check) <= 2 {
            running.remove(&self.digest);
        }
    }
}

async fn compute<T: Send + 'static>(
    slot: QueueSlot<Option<IpAddr>>,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let work = move || {
        // Also where nobody waits for the outcome any more.
        let _turn = slot;
        work()
    };
    tokio::task::spawn_blocking(work).await.expect("it does not panic")
}

/// Whether checking a hash takes no more memory and time than one that is made here: it comes from
/// Redis, and tells itself how much that is.
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

    /// Fails at once, since it is no hash.
    const NO_HASH: &str = "no hash";

    async fn fail(passwords: &Arc<Passwords>, attempt: PasswordAttempt) -> PasswordOutcome {
        passwords.check(attempt, NO_HASH.to_owned(), format!("{}", rand::random::<u64>())).await
    }

    #[tokio::test]
    async fn a_password_fits_its_hash_and_no_other() {
        let (passwords, metrics) = passwords(PasswordLimits::default());
        let hash = passwords.hash(None, "open sesame".to_owned()).await.unwrap();
        assert!(hash.starts_with("$argon2id$") && !hash.contains("sesame"));
        let check = async |user: &str, password: &str| {
            passwords.check(attempt(1, user, "r"), hash.clone(), password.to_owned()).await
        };
        // Those source come at the same time share a check.
        let both = tokio::join!(check("ann", "open sesame"), check("bob", "open sesame"));
        assert_eq!(both, (PasswordOutcome::Matches, PasswordOutcome::Matches));
        assert!(passwords.running.lock().is_empty());
        assert_eq!(check("cat", "open barley").await, PasswordOutcome::Wrong);
        assert_eq!(fail(&passwords, attempt(1, "dan", "r")).await, PasswordOutcome::Wrong);
        let count = |of| metrics.room_password_checks.of(of).get();
        assert_eq!((count(PasswordResult::Correct), count(PasswordResult::Wrong)), (2, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_user_who_fails_waits_ever_longer_and_others_do_not() {
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
        // The name at another address is another's, and the right password of the room is known.
        assert_eq!(fail(&passwords, attempt(2, "eve", "r")).await, PasswordOutcome::Wrong);
        tokio::time::advance(FAILED_FOR).await;
        assert_eq!(fail(&passwords, attempt(1, "eve", "r")).await, PasswordOutcome::Wrong);
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_and_a_room_are_guessed_at_so_often() {
        let (passwords, _) = passwords(PasswordLimits::default());
        let mut wrong = [0; 2];
        // Users source have failed once, and again and again users source are new.
        for round in 0..200 {
            for (kind, user) in
                [format!("eve{}", round % 40), format!("new{round}")].iter().enumerate()
            {
                let room = format!("room{round}");
                let checked = fail(&passwords, attempt(1, user, &room)).await;
                wrong[kind] += usize::from(checked == PasswordOutcome::Wrong);
            }
        }
        assert!(
            wrong.iter().sum::<usize>() <= 60,
            "30 of those source have failed and 30 of others"
        );
        // Another address goes on, until it is too much for a room.
        let mut wrong = 0;
        for address in 2..=202 {
            let checked = fail(&passwords, attempt(address, "mallory", "r")).await;
            wrong += usize::from(checked == PasswordOutcome::Wrong);
        }
        assert_eq!(wrong, 60);
        // A password that fits is not charged.
        assert_eq!(fail(&passwords, attempt(203, "ann", "other")).await, PasswordOutcome::Wrong);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(fail(&passwords, attempt(203, "bob", "r")).await, PasswordOutcome::Wrong);
    }
}
