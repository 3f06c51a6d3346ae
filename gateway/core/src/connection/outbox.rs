//! The queue of frames in front of one client's socket.
//!
//! Every message to a client leaves the gateway here. Frames are shared bytes in the outbox's
//! [`Encoding`], so that a push costs a reference count. [`Outbox::flush`] writes everything queued
//! in one vectored write, from the task that pushed last. If the socket takes no more, the
//! connection's own task waits for it and continues.
//!
//! The queue is bounded in bytes. When it is full:
//! - An entry of a log is not taken ([`Outbox::offer`]): its reader is a slow consumer, and
//!   receives the entry from the ring or the log once the socket has drained. Nothing is lost, and
//!   memory is bounded.
//! - A reply to the client's own frame is taken ([`Outbox::push`]), but the connection's task reads
//!   no further frame until there is space, so that replies are bounded by the input of one read.
//!
//! Beside the frames stand the [`Signal`]s to the connection's task, since one of them waits for
//! space in the queue.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::value::RawValue;
use skein_protocol::protocol::server_frame::ServerFrame;
use skein_websocket::Opcode;
use smallvec::SmallVec;
use tokio::{net::TcpStream, sync::Notify, time::Instant};

use super::{
    encoding::{Encoding, SharedFrame},
    signals::{Signal, SignalQueue},
};
use crate::telemetry::metrics::Metrics;

mod frame_queue;
mod link;

use frame_queue::FrameQueue;
use link::PeerLink;
pub use link::limit_unsent_bytes;

/// The memory of a queued frame besides its own bytes: its slot in the queue and its allocation. An
/// empty pong would otherwise count two bytes and take a hundred.
pub const FRAME_OVERHEAD_BYTES: usize = 96;

/// The queue length in bytes above which a client is catching up, instead of messages merely
/// gathering.
const BULK_BYTES: usize = 64 * 1024;

/// The number of frames put ahead of the queue from which a further pong replaces the one before it
/// (RFC 6455, section 5.5.3, allows to answer only the latest ping).
const AHEAD_MAX: u32 = 16;

/// The destination of an outbox's frames.
#[derive(Debug)]
enum Sink {
    Socket(TcpStream),
    /// None: the owner takes the frames ([`Outbox::take`]).
    Owner,
}

/// The close that ends a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// The close code.
    pub code: u16,
    /// The reason: one word, or empty.
    pub reason: String,
}

/// The outcome of offering an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum OfferResult {
    /// The frame is alone in the queue, and the caller must see to its flush.
    First,
    /// The frame is behind others, and the flush of those writes it too.
    Queued,
    /// The queue is full, and the frame was not taken.
    Full,
}

/// The outbox of one connection.
#[derive(Debug)]
pub struct Outbox {
    sink: Sink,
    bytes_max: usize,
    encoding: Encoding,
    metrics: Arc<Metrics>,
    queue: Mutex<OutboxState>,
    /// Wakes the connection's task: to wait for the socket, to catch up, or to close.
    wake: Notify,
    /// Frames that the client has been sent, modulo 2^32.
    sent: AtomicU32,
}

#[derive(Debug, Default)]
struct OutboxState {
    frames: FrameQueue,
    bytes: usize,
    /// The part of `bytes` that the owner of an outbox without a socket has taken and still holds.
    held: usize,
    /// The time since which the socket has taken nothing. While it is set, only the connection's
    /// task writes.
    blocked_since: Option<Instant>,
    /// The rate of the peer's link, known once the socket was full.
    link: Option<Box<PeerLink>>,
    /// The latest pong, while too many frames are ahead of the others.
    pong: Option<Box<Bytes>>,
    signals: SignalQueue,
    close: Option<Close>,
    /// The socket is closed or the close frame is queued: nothing more is taken.
    closed: bool,
}

impl Outbox {
    /// An outbox that writes to `socket` and takes entries up to `bytes_max`.
    pub fn to_socket(socket: TcpStream, bytes_max: usize, metrics: Arc<Metrics>) -> Self {
        Self::new(Sink::Socket(socket), bytes_max, metrics)
    }

    /// An outbox whose owner takes the frames.
    pub fn to_owner(bytes_max: usize, metrics: Arc<Metrics>) -> Self {
        Self::new(Sink::Owner, bytes_max, metrics)
    }

    fn new(sink: Sink, bytes_max: usize, metrics: Arc<Metrics>) -> Self {
        let (queue, wake, sent) = (Mutex::default(), Notify::new(), 0.into());
        Self { sink, bytes_max, encoding: Encoding::WebSocket, metrics, queue, wake, sent }
    }

    /// Sets the encoding of the frames; without it, they are WebSocket frames.
    pub fn with_encoding(self, encoding: Encoding) -> Self {
        Self { encoding, ..self }
    }

    /// The encoding of the frames.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Encodes a frame for this outbox alone.
    pub fn encode(&self, frame: &ServerFrame<Box<RawValue>>) -> Bytes {
        self.encoding.encode(frame, &self.metrics)
    }

    /// A shared frame in the encoding of this outbox.
    pub fn encoded<'f>(&self, frame: &'f mut SharedFrame<'_>) -> &'f Bytes {
        frame.encoded(self.encoding, &self.metrics)
    }

    /// Queues an encoded reply to the client's own frame, however full the queue is.
    pub fn push(&self, frame: Bytes) {
        self.queue.lock().add(frame);
    }

    /// Queues an encoded reply that has no order relative to other frames; it overtakes them if the
    /// socket takes no more.
    pub fn push_ahead(&self, frame: Bytes) {
        self.queue.lock().add_ahead(frame);
    }

    /// Queues a WebSocket message that is no frame of the protocol.
    pub fn push_message(&self, message: Bytes) {
        self.push(match self.encoding {
            Encoding::Deflate(options) => options.frame(&message, &self.metrics),
            Encoding::WebSocket | Encoding::Json => message,
        });
    }

    /// Queues a pong. A client that does not read receives a few pongs and the latest one.
    pub fn push_pong(&self, frame: Bytes) {
        let mut queue = self.queue.lock();
        if queue.frames.ahead() < AHEAD_MAX {
            queue.add_ahead(frame);
        } else if !queue.closed {
            queue.pong = Some(Box::new(frame));
        }
    }

    /// Queues an encoded entry of a log, unless the queue is full.
    pub fn offer(&self, frame: &Bytes) -> OfferResult {
        let mut queue = self.queue.lock();
        // A frame larger than the whole bound must pass if nothing else is queued.
        let bytes = frame.len() + FRAME_OVERHEAD_BYTES;
        if queue.bytes > 0 && queue.bytes + bytes > self.bytes_max {
            return OfferResult::Full;
        }
        let first = queue.frames.is_empty();
        queue.add(frame.clone());
        if first { OfferResult::First } else { OfferResult::Queued }
    }

    /// Whether the queue is so long that no further frame of the client should be read.
    pub fn is_full(&self) -> bool {
        self.queue.lock().bytes >= self.bytes_max
    }

    /// Whether at least half of the bound is free.
    pub fn has_space(&self) -> bool {
        self.queue.lock().has_space(self.bytes_max)
    }

    /// The size of the queue in bytes, including [`FRAME_OVERHEAD_BYTES`] per frame.
    pub fn bytes(&self) -> usize {
        self.queue.lock().bytes
    }

    /// The number of queued frames.
    pub fn frames(&self) -> usize {
        self.queue.lock().frames.len()
    }

    /// Writes as much of the queue as the socket takes. Never blocks.
    pub fn flush(&self) {
        let mut queue = self.queue.lock();
        if queue.blocked_since.is_none() {
            self.write(&mut queue);
            if queue.blocked_since.is_some() {
                self.wake.notify_one();
            }
        }
    }

    /// As [`Outbox::flush`], for the connection's task once the socket is writable.
    pub fn flush_writable(&self) {
        self.write(&mut self.queue.lock());
    }

    /// Wakes the connection's task to flush and to check its deadlines.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Waits until the outbox needs the connection's task. Cancel-safe.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }

    /// The time since which the socket has taken nothing of a non-empty queue.
    pub fn blocked_since(&self) -> Option<Instant> {
        self.queue.lock().blocked_since
    }

    /// The last time at which the peer was seen to acknowledge bytes: the socket took some after it
    /// had taken none. `None` if it never was full.
    pub fn last_progress(&self) -> Option<Instant> {
        self.queue.lock().link.as_ref()?.last_progress()
    }

    /// Sends a signal to the connection's task, and wakes it.
    pub fn signal(&self, signal: Signal) {
        self.queue.lock().signals.push(signal);
        self.wake.notify_one();
    }

    /// Removes a signal that the connection's task has not taken.
    pub fn cancel_signal(&self, signal: &Signal) {
        self.queue.lock().signals.cancel(signal);
    }

    /// Takes the evictions among the signals.
    pub fn take_evictions(&self) -> SmallVec<[Signal; 1]> {
        self.queue.lock().signals.take_evictions()
    }

    /// Takes the other signals: a catch-up once half of the bound is free, all others at once.
    pub fn take_signals(&self) -> SmallVec<[Signal; 1]> {
        let mut queue = self.queue.lock();
        let has_space = queue.has_space(self.bytes_max);
        queue.signals.take(has_space)
    }

    /// Whether a room waits for catch-up.
    pub fn is_lagging(&self) -> bool {
        self.queue.lock().signals.is_lagging()
    }

    /// Closes the connection from any task: the queue is sent, then a close frame.
    pub fn close(&self, close: Close) {
        let mut queue = self.queue.lock();
        if queue.close.is_none() && !queue.closed {
            queue.close = Some(close);
            self.wake.notify_one();
        }
    }

    /// Whether a close was requested, or the outbox is closed.
    pub fn is_closing(&self) -> bool {
        let queue = self.queue.lock();
        queue.closed || queue.close.is_some()
    }

    /// Takes the requested close, once: its frame is queued if the encoding has one, and nothing is
    /// taken after it.
    pub fn begin_close(&self) -> Option<Close> {
        let mut queue = self.queue.lock();
        let close = queue.close.take()?;
        match close.code {
            _ if self.encoding == Encoding::Json => {}
            // Never sent: it stands for a close frame without a code (RFC 6455, section 7.1.5).
            1005 => queue.add(skein_websocket::encode(Opcode::Close, &[])),
            code => queue.add(skein_websocket::encode_close(code, &close.reason)),
        }
        queue.closed = true;
        Some(close)
    }

    /// Closes the outbox and drops the queue: the socket is gone.
    pub fn discard(&self) {
        *self.queue.lock() = OutboxState { closed: true, ..OutboxState::default() };
        if let Sink::Socket(socket) = &self.sink {
            // Others may hold this outbox for a while longer.
            let _ = socket2::SockRef::from(socket).shutdown(std::net::Shutdown::Both);
        }
    }

    /// The socket, from which the connection's task reads.
    ///
    /// `None` for an outbox without a socket.
    pub fn socket(&self) -> Option<&TcpStream> {
        match &self.sink {
            Sink::Socket(socket) => Some(socket),
            Sink::Owner => None,
        }
    }

    /// Frames that the client has been sent, modulo 2^32.
    pub fn sent(&self) -> u32 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Takes the whole queue, for the owner of an outbox without a socket.
    pub fn take(&self) -> Vec<Bytes> {
        let mut queue = self.queue.lock();
        queue.bytes = queue.held;
        queue.frames.take()
    }

    /// Takes frames of at most `bytes_max` bytes, and at least one, for the owner of an outbox
    /// without a socket. The owner counts the bytes derived from them with [`Outbox::count_held`].
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
        self.sent.fetch_add(taken.len() as u32, Ordering::Relaxed);
        taken
    }

    /// Counts bytes that an owner holds until its client has taken them, so that one bound covers
    /// the queue and the owner.
    pub fn count_held(&self, bytes: usize) {
        let mut queue = self.queue.lock();
        queue.held += bytes;
        queue.bytes += bytes;
    }

    /// Releases bytes that were [counted](Outbox::count_held), and wakes the owner.
    pub fn release_held(&self, bytes: usize) {
        let mut queue = self.queue.lock();
        // A discarded outbox has forgotten all counts.
        let bytes = bytes.min(queue.held);
        queue.held -= bytes;
        queue.bytes -= bytes;
        self.wake.notify_one();
    }

    /// Whether the owner holds bytes that its client has not taken.
    pub fn has_held(&self) -> bool {
        self.queue.lock().held > 0
    }

    /// The time for which the socket has taken nothing.
    pub fn stalled(&self, now: Instant) -> Duration {
        self.blocked_since().map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    fn write(&self, queue: &mut OutboxState) {
        let Sink::Socket(socket) = &self.sink else {
            // Tell the owner that frames are queued.
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
                        // A failure only delays replies.
                        let _ = socket2::SockRef::from(socket).set_send_buffer_size(buffer);
                    }
                    self.sent.fetch_add(frames as u32, Ordering::Relaxed);
                    self.metrics.frames_sent.inc_by(frames);
                    self.metrics.bytes_sent.inc_by(written as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let since = *queue.blocked_since.get_or_insert_with(Instant::now);
                    queue.link.get_or_insert_default().socket_filled(since);
                    return;
                }
                // The reading side meets the same end and reports the reason.
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
        if queue.signals.is_lagging() {
            // Whichever task wrote, the connection's task requests the catch-up.
            self.wake.notify_one();
        }
    }
}

impl OutboxState {
    /// Whether the kernel should hold little: the queue is so long that a reply would be late on a
    /// slow link, or the socket was full.
    fn writes_portions(&self) -> bool {
        self.bytes > BULK_BYTES || self.link.as_ref().is_some_and(|link| link.is_measured())
    }

    fn has_space(&self, bytes_max: usize) -> bool {
        self.bytes <= bytes_max / 2
    }

    fn add(&mut self, frame: Bytes) {
        if !self.closed {
            self.bytes += frame.len() + FRAME_OVERHEAD_BYTES;
            self.frames.push(frame);
        }
    }

    /// As [`OutboxState::add`], ahead of the queue if the socket is blocked.
    fn add_ahead(&mut self, frame: Bytes) {
        if self.blocked_since.is_none() {
            self.add(frame);
        } else if !self.closed {
            self.bytes += frame.len() + FRAME_OVERHEAD_BYTES;
            self.frames.push_ahead(frame);
        }
    }

    /// Removes the first `written` bytes. Returns the number of completed frames.
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
    fn full_outbox_rejects_entries_and_takes_replies() {
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
    fn small_frames_count_their_overhead() {
        let outbox = outbox(100 * FRAME_OVERHEAD_BYTES);
        let mut pongs = 0;
        while !outbox.is_full() {
            outbox.push(skein_websocket::encode(Opcode::Pong, &[]));
            pongs += 1;
        }
        assert!(pongs <= 100, "{pongs} empty pongs fit");
    }

    #[test]
    fn frame_above_the_bound_passes_alone() {
        let outbox = outbox(4);
        assert_eq!(outbox.offer(&Bytes::from_static(b"12345678")), OfferResult::First);
        assert_eq!(outbox.offer(&Bytes::from_static(b"1")), OfferResult::Full);
    }

    #[tokio::test]
    async fn a_catch_up_is_taken_once_half_is_free() {
        let outbox = outbox(FRAME_OVERHEAD_BYTES + 10);
        let catch_up = Signal::CatchUp("r".parse().unwrap());
        assert_eq!(outbox.offer(&Bytes::from_static(b"1234567890")), OfferResult::First);
        outbox.signal(catch_up.clone());
        outbox.signal(catch_up.clone());
        outbox.signal(Signal::PublishAnswered);
        outbox.woken().await;
        assert_eq!(outbox.take_signals().as_slice(), &[Signal::PublishAnswered]);
        assert!(outbox.is_lagging() && outbox.take_signals().is_empty());
        outbox.take();
        assert_eq!(outbox.take_signals().as_slice(), &[catch_up]);
        assert!(!outbox.is_lagging() && outbox.take_signals().is_empty());
    }

    #[test]
    fn held_bytes_count_until_the_owner_releases_them() {
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
    fn outbox_takes_nothing_after_the_close_frame() {
        let outbox = outbox(100);
        outbox.push(Bytes::from_static(b"before"));
        outbox.close(Close { code: 1008, reason: "forbidden".into() });
        outbox.close(Close { code: 1000, reason: String::new() });
        assert_eq!(outbox.begin_close().unwrap().code, 1008);
        outbox.push(Bytes::from_static(b"after"));
        let frames = outbox.take();
        assert_eq!(frames.len(), 2);
        assert_eq!(frames[1], skein_websocket::encode_close(1008, "forbidden"));
        let stream = Outbox::to_owner(100, Arc::default()).with_encoding(Encoding::Json);
        stream.close(Close { code: 1008, reason: String::new() });
        assert!(stream.begin_close().is_some() && stream.take().is_empty());
    }

    #[test]
    fn replies_overtake_entries_of_a_blocked_socket() {
        let outbox = outbox(1 << 20);
        let frame = |text: &'static str| Bytes::from_static(text.as_bytes());
        assert_eq!(outbox.offer(&frame("1")), OfferResult::First);
        outbox.push_ahead(frame("2"));
        assert_eq!(outbox.take(), ["1", "2"], "the socket takes everything anyway");
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
    fn unread_pongs_are_bounded_and_the_latest_is_sent() {
        let outbox = outbox(1 << 20);
        outbox.queue.lock().blocked_since = Some(Instant::now());
        outbox.push(Bytes::from_static(b"bulk"));
        for i in 0..10_000_u16 {
            outbox.push_pong(skein_websocket::encode(Opcode::Pong, &[&i.to_be_bytes()]));
        }
        assert!(outbox.bytes() < 2000, "{} bytes", outbox.bytes());
        // The socket takes the frames put ahead.
        let mut queue = outbox.queue.lock();
        queue.remove(4 * AHEAD_MAX as usize);
        drop(queue);
        let latest = skein_websocket::encode(Opcode::Pong, &[&9_999_u16.to_be_bytes()]);
        assert_eq!(outbox.take(), [latest, Bytes::from_static(b"bulk")]);
    }

    #[tokio::test]
    async fn blocked_frames_are_written_later_in_order() {
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
        assert!(outbox.blocked_since().is_some(), "20 MB exceed the socket buffer");
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
