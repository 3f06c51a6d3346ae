//! Which rooms keep a log, whether rooms come to be by being joined, and passwords of rooms.

use std::{collections::HashMap, sync::Arc};

use argon2::{
    Argon2, PasswordHash, PasswordHasher as _, PasswordVerifier as _, password_hash::SaltString,
};
use parking_lot::Mutex;
use sha1::{Digest as _, Sha1};
use shared::ids::{RoomId, RoomKind};
use tokio::sync::Semaphore;

/// How many passwords are remembered as fitting, since each check takes some 20 ms of a core.
const REMEMBERED_MAX: usize = 10_000;
/// How many passwords are checked at a time; each takes 19 MiB.
const CHECKS_MAX: usize = 2;

/// What holds for rooms by their names.
#[derive(Clone, Debug)]
pub struct RoomRules {
    /// Rooms without a log: names, or prefixes where they end in `*`.
    pub ephemeral: Vec<String>,
    /// Whether a room that is not there is made by being joined.
    pub create_on_join: bool,
}

impl Default for RoomRules {
    fn default() -> Self {
        Self { ephemeral: Vec::new(), create_on_join: true }
    }
}

impl RoomRules {
    /// Whether a room keeps a log.
    pub fn is_durable(&self, room: &RoomId) -> bool {
        if room.kind() != RoomKind::Joined {
            return room.kind() == RoomKind::Inbox;
        }
        let name = room.as_str();
        !self.ephemeral.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => pattern == name,
        })
    }
}

/// Hashes and checks passwords (argon2id, RFC 9106, with the crate's parameters: 19 MiB, 2 passes),
/// outside of the runtime's own threads.
#[derive(Debug)]
pub struct Passwords {
    checks: Arc<Semaphore>,
    /// Digests of a hash and a password that fits it, in two maps that take turns.
    fitting: Mutex<[HashMap<[u8; 20], ()>; 2]>,
}

impl Default for Passwords {
    fn default() -> Self {
        Self { checks: Arc::new(Semaphore::new(CHECKS_MAX)), fitting: Mutex::default() }
    }
}

impl Passwords {
    /// The hash of a password, as a PHC string with a salt of its own.
    pub async fn hash(self: &Arc<Self>, password: String) -> String {
        self.compute(move || {
            let salt = SaltString::encode_b64(&rand::random::<[u8; 16]>());
            let salt = salt.expect("16 bytes are a salt");
            let hash = Argon2::default().hash_password(password.as_bytes(), &salt);
            hash.expect("the parameters are the crate's own").to_string()
        })
        .await
    }

    /// Whether `password` fits `hash`.
    pub async fn fits(self: &Arc<Self>, hash: String, password: String) -> bool {
        let digest = Sha1::new().chain_update(&hash).chain_update([0]).chain_update(&password);
        let digest: [u8; 20] = digest.finalize().into();
        if self.fitting.lock().iter().any(|known| known.contains_key(&digest)) {
            return true;
        }
        let fits = self
            .compute(move || {
                let hash = PasswordHash::new(&hash);
                hash.is_ok_and(|hash| {
                    Argon2::default().verify_password(password.as_bytes(), &hash).is_ok()
                })
            })
            .await;
        if fits {
            let [newer, older] = &mut *self.fitting.lock();
            if newer.len() >= REMEMBERED_MAX / 2 {
                *older = std::mem::take(newer);
            }
            newer.insert(digest, ());
        }
        fits
    }

    async fn compute<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let turn = self.checks.clone().acquire_owned().await.expect("it is never closed");
        let work = move || {
            // Also where nobody waits for the outcome any more.
            let _turn = turn;
            work()
        };
        tokio::task::spawn_blocking(work).await.expect("it does not panic")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_password_fits_its_hash_and_no_other() {
        let passwords = Arc::new(Passwords::default());
        let hash = passwords.hash("open sesame".to_owned()).await;
        assert!(hash.starts_with("$argon2id$") && !hash.contains("sesame"));
        for _ in 0..2 {
            assert!(passwords.fits(hash.clone(), "open sesame".to_owned()).await);
            assert!(!passwords.fits(hash.clone(), "open barley".to_owned()).await);
        }
        assert!(!passwords.fits("no hash".to_owned(), "open sesame".to_owned()).await);
    }

    #[test]
    fn rooms_without_a_log_are_named_or_begin_alike() {
        let ephemeral = vec!["cursors".to_owned(), "live:*".to_owned()];
        let rules = RoomRules { ephemeral, create_on_join: true };
        let is_durable = |room: &str| rules.is_durable(&room.parse().unwrap());
        assert!(!is_durable("cursors") && !is_durable("live:1"));
        assert!(is_durable("cursors2") && is_durable("live"));
    }
}
