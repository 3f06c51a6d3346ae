//! How much the kernel holds of a connection.
//!
//! No answer overtakes bytes that are in the kernel, so they are kept short in time: every connection
//! has a bound of the bytes that are not sent yet ([`limit_unsent_bytes`]), and a slow one a bound of those in
//! flight as well, from the rate at which its peer takes them ([`PeerLink`]). Without it a link of 96 kbit/s
//! has up to 60 KB before an answer, which is 5 s.

use std::{
    io::{self, IoSlice, Write as _},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{io::Interest, net::TcpStream, time::Instant};

/// How many bytes the kernel takes that it cannot send yet (`TCP_NOTSENT_LOWAT`, tcp(7)).
const UNSENT_BYTES_MAX: u32 = 8 * 1024;

/// How many bytes one write has where little is to be in the kernel.
pub(super) const PORTION_BYTES: usize = 8 * 1024;

/// For how long a socket has to be full until its rate is known.
const MEASURED_FOR: Duration = Duration::from_secs(1);

/// The bounds of `SO_SNDBUF` (socket(7)) for a slow connection, in bytes. The kernel holds twice as
/// much, its own overhead included. Above the upper one a connection is not slow: 1 s of it is more
/// than 1 Mbit.
const BUFFER_BYTES_MIN: u64 = 4 * 1024;
const BUFFER_BYTES_MAX: u64 = 64 * 1024;

/// The same of a connection that was slow and is not any more. The kernel takes as much of it as
/// `net.core.wmem_max` allows.
const BUFFER_BYTES_FAST: u64 = 4 << 20;

/// Has the kernel hold little of a connection that it cannot send.
pub fn limit_unsent_bytes(socket: &TcpStream) {
    // Where the system has no such option answers come later, and nothing else changes.
    let _ = socket2::SockRef::from(socket).set_tcp_notsent_lowat(UNSENT_BYTES_MAX);
}

/// Writes where the kernel holds little. A plain write looks at that bound only when it begins a new
/// segment, and puts up to 64 KiB into one.
///
/// # Errors
///
/// Those of `poll(2)` and `sendmsg(2)`; `WouldBlock` where the kernel holds enough.
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

/// A peer's link, as far as it is known since its socket was full for the first time. Pure.
#[derive(Debug, Default)]
pub(super) struct PeerLink {
    /// When the socket last took something after it had taken nothing: the peer had acknowledged
    /// bytes until then.
    last_progress: Option<Instant>,
    /// Since when the socket has been full again and again, and what it has taken since.
    measured: Option<(Instant, u64)>,
    is_slow: bool,
}

impl PeerLink {
    /// The socket takes no more.
    pub(super) fn socket_filled(&mut self, now: Instant) {
        self.measured.get_or_insert((now, 0));
    }

    /// Whether the socket was full, and something has waited for it since.
    pub(super) fn is_measured(&self) -> bool {
        self.measured.is_some()
    }

    /// The socket has taken so many bytes, after it had taken nothing if it `was_full`. Returns what
    /// its send buffer is to be, where that may be another than before.
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
        // Half a second of it, since the kernel doubles it.
        let buffer = taken * 500 / u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        let was_slow = std::mem::replace(&mut self.is_slow, buffer < BUFFER_BYTES_MAX);
        match (self.is_slow, was_slow) {
            (true, _) => Some(buffer.max(BUFFER_BYTES_MIN) as usize),
            (false, true) => Some(BUFFER_BYTES_FAST as usize),
            (false, false) => None,
        }
    }

    /// Nothing waits for the socket: its writes say nothing of the link from here on.
    pub(super) fn queue_emptied(&mut self) {
        self.measured = None;
    }

    /// When the peer was last seen to acknowledge bytes.
    pub(super) fn last_progress(&self) -> Option<Instant> {
        self.last_progress
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The buffers that are set for a peer that takes `bytes` each `every`, for `rounds`.
    fn buffers(link: &mut PeerLink, bytes: usize, every: Duration, rounds: u32) -> Vec<usize> {
        let begun = Instant::now();
        link.socket_filled(begun);
        (1..=rounds)
            .filter_map(|round| link.socket_took(bytes, true, begun + every * round))
            .collect()
    }

    #[test]
    fn the_kernel_holds_a_second_of_a_slow_link() {
        let mut link = PeerLink::default();
        // 96 kbit/s; the kernel doubles what is set.
        let set = buffers(&mut link, 1_200, Duration::from_millis(100), 25);
        assert_eq!(set, [6_000, 6_000]);
        link.queue_emptied();
        let set = buffers(&mut link, 100, Duration::from_millis(100), 10);
        assert_eq!(set, [BUFFER_BYTES_MIN as usize]);
    }

    #[test]
    fn a_fast_link_is_left_alone() {
        let mut link = PeerLink::default();
        let set = buffers(&mut link, 60_000, Duration::from_millis(100), 100);
        assert!(set.is_empty(), "{set:?}");
    }

    #[test]
    fn a_link_that_was_slow_gets_a_large_buffer_once_it_is_fast() {
        let mut link = PeerLink::default();
        buffers(&mut link, 1_200, Duration::from_millis(100), 10);
        link.queue_emptied();
        let set = buffers(&mut link, 60_000, Duration::from_millis(100), 100);
        assert_eq!(set, [BUFFER_BYTES_FAST as usize]);
    }

    #[test]
    fn a_socket_that_takes_all_says_nothing_of_its_link() {
        let (mut link, now) = (PeerLink::default(), Instant::now());
        link.socket_filled(now);
        link.queue_emptied();
        assert_eq!(link.socket_took(100, false, now + Duration::from_secs(60)), None);
        assert_eq!((link.is_measured(), link.last_progress()), (false, None));
    }
}
