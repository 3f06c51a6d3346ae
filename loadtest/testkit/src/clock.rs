//! Precise timers: they expire within some tens of microseconds, where the timers of tokio and of
//! `epoll_wait` have a resolution of a millisecond.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
    time::Duration,
};

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use tokio::{
    io::unix::AsyncFd,
    time::{Instant, sleep_until},
};

/// Nanoseconds of `CLOCK_MONOTONIC`, which all processes of this machine share, so that one process
/// can time the messages of another.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A timer to poll beside sockets.
#[derive(Debug)]
pub struct TimerFd {
    fd: OwnedFd,
}

impl TimerFd {
    /// A timer that is not set.
    ///
    /// # Errors
    ///
    /// No descriptor is available.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self { fd: timerfd_create(TimerfdClockId::Monotonic, flags)? })
    }

    /// The descriptor to poll.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Sets the timer to expire after this time. An earlier setting and expiry are discarded.
    ///
    /// # Errors
    ///
    /// Those of `timerfd_settime(2)`.
    pub fn set(&self, after: Duration) -> io::Result<()> {
        set(&self.fd, after)
    }
}

/// A timer for a task.
#[derive(Debug)]
pub struct PreciseTimer {
    /// `None` if no descriptor is available: then the resolution is a millisecond.
    timer: Option<AsyncFd<OwnedFd>>,
}

impl PreciseTimer {
    /// A timer that is not set.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn new() -> Self {
        // `AsyncFd::register` would take an `OwnedFd`, but is unsafe, which is forbidden here.
        #[expect(deprecated, reason = "unsound only with types that give their descriptor away")]
        let timer = TimerFd::new().and_then(|timer| AsyncFd::new(timer.fd));
        Self { timer: timer.ok() }
    }

    /// Waits until `at`. Cancel-safe.
    pub async fn sleep_until(&self, at: Instant) {
        let Some(timer) = &self.timer else { return sleep_until(at).await };
        loop {
            let after = at.saturating_duration_since(Instant::now());
            if after.is_zero() {
                return;
            }
            let awaited = match set(timer.get_ref(), after) {
                Ok(()) => timer.readable().await,
                Err(error) => Err(error),
            };
            // Setting it again discards the expiry.
            let Ok(mut expired) = awaited else { return sleep_until(at).await };
            expired.clear_ready();
        }
    }
}

impl Default for PreciseTimer {
    fn default() -> Self {
        Self::new()
    }
}

fn set(fd: &OwnedFd, after: Duration) -> io::Result<()> {
    // Zero would disarm the timer.
    let after = after.max(Duration::from_nanos(1));
    let value = Timespec { tv_sec: after.as_secs() as _, tv_nsec: after.subsec_nanos().into() };
    let setting = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
    timerfd_settime(fd, TimerfdTimerFlags::empty(), &setting)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn timer_expires_repeatedly_and_never_early() {
        let timer = PreciseTimer::new();
        for us in [0, 300, 1_500, 50] {
            let at = Instant::now() + Duration::from_micros(us);
            timer.sleep_until(at).await;
            assert!(Instant::now() >= at, "{us}");
        }
    }

    #[tokio::test]
    async fn cancelled_sleep_leaves_no_expiry_behind() {
        let timer = PreciseTimer::new();
        let soon = Instant::now() + Duration::from_millis(1);
        let later = Instant::now() + Duration::from_millis(3);
        tokio::select! {
            () = timer.sleep_until(later) => panic!("that is later"),
            () = sleep_until(soon) => {}
        }
        timer.sleep_until(later).await;
        assert!(Instant::now() >= later);
    }
}
