//! The queue between everything that has something for a client, and the client's socket.
//!
//! A message leaves the gateway here and nowhere else. FrameQueue are shared bytes, header included,
//! so that a push costs a reference count. [`Outbox::flush`] writes everything queued in one
//! vectored write, from whichever task pushed last; where the socket takes no more, the
//! connection's own task waits for it and goes on.
//!
//! The queue is bounded in bytes. When it is full:
//! - an entry of a log is refused ([`Outbox::offer`]): its reader lags, and is given the entry from
//!   the ring or the log once the socket has drained. Nothing is lost, and memory is bounded.
//! - an answer to the client's own frame is taken ([`Outbox::push`]), but the connection's task
//!   reads no further frame until there is room, so that answers are bounded by what one read
//!   brought.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use skein_protocol::ids::{RoomId, RoomKind};
use skein_websocket::Opcode;
use smallvec::SmallVec;
use tokio::{net::TcpStream, sync::Notify, time::Instant};

use crate::telemetry::metrics::Metrics;

pub mod deflate;
mod frame_queue;
mod link;

use deflate::DeflateOptions;
use frame_queue::FrameQueue;
use link::PeerLink;
pub use link::limit_unsent_bytes;

/// What a queued frame takes beside its own bytes: its place in the queue and its allocation. An
/// empty pong would otherwise count two bytes and take a hundred.
pub const FRAME_OVERHEAD_BYTES: usize = 96;

/// How much waits where a client catches up, and not where messages gather.
const BULK_BYTES: usize = 64 * 1024;

/// How many frames are put ahead of what waits before a further pong replaces the one before it
/// (RFC 6455, section 5.5.3, allows to answer the latest ping only).
const AHEAD_MAX: u32 = 16;

/// Where the frames of an outbox go.
#[derive(Debug)]
enum Sink {
    Socket(TcpStream),
    /// Nowhere by themselves: the owner takes them ([`Outbox::take`]).
    Owner,
}

/// How a connection is to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// The close code.
    pub code: u16,
    /// The reason: one word, or nothing.
    pub reason: String,
}

/// What became of an entry that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum OfferResult {
    /// It is alone in the queue: who offered it sees to it that it is flushed.
    First,
    /// It is behind others, and whoever flushes those writes it too.
    Queued,
    /// The queue is full.
    Full,
}

/// The queue of one connection.
#[derive(Debug)]
pub struct Outbox {
    sink: Sink,
    bytes_max: usize,
    deflate: Option<DeflateOptions>,
    metrics: Arc<Metrics>,
    queue: Mutex<OutboxState>,
    /// Wakes the connection's task: the socket is to be waited for, someone lags, or it is over.
    wake: Notify,
}

#[derive(Debug, Default)]
struct OutboxState {
    frames: FrameQueue,
    bytes: usize,
    /// Of `bytes`, what the owner of an outbox without a socket has taken and still holds.
    held: usize,
    /// Since when the socket has taken nothing. While it is set only the connection's task writes.
    blocked_since: Option<Instant>,
    /// The peer's link, as far as it is known once the socket was full.
    link: Option<Box<PeerLink>>,
    /// The latest pong, while too much is ahead of the others already.
    pong: Option<Box<Bytes>>,
    /// Rooms in which this connection has to be given more once there is room; and those in which
    /// the status of users is told with whom it has just begun to talk.
    lagging: SmallVec<[RoomId; 1]>,
    close: Option<Close>,
    /// What became of a publish is queued; the copy, if there is one, is on its way.
    acked: bool,
    /// The socket is gone or the close frame is queued: nothing more is taken.
    closed: bool,
}

impl Outbox {
    /// An outbox that writes to `socket` and refuses entries above `bytes_max`.
    pub fn to_socket(socket: TcpStream, bytes_max: usize, metrics: Arc<Metrics>) -> Self {
        Self::new(Sink::Socket(socket), bytes_max, metrics)
    }

    /// An outbox whose frames are taken by its owner.
    pub fn to_owner(bytes_max: usize, metrics: Arc<Metrics>) -> Self {
        Self::new(Sink::Owner, bytes_max, metrics)
    }

    fn new(sink: Sink, bytes_max: usize, metrics: Arc<Metrics>) -> Self {
        let (queue, wake) = (Mutex::default(), Notify::new());
        Self { sink, bytes_max, deflate: None, metrics, queue, wake }
    }

    /// The same, to a client that takes compressed messages.
    pub fn with_deflate(mut self, deflate: Option<DeflateOptions>) -> Self {
        self.deflate = deflate;
        self
    }

    /// How messages to this client are compressed, if they are.
    pub fn deflate_options(&self) -> Option<DeflateOptions> {
        self.deflate
    }

    /// Queues an answer to the client's own frame, whatever the queue holds.
    pub fn push(&self, frame: Bytes) {
        let frame = self.deflated(frame);
        self.queue.lock().add(frame);
    }

    /// Queues an answer that has no order with anything else, as [`Outbox::push`]: where the socket
    /// takes less than there is, it goes ahead of the rest.
    pub fn push_ahead(&self, frame: Bytes) {
        let frame = self.deflated(frame);
        self.queue.lock().add_ahead(frame);
    }

    /// Queues a pong. A client that does not read gets no more than a few and the latest.
    pub fn push_pong(&self, frame: Bytes) {
        let mut queue = self.queue.lock();
        if queue.frames.ahead() < AHEAD_MAX {
            queue.add_ahead(frame);
        } else if !queue.closed {
            queue.pong = Some(Box::new(frame));
        }
    }

    fn deflated(&self, frame: Bytes) -> Bytes {
        match self.deflate {
            Some(deflate) => deflate.frame(&frame, &self.metrics),
            None => frame,
        }
    }

    /// Queues an entry of a log, as it is, unless the queue is full.
    pub fn offer(&self, frame: &Bytes) -> OfferResult {
        let mut queue = self.queue.lock();
        // A frame larger than the whole bound must still pass when nothing else waits.
        let bytes = frame.len() + FRAME_OVERHEAD_BYTES;
        if queue.bytes > 0 && queue.bytes + bytes > self.bytes_max {
            return OfferResult::Full;
        }
        let first = queue.frames.is_empty();
        queue.add(frame.clone());
        if first { OfferResult::First } else { OfferResult::Queued }
    }

    /// Whether so much waits that no further frame of the client should be read.
    pub fn is_full(&self) -> bool {
        self.queue.lock().bytes >= self.bytes_max
    }

    /// Whether at least half of the bound is free.
    pub fn has_room(&self) -> bool {
        self.queue.lock().has_room(self.bytes_max)
    }

    /// Bytes that wait, [`FRAME_OVERHEAD_BYTES`] for each frame included.
    pub fn bytes(&self) -> usize {
        self.queue.lock().bytes
    }

    /// Writes what waits, as far as the socket takes it without waiting. Never blocks.
    pub fn flush(&self) {
        let mut queue = self.queue.lock();
        if queue.blocked_since.is_none() {
            self.write(&mut queue);
            if queue.blocked_since.is_some() {
                self.wake.notify_one();
            }
        }
    }

    /// As [`Outbox::flush`], by the connection's task, which has seen that the socket takes more.
    pub fn flush_writable(&self) {
        self.write(&mut self.queue.lock());
    }

    /// As [`Outbox::wake`], with what became of a publish queued. An `ack` may leave with the copy,
    /// which is on its way.
    pub fn wake_for_ack(&self) {
        self.queue.lock().acked = true;
        self.wake.notify_one();
    }

    /// Whether [`Outbox::wake_for_ack`] was called since this was last asked.
    pub fn take_acked(&self) -> bool {
        std::mem::take(&mut self.queue.lock().acked)
    }

    /// Has the connection's task flush and look at the time.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Waits until something is to be done for this outbox. Cancel-safe.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Since when the socket has taken nothing although something waits.
    pub fn blocked_since(&self) -> Option<Instant> {
        self.queue.lock().blocked_since
    }

    /// When the peer was last seen to acknowledge bytes: the socket took something after it had taken
    /// nothing. `None` where it never was full.
    pub fn last_progress(&self) -> Option<Instant> {
        self.queue.lock().link.as_ref()?.last_progress()
    }

    /// Notes that the connection has to be given more of `room` once there is room.
    pub fn mark_lagging(&self, room: RoomId) {
        let mut queue = self.queue.lock();
        if !queue.lagging.contains(&room) {
            queue.lagging.push(room);
            self.wake.notify_one();
        }
    }

    /// Whether there are rooms to be continued.
    pub fn is_lagging(&self) -> bool {
        self.queue.lock().lagging.iter().any(|room| room.kind() != RoomKind::Status)
    }

    /// The rooms to be continued, once half of the bound is free.
    pub fn take_lagging(&self) -> SmallVec<[RoomId; 1]> {
        let mut queue = self.queue.lock();
        if queue.lagging.is_empty() || !queue.has_room(self.bytes_max) {
            return SmallVec::new();
        }
        std::mem::take(&mut queue.lagging)
    }

    /// Ends the connection from anywhere: what waits is sent, then a close frame.
    pub fn close(&self, close: Close) {
        let mut queue = self.queue.lock();
        if queue.close.is_none() && !queue.closed {
            queue.close = Some(close);
            self.wake.notify_one();
        }
    }

    /// Whether a close was asked for, or nothing is taken any more.
    pub fn is_closing(&self) -> bool {
        let queue = self.queue.lock();
        queue.closed || queue.close.is_some()
    }

    /// The close that was asked for, once: its frame is queued, and nothing is taken after it.
    pub fn begin_close(&self) -> Option<Close> {
        let mut queue = self.queue.lock();
        let close = queue.close.take()?;
        queue.add(match close.code {
            // Never sent: it stands for a close frame without a code (RFC 6455, section 7.1.5).
            1005 => skein_websocket::encode(Opcode::Close, &[]),
            code => skein_websocket::encode_close(code, &close.reason),
        });
        queue.closed = true;
        Some(close)
    }

    /// Takes nothing any more and forgets what waits: the socket is gone.
    pub fn discard(&self) {
        *self.queue.lock() = OutboxState { closed: true, ..OutboxState::default() };
        if let Sink::Socket(socket) = &self.sink {
            // Others may hold this outbox for a while longer.
            let _ = socket2::SockRef::from(socket).shutdown(std::net::Shutdown::Both);
        }
    }

    /// The socket, for the connection's task to read from.
    ///
    /// `None` for an outbox without one.
    pub fn socket(&self) -> Option<&TcpStream> {
        match &self.sink {
            Sink::Socket(socket) => Some(socket),
            Sink::Owner => None,
        }
    }

    /// Everything that waits, for the owner of an outbox without a socket.
    pub fn take(&self) -> Vec<Bytes> {
        let mut queue = self.queue.lock();
        queue.bytes = queue.held;
        queue.frames.take()
    }

    /// Takes as many frames as `bytes_max` holds, and at least one, for the owner of an outbox without
    /// a socket. The owner counts what it makes of them with [`Outbox::count_held`].
    pub fn take_up_to(&self, bytes_max: usize) -> Vec<Bytes> {
        let mut queue = self.queue.lock();
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(frame) = queue.frames.first() {
            bytes += frame.len() + FRAME_OVERHEAD_BYTES;
            if bytes > bytes_max && !taken.is_empty() {
                break;
            }
            queue.bytes -= frame.len() + FRAME_OVERHEAD_BYTES;
            taken.extend(queue.frames.pop());
        }
        taken
    }

    /// Counts bytes that an owner holds until its client has taken them, so that the bound of the
    /// queue is that of both.
    pub fn count_held(&self, bytes: usize) {
        let mut queue = self.queue.lock();
        queue.held += bytes;
        queue.bytes += bytes;
    }

    /// Counts bytes no more that were [held](Outbox::count_held), and wakes the owner.
    pub fn release_held(&self, bytes: usize) {
        let mut queue = self.queue.lock();
        // All is forgotten once the outbox is discarded.
        let bytes = bytes.min(queue.held);
        queue.held -= bytes;
        queue.bytes -= bytes;
        self.wake.notify_one();
    }

    /// Whether the owner holds something that its client has not taken.
    pub fn has_held(&self) -> bool {
        self.queue.lock().held > 0
    }

    /// How long the socket has taken nothing.
    pub fn stalled(&self, now: Instant) -> Duration {
        self.blocked_since().map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    fn write(&self, queue: &mut OutboxState) {
        let Sink::Socket(socket) = &self.sink else {
            // There is something to take.
            self.wake.notify_one();
            return;
        };
        while !queue.frames.is_empty() {
            let written = match queue.frames.only() {
                _ if queue.writes_portions() => {
                    link::write_portion(socket, &queue.frames.slices(link::PORTION_BYTES))
                }
                Some(frame) => socket.try_write(frame),
                None => socket.try_write_vectored(&queue.frames.slices(usize::MAX)),
            };
            match written {
                Ok(written) => {
                    let frames = queue.remove(written);
                    let was_full = queue.blocked_since.take().is_some();
                    if let Some(link) = &mut queue.link
                        && link.is_measured()
                        && let Some(buffer) = link.socket_took(written, was_full, Instant::now())
                    {
                        // It only makes answers faster.
                        let _ = socket2::SockRef::from(socket).set_send_buffer_size(buffer);
                    }
                    self.metrics.frames_sent.inc_by(frames);
                    self.metrics.bytes_sent.inc_by(written as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let since = *queue.blocked_since.get_or_insert_with(Instant::now);
                    queue.link.get_or_insert_default().socket_filled(since);
                    return;
                }
                // The reading side meets the same end and tells why.
                Err(_) => {
                    *queue = OutboxState { closed: true, ..OutboxState::default() };
                    self.wake.notify_one();
                    return;
                }
            }
        }
        queue.blocked_since = None;
        if let Some(link) = &mut queue.link {
            link.queue_emptied();
        }
        if !queue.lagging.is_empty() {
            // Whoever wrote, the connection's task is the one to ask for more.
            self.wake.notify_one();
        }
    }
}

impl OutboxState {
    /// Whether little is to be in the kernel: so much waits that an answer would come late on a slow
    /// link, or the socket was full.
    fn writes_portions(&self) -> bool {
        self.bytes > BULK_BYTES || self.link.as_ref().is_some_and(|link| link.is_measured())
    }

    fn has_room(&self, bytes_max: usize) -> bool {
        self.bytes <= bytes_max / 2
    }

    fn add(&mut self, frame: Bytes) {
        if !self.closed {
            self.bytes += frame.len() + FRAME_OVERHEAD_BYTES;
            self.frames.push(frame);
        }
    }

    /// As [`OutboxState::add`], ahead of what waits for a socket that takes nothing.
    fn add_ahead(&mut self, frame: Bytes) {
        if self.blocked_since.is_none() {
            self.add(frame);
        } else if !self.closed {
            self.bytes += frame.len() + FRAME_OVERHEAD_BYTES;
            self.frames.push_ahead(frame);
        }
    }

    /// Forgets the first `written` bytes. Returns how many frames are done with.
    fn remove(&mut self, written: usize) -> u64 {
        let done = self.frames.remove(written);
        self.bytes -= written + done as usize * FRAME_OVERHEAD_BYTES;
        if self.frames.ahead() == 0
            && let Some(pong) = self.pong.take()
        {
            self.bytes += pong.len() + FRAME_OVERHEAD_BYTES;
            self.frames.push_ahead(*pong);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outbox(bytes_max: usize) -> Outbox {
        Outbox::to_owner(bytes_max, Arc::default())
    }

    #[test]
    fn entries_are_refused_when_full_and_answers_are_not() {
        let outbox = outbox(2 * FRAME_OVERHEAD_BYTES + 10);
        assert_eq!(outbox.offer(&Bytes::from_static(b"1234")), OfferResult::First);
        assert_eq!(outbox.offer(&Bytes::from_static(b"1234")), OfferResult::Queued);
        assert_eq!(outbox.offer(&Bytes::from_static(b"123")), OfferResult::Full);
        outbox.push(Bytes::from_static(b""));
        assert!(outbox.is_full());
        assert_eq!(outbox.take().len(), 3);
        assert!(!outbox.is_full());
    }

    #[test]
    fn small_frames_count_what_they_take() {
        let outbox = outbox(100 * FRAME_OVERHEAD_BYTES);
        let mut pongs = 0;
        while !outbox.is_full() {
            outbox.push(skein_websocket::encode(Opcode::Pong, &[]));
            pongs += 1;
        }
        assert!(pongs <= 100, "{pongs} empty pongs fit");
    }

    #[test]
    fn a_frame_above_the_bound_passes_alone() {
        let outbox = outbox(4);
        assert_eq!(outbox.offer(&Bytes::from_static(b"12345678")), OfferResult::First);
        assert_eq!(outbox.offer(&Bytes::from_static(b"1")), OfferResult::Full);
    }

    #[test]
    fn laggards_are_given_more_when_half_is_free() {
        let outbox = outbox(FRAME_OVERHEAD_BYTES + 10);
        let room: RoomId = "r".parse().unwrap();
        assert_eq!(outbox.offer(&Bytes::from_static(b"1234567890")), OfferResult::First);
        outbox.mark_lagging(room.clone());
        outbox.mark_lagging(room.clone());
        assert!(outbox.take_lagging().is_empty());
        outbox.take();
        assert_eq!(outbox.take_lagging().as_slice(), &[room]);
        assert!(outbox.take_lagging().is_empty());
    }

    #[test]
    fn what_an_owner_holds_counts_until_it_is_released() {
        let outbox = outbox(4 * FRAME_OVERHEAD_BYTES);
        for frame in ["1", "2", "3"] {
            assert_ne!(outbox.offer(&Bytes::from_static(frame.as_bytes())), OfferResult::Full);
        }
        assert_eq!(outbox.take_up_to(2 * FRAME_OVERHEAD_BYTES + 2), ["1", "2"]);
        outbox.count_held(300);
        assert!(outbox.has_held() && outbox.is_full() == (300 + FRAME_OVERHEAD_BYTES + 1 >= 384));
        assert_eq!(outbox.offer(&Bytes::from_static(b"4")), OfferResult::Full);
        assert_eq!(outbox.take_up_to(0), ["3"]);
        outbox.release_held(300);
        assert_eq!((outbox.bytes(), outbox.has_held()), (0, false));
        outbox.count_held(10);
        outbox.discard();
        outbox.release_held(10);
        assert_eq!(outbox.bytes(), 0);
    }

    #[test]
    fn after_the_close_frame_nothing_is_taken() {
        let outbox = outbox(100);
        outbox.push(Bytes::from_static(b"before"));
        outbox.close(Close { code: 1008, reason: "forbidden".into() });
        outbox.close(Close { code: 1000, reason: String::new() });
        assert_eq!(outbox.begin_close().unwrap().code, 1008);
        outbox.push(Bytes::from_static(b"after"));
        let frames = outbox.take();
        assert_eq!(frames.len(), 2);
        assert_eq!(frames[1], skein_websocket::encode_close(1008, "forbidden"));
    }

    #[test]
    fn answers_overtake_entries_that_the_socket_does_not_take() {
        let outbox = outbox(1 << 20);
        let frame = |text: &'static str| Bytes::from_static(text.as_bytes());
        assert_eq!(outbox.offer(&frame("1")), OfferResult::First);
        outbox.push_ahead(frame("2"));
        assert_eq!(outbox.take(), ["1", "2"], "the socket takes all of it anyway");
        outbox.queue.lock().blocked_since = Some(Instant::now());
        assert_eq!(outbox.offer(&frame("entry")), OfferResult::First);
        outbox.push(frame("joined"));
        outbox.push_ahead(frame("ack 1"));
        outbox.push_pong(frame("pong"));
        outbox.push_ahead(frame("ack 2"));
        assert_eq!(outbox.take(), ["ack 1", "pong", "ack 2", "entry", "joined"]);
        assert_eq!(outbox.bytes(), 0);
    }

    #[test]
    fn pongs_that_are_not_read_take_little_and_the_latest_is_sent() {
        let outbox = outbox(1 << 20);
        outbox.queue.lock().blocked_since = Some(Instant::now());
        outbox.push(Bytes::from_static(b"bulk"));
        for i in 0..10_000_u16 {
            outbox.push_pong(skein_websocket::encode(Opcode::Pong, &[&i.to_be_bytes()]));
        }
        assert!(outbox.bytes() < 2000, "{} bytes", outbox.bytes());
        // The socket takes what is ahead.
        let mut queue = outbox.queue.lock();
        queue.remove(4 * AHEAD_MAX as usize);
        drop(queue);
        let latest = skein_websocket::encode(Opcode::Pong, &[&9_999_u16.to_be_bytes()]);
        assert_eq!(outbox.take(), [latest, Bytes::from_static(b"bulk")]);
    }

    #[tokio::test]
    async fn what_the_socket_does_not_take_is_written_later_and_in_order() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (socket, _) = listener.accept().await.unwrap();
        let outbox = Outbox::to_socket(socket, usize::MAX, Arc::default());
        let mut expected = Vec::new();
        for i in 0..2_000_u32 {
            let frame: Vec<u8> = i.to_be_bytes().repeat(2_500);
            expected.extend_from_slice(&frame);
            outbox.push(frame.into());
        }
        outbox.flush();
        assert!(outbox.blocked_since().is_some(), "20 MB do not fit a socket's buffer");
        let mut received = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        while received.len() < expected.len() {
            tokio::select! {
                _ = client.readable() => {
                    if let Ok(n) = client.try_read(&mut buffer) {
                        received.extend_from_slice(&buffer[..n]);
                    }
                }
                _ = outbox.socket().unwrap().writable(), if outbox.bytes() > 0 => {
                    outbox.flush_writable();
                }
            }
        }
        assert!(received == expected);
        assert!(outbox.blocked_since().is_none());
    }
}
