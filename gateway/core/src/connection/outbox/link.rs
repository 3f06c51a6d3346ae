//! Bounds of the bytes that the kernel holds for a connection.
//!
//! No reply overtakes bytes in the kernel, so their transmission time is kept short. Every
//! connection has a bound of unsent bytes ([`limit_unsent_bytes`]); a slow one also has a bound of
//! bytes in flight, derived from the rate at which its peer takes them ([`PeerLink`]). Without it,
//! a link of 96 kbit/s has up to 60 KB ahead of a reply, which is 5 s.

use std::{
    io::{self, IoSlice, Write as _},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{io::Interest, net::TcpStream, time::Instant};

/// The most unsent bytes that the kernel takes (`TCP_NOTSENT_LOWAT`, tcp(7)).
const UNSENT_BYTES_MAX: u32 = 8 * 1024;

/// The size of one write while the kernel should hold little, in bytes.
pub(super) const PORTION_BYTES: usize = 8 * 1024;

/// The time for which a socket must be full until its rate is known.
const MEASURED_FOR: Duration = Duration::from_secs(1);

/// The bounds of `SO_SNDBUF` (socket(7)) for a slow connection, in bytes. The kernel holds twice as
/// much, including its own overhead. A connection above the upper bound is not slow: one second of
/// it is more than 1 Mbit.
const BUFFER_BYTES_MIN: u64 = 4 * 1024;
const BUFFER_BYTES_MAX: u64 = 64 * 1024;

/// The `SO_SNDBUF` of a connection that was slow and is fast again, in bytes; the kernel caps it at
/// `net.core.wmem_max`.
const BUFFER_BYTES_FAST: u64 = 4 << 20;

/// Bounds the unsent bytes that the kernel holds for a connection.
pub fn limit_unsent_bytes(socket: &TcpStream) {
    // On a system without this option replies are later, and nothing else changes.
    let _ = socket2::SockRef::from(socket).set_tcp_notsent_lowat(UNSENT_BYTES_MAX);
}

/// Writes if the kernel holds little. A plain write checks the bound of unsent bytes only when it
/// begins a new segment, and puts up to 64 KiB into one.
///
/// # Errors
///
/// The errors of `poll(2)` and `sendmsg(2)`; `WouldBlock` if the kernel holds enough.
pub(super) fn write_portion(socket: &TcpStream, portion: &[IoSlice<'_>]) -> io::Result<usize> {
    socket.try_io(Interest::WRITABLE, || {
        let mut asked = [PollFd::new(socket, PollFlags::OUT)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut asked, Some(&at_once))? == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        (&*socket2::SockRef::from(socket)).write_vectored(portion)
    })
}

/// The rate of a peer's link, measured from the first time its socket is full. Pure.
#[derive(Debug, Default)]
pub(super) struct PeerLink {
    /// The last time at which a full socket took bytes: the peer had acknowledged bytes until then.
    last_progress: Option<Instant>,
    /// The start of the present measurement, and the bytes taken since.
    measured: Option<(Instant, u64)>,
    is_slow: bool,
}

impl PeerLink {
    /// The socket is full.
    pub(super) fn socket_filled(&mut self, now: Instant) {
        self.measured.get_or_insert((now, 0));
    }

    /// Whether a measurement is under way: the socket was full, and frames have waited since.
    pub(super) fn is_measured(&self) -> bool {
        self.measured.is_some()
    }

    /// Counts bytes that the socket took; `was_full` if it had taken none before. Returns a new
    /// size of the send buffer, if it must change.
    pub(super) fn socket_took(
        &mut self,
        bytes: usize,
        was_full: bool,
        now: Instant,
    ) -> Option<usize> {
        if was_full {
            self.last_progress = Some(now);
        }
        let (since, taken) = self.measured.as_mut()?;
        *taken += bytes as u64;
        let (took, taken) = (now.saturating_duration_since(*since), *taken);
        if took < MEASURED_FOR {
            return None;
        }
        self.measured = Some((now, 0));
        // Half a second of the rate, since the kernel doubles it.
        let buffer = taken * 500 / u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        let was_slow = std::mem::replace(&mut self.is_slow, buffer < BUFFER_BYTES_MAX);
        match (self.is_slow, was_slow) {
            (true, _) => Some(buffer.max(BUFFER_BYTES_MIN) as usize),
            (false, true) => Some(BUFFER_BYTES_FAST as usize),
            (false, false) => None,
        }
    }

    /// Ends the measurement: with an empty queue, writes say nothing about the link.
    pub(super) fn queue_emptied(&mut self) {
        self.measured = None;
    }

    /// The last time at which the peer was seen to acknowledge bytes.
    pub(super) fn last_progress(&self) -> Option<Instant> {
        self.last_progress
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The buffer sizes set for a peer that takes `bytes` once per `every`, for `rounds`.
    fn buffers(link: &mut PeerLink, bytes: usize, every: Duration, rounds: u32) -> Vec<usize> {
        let begun = Instant::now();
        link.socket_filled(begun);
        (1..=rounds)
            .filter_map(|round| link.socket_took(bytes, true, begun + every * round))
            .collect()
    }

    #[test]
    fn kernel_holds_one_second_of_a_slow_link() {
        let mut link = PeerLink::default();
        // 96 kbit/s; the kernel doubles the value.
        let set = buffers(&mut link, 1_200, Duration::from_millis(100), 25);
        assert_eq!(set, [6_000, 6_000]);
        link.queue_emptied();
        let set = buffers(&mut link, 100, Duration::from_millis(100), 10);
        assert_eq!(set, [BUFFER_BYTES_MIN as usize]);
    }

    #[test]
    fn fast_link_keeps_its_buffer() {
        let mut link = PeerLink::default();
        let set = buffers(&mut link, 60_000, Duration::from_millis(100), 100);
        assert!(set.is_empty(), "{set:?}");
    }

    #[test]
    fn link_gets_a_large_buffer_once_it_is_fast_again() {
        let mut link = PeerLink::default();
        buffers(&mut link, 1_200, Duration::from_millis(100), 10);
        link.queue_emptied();
        let set = buffers(&mut link, 60_000, Duration::from_millis(100), 100);
        assert_eq!(set, [BUFFER_BYTES_FAST as usize]);
    }

    #[test]
    fn socket_that_takes_everything_is_not_measured() {
        let (mut link, now) = (PeerLink::default(), Instant::now());
        link.socket_filled(now);
        link.queue_emptied();
        assert_eq!(link.socket_took(100, false, now + Duration::from_secs(60)), None);
        assert_eq!((link.is_measured(), link.last_progress()), (false, None));
    }
}
