//! The input meter of a connection: bounds the work that a client may cause, by any kind of frame.
//!
//! A client can cause work in three ways, each with its own account.
//!
//! - *Requests*: `message` and `direct` frames, other frames (a frame that names users costs a part
//!   per name), and frames with a password. Above the rate a frame is rejected with `rate_limited`,
//!   and the connection continues.
//! - *Overhead*: control frames, small fragments and rejected frames, which carry nothing for any
//!   receiver.
//! - *Volume*: bytes, counted after inflation, with a surcharge per frame.
//!
//! Above the rate of overhead or volume the connection is not read until its account allows it
//! (backpressure); nothing is rejected or lost. A connection above the rate of overhead for
//! [`EXCESS_MAX`] is closed with 1008 `rate_limited`: no legitimate client needs that. Overhead is
//! also counted per address, so that many connections get no more than a few would.
//!
//! Pure: `now` is an argument. [`InputBudget`] bounds the input handled at once, so that one
//! connection delays the others of its thread by [`INPUT_TIME_MAX`] at most.

use std::{net::IpAddr, sync::Arc, time::Duration};

use skein_protocol::protocol::server_frame::ConnectionLimits;
use tokio::time::Instant;

use super::{Rate, RateLimiter, RateLimiters};
use crate::telemetry::metrics::ThrottleReason;

/// The time for which a connection may exceed its rate of overhead before it is closed.
pub const EXCESS_MAX: Duration = Duration::from_secs(10);
/// The surcharge per frame, in bytes of volume.
const FRAME_BYTES: usize = 128;
/// A fragment with a smaller payload, in bytes, counts as overhead. A message of the largest
/// default size has 256 fragments of this size.
const FRAGMENT_BYTES_MIN: usize = 1024;
/// The cost of a rejected frame in control frames: it is parsed, answered and written.
const REJECTED_UNITS: u32 = 2;
/// The overhead of an address, in multiples of a connection's.
const ADDRESS_SHARE: u32 = 20;
/// The number of names in a frame that cost as much as a frame without names.
const NAMES_PER_UNIT: usize = 4;
/// The burst of a rate, in seconds.
const BURST_SECONDS: u32 = 5;
/// The burst of volume, in seconds: a message of 256 KiB is parsed in about a millisecond, in one
/// piece.
const VOLUME_BURST_SECONDS: u32 = 2;

/// The most frames in one budget.
const INPUT_FRAMES_MAX: u32 = 64;
/// The most payload bytes in one budget, after inflation. A single message may exceed it.
const INPUT_BYTES_MAX: usize = 256 * 1024;
/// The time of one budget. A single frame may exceed it.
pub const INPUT_TIME_MAX: Duration = Duration::from_micros(250);

/// The rates of a meter, shared by all connections of a node.
#[derive(Clone, Debug)]
pub struct MeterRates {
    /// `message` and `direct` frames.
    pub messages: Rate,
    /// All other frames.
    pub frames: Rate,
    /// Frames with a password: each takes about 20 ms of a core.
    pub passwords: Rate,
    /// Control frames, small fragments and rejected frames.
    overhead: Rate,
    /// The overhead of all connections of an address.
    address_overhead: Rate,
    /// Bytes.
    volume: Rate,
    /// The limits reported to clients.
    advertised: ConnectionLimits,
}

impl MeterRates {
    /// Rates from the options `limits.messages_per_second`, `limits.frames_per_second` and
    /// `limits.bytes_per_second`; 0 disables the rates derived from an option.
    pub fn new(messages: u32, frames: u32, bytes_per_second: u64) -> Self {
        let second = Duration::from_secs(1);
        let advertised = ConnectionLimits {
            messages_per_second: messages,
            messages_burst: messages.saturating_mul(2),
            frames_per_second: frames,
            frames_burst: frames.saturating_mul(BURST_SECONDS),
            bytes_per_second,
        };
        let volume = u32::try_from(bytes_per_second).unwrap_or(0);
        let per_second = |count: u32| Rate::new(count, second, count.saturating_mul(BURST_SECONDS));
        Self {
            messages: Rate::new(messages, second, advertised.messages_burst),
            frames: per_second(frames),
            passwords: Rate::new(1, 2 * second, 5),
            overhead: per_second(frames),
            address_overhead: per_second(frames.saturating_mul(ADDRESS_SHARE)),
            volume: Rate::new(volume, second, volume.saturating_mul(VOLUME_BURST_SECONDS)),
            advertised,
        }
    }

    /// The limits reported to clients.
    pub fn advertised(&self) -> ConnectionLimits {
        self.advertised
    }

    /// No limits.
    pub fn unlimited() -> Self {
        Self { passwords: Rate::new(0, Duration::ZERO, 0), ..Self::new(0, 0, 0) }
    }
}

/// The overhead of each address.
pub type AddressMeters = RateLimiters<IpAddr>;

/// The decision on a connection after [`Meter::settle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MeterDecision {
    /// Continue reading.
    Continue,
    /// Do not read for this time.
    Pause(Duration, ThrottleReason),
    /// Close with 1008 `rate_limited`.
    Close,
}

/// The accounts of one connection.
#[derive(Debug)]
pub struct Meter {
    rates: Arc<MeterRates>,
    address: Option<(Arc<AddressMeters>, IpAddr)>,
    messages: RateLimiter,
    frames: RateLimiter,
    passwords: RateLimiter,
    overhead: RateLimiter,
    volume: RateLimiter,
    /// The time since which the rate of overhead is exceeded.
    excess_since: Option<Instant>,
    /// Counted and not charged yet.
    pending: PendingCharge,
}

#[derive(Debug, Default)]
struct PendingCharge {
    overhead: u32,
    bytes: u32,
}

impl Meter {
    /// The meter of a new connection; `address` is its address, if known.
    pub fn new(rates: Arc<MeterRates>, address: Option<(Arc<AddressMeters>, IpAddr)>) -> Self {
        Self {
            rates,
            address,
            messages: RateLimiter::default(),
            frames: RateLimiter::default(),
            passwords: RateLimiter::default(),
            overhead: RateLimiter::default(),
            volume: RateLimiter::default(),
            excess_since: None,
            pending: PendingCharge::default(),
        }
    }

    /// Counts a control frame with a payload of `bytes`.
    pub fn control(&mut self, bytes: usize) {
        self.pending.overhead += 1;
        self.data(bytes);
    }

    /// Counts a fragment with a payload of `bytes`.
    pub fn fragment(&mut self, bytes: usize) {
        self.pending.overhead += u32::from(bytes < FRAGMENT_BYTES_MIN);
        // The bytes are counted when the message is complete.
        self.data(0);
    }

    /// Counts a complete message of `bytes`, after inflation.
    pub fn data(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes + FRAME_BYTES).unwrap_or(u32::MAX);
        self.pending.bytes = self.pending.bytes.saturating_add(bytes);
    }

    /// Counts rejected frames.
    pub fn rejected(&mut self, frames: u32) {
        self.pending.overhead = self.pending.overhead.saturating_add(frames * REJECTED_UNITS);
    }

    /// Takes a `message` or `direct` frame.
    ///
    /// # Errors
    ///
    /// The time to wait until one may be taken.
    pub fn take_message(&mut self, now: Instant) -> Result<(), Duration> {
        self.messages.take(self.rates.messages, now)
    }

    /// Takes another frame, which names `names` users.
    ///
    /// # Errors
    ///
    /// The time to wait until it may be taken.
    pub fn take_frame(&mut self, names: usize, now: Instant) -> Result<(), Duration> {
        let units = 1 + u32::try_from(names / NAMES_PER_UNIT).unwrap_or(u32::MAX);
        self.frames.take_many(units, self.rates.frames, now)
    }

    /// Takes a frame with a password.
    ///
    /// # Errors
    ///
    /// The time to wait until it may be taken.
    pub fn take_password(&mut self, now: Instant) -> Result<(), Duration> {
        self.passwords.take(self.rates.passwords, now)
    }

    /// Charges everything counted since the last call, and decides.
    pub fn settle(&mut self, now: Instant) -> MeterDecision {
        let PendingCharge { overhead, bytes } = std::mem::take(&mut self.pending);
        let rates = &self.rates;
        self.volume.charge(bytes, rates.volume, now);
        let for_bytes = self.volume.wait(rates.volume, now);
        if overhead == 0 && self.excess_since.is_none() {
            return match for_bytes {
                Duration::ZERO => MeterDecision::Continue,
                wait => MeterDecision::Pause(wait, ThrottleReason::Bytes),
            };
        }
        self.overhead.charge(overhead, rates.overhead, now);
        let own = self.overhead.wait(rates.overhead, now);
        let burst = rates.overhead.burst;
        let of_address = match &self.address {
            Some((addresses, key)) if overhead > 0 => {
                addresses.charge(*key, overhead, rates.address_overhead, now);
                addresses.wait(key, rates.address_overhead, now)
            }
            _ => Duration::ZERO,
        };
        // A connection that has caused little does not wait for the others of its address.
        let has_share = self.overhead.ahead_of_rate(now) > burst / 8;
        let of_address = if has_share { of_address } else { Duration::ZERO };
        if own.max(of_address) > Duration::ZERO {
            let since = *self.excess_since.get_or_insert(now);
            if now.saturating_duration_since(since) >= EXCESS_MAX {
                return MeterDecision::Close;
            }
        } else if self.overhead.ahead_of_rate(now) <= burst / 2 {
            self.excess_since = None;
        }
        let waits = [
            (own, ThrottleReason::Overhead),
            (of_address, ThrottleReason::PerIpOverhead),
            (for_bytes, ThrottleReason::Bytes),
        ];
        match waits.into_iter().max_by_key(|(wait, _)| *wait) {
            Some((wait, cause)) if !wait.is_zero() => MeterDecision::Pause(wait, cause),
            _ => MeterDecision::Continue,
        }
    }
}

/// The input of one connection that is handled before the other connections of its thread run.
#[derive(Debug, Default)]
pub struct InputBudget {
    frames: u32,
    bytes: usize,
    time: Duration,
}

impl InputBudget {
    /// Counts a frame of `bytes`.
    pub fn frame(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes += bytes;
    }

    /// Counts a request that waits for the hub or the bus; it costs as much as several frames.
    pub fn request(&mut self) {
        self.frames += INPUT_FRAMES_MAX / 8;
    }

    /// Counts time.
    pub fn time(&mut self, time: Duration) {
        self.time += time;
    }

    /// Whether the budget is used up after `more` time.
    pub fn is_over(&self, more: Duration) -> bool {
        self.frames >= INPUT_FRAMES_MAX
            || self.bytes >= INPUT_BYTES_MAX
            || self.time + more >= INPUT_TIME_MAX
    }
}

#[cfg(test)]
mod tests;
