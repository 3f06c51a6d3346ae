//! Clients of the bench: many connections on one thread and one epoll, which send, receive and
//! count.
//!
//! The module does not use tokio's sockets: a task and a wake-up per read would cost more than the
//! servers under test, and tokio's timers have a resolution of a millisecond. An open-loop load
//! waits for the due time by polling the clock, so it needs a core of its own.
//!
//! Latency counts from when a message was *due*. Sent messages are counted per room and deliveries
//! per connection; missing ones are reported.

use std::{
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    time::Duration,
};

use hdrhistogram::Histogram;
use mio::{Events, Interest, Poll, Token, net::TcpStream};
use tokio::time::Instant;

use super::{
    client::{self, ClientError},
    rows::{BenchLoad, CONTENT_BYTES, LoadModel},
};
use crate::{
    timestamp::SendTimestamp,
    websocket::{self, FrameReader, WsFrame},
};

pub(crate) mod failover;

use failover::FailoverGroup;

/// Time limit for pending deliveries after the last message.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for an event, after which the clock is read.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// The last part of the wait for a due time, which polls without sleeping.
const SPIN: Duration = Duration::from_millis(2);
/// Upper bound of a recorded latency.
const LATENCY_MAX: Duration = Duration::from_secs(60);

/// Connections in rooms.
pub(crate) struct BenchClients {
    poll: Poll,
    /// Connection `i` is in room `i % rooms`.
    connections: Vec<BenchConnection>,
    /// Messages sent into each room, and in all.
    sent: Vec<u64>,
    sent_in_all: u64,
    load: BenchLoad,
    began: Instant,
    buffer: Box<[u8]>,
    counters: LoadCounters,
    /// Whether a client sends the next message when it receives its own copy of one.
    is_closed_loop: bool,
    /// Number of connections that send at a rate: the first ones.
    senders: usize,
    failover: Option<FailoverGroup>,
}

struct BenchConnection {
    stream: TcpStream,
    reader: FrameReader,
    /// Bytes that the socket did not accept yet.
    unsent: Vec<u8>,
    received: u64,
    /// Whether the server has closed.
    is_closed: bool,
}

/// Counters of one measurement.
struct LoadCounters {
    deliveries: u64,
    latency_ns: Histogram<u64>,
    /// How late messages were sent.
    lateness_ns: Histogram<u64>,
}

/// Result of a measurement.
pub(crate) struct LoadResult<T> {
    /// Values of `snapshot` at the beginning and at the end of the measurement.
    pub(crate) snapshots: (T, T),
    pub(crate) measured: Duration,
    pub(crate) deliveries: u64,
    pub(crate) latency_ns: Histogram<u64>,
    pub(crate) lateness_ns: Histogram<u64>,
    /// During the whole load: expected deliveries, and deliveries that were missing or duplicated.
    pub(crate) expected: u64,
    pub(crate) wrong: u64,
}

/// Durations of a load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BenchTimes {
    /// Before the measurement.
    pub(crate) warm_up: Duration,
    pub(crate) measured: Duration,
}

impl BenchClients {
    /// Opens all connections one after the other, and joins their rooms.
    pub(crate) fn open(load: BenchLoad, addresses: &[SocketAddr]) -> Result<Self, ClientError> {
        let poll = Poll::new()?;
        let mut connections = Vec::new();
        for index in 0..load.rooms * load.members {
            let address = addresses[index / load.rooms % addresses.len()];
            let (stream, reader) = client::join(address, index, &room(index % load.rooms))?;
            stream.set_nonblocking(true)?;
            let mut stream = TcpStream::from_std(stream);
            let interest = Interest::READABLE | Interest::WRITABLE;
            poll.registry().register(&mut stream, Token(index), interest)?;
            let unsent = Vec::new();
            connections.push(BenchConnection {
                stream,
                reader,
                unsent,
                received: 0,
                is_closed: false,
            });
        }
        Ok(Self {
            poll,
            senders: connections.len(),
            connections,
            sent: vec![0; load.rooms],
            sent_in_all: 0,
            load,
            began: Instant::now(),
            buffer: vec![0; 256 * 1024].into(),
            counters: LoadCounters::new(),
            is_closed_loop: false,
            failover: None,
        })
    }

    fn begin(&mut self) {
        self.began = Instant::now();
    }

    fn take_counters(&mut self) -> LoadCounters {
        std::mem::replace(&mut self.counters, LoadCounters::new())
    }

    /// Runs the load. `snapshot` is read before and after the measurement.
    pub(crate) fn run_load<T, E: From<ClientError>>(
        &mut self,
        times: BenchTimes,
        snapshot: impl Fn() -> Result<T, E>,
    ) -> Result<LoadResult<T>, E> {
        self.begin();
        let mut next = 0;
        if let LoadModel::ClosedLoop { senders, in_flight } = self.load.model {
            self.is_closed_loop = true;
            for _ in 0..in_flight {
                for index in 0..senders * self.load.rooms {
                    self.send(index, self.now());
                }
            }
        }
        self.run(times.warm_up, &mut next)?;
        let before = snapshot()?;
        let _ = self.take_counters();
        let begin = self.began.elapsed();
        self.run(times.warm_up + times.measured, &mut next)?;
        let after = snapshot()?;
        let measured = self.began.elapsed() - begin;
        let counters = self.take_counters();
        self.is_closed_loop = false;
        self.drain()?;
        let (expected, wrong) = self.count_missing();
        Ok(LoadResult {
            snapshots: (before, after),
            measured,
            deliveries: counters.deliveries,
            latency_ns: counters.latency_ns,
            lateness_ns: counters.lateness_ns,
            expected,
            wrong,
        })
    }

    /// Sends due messages and handles events, until `until` after the start.
    fn run(&mut self, until: Duration, next: &mut u64) -> Result<(), ClientError> {
        let mut events = Events::with_capacity(1024);
        loop {
            let now = self.began.elapsed();
            if until <= now {
                return Ok(());
            }
            let mut wait = (until - now).min(POLL_INTERVAL);
            if let LoadModel::OpenLoop(rate) = self.load.model {
                let due = |next: u64| Duration::from_secs_f64(next as f64 / f64::from(rate));
                while due(*next) <= now {
                    let index = (*next % self.senders as u64) as usize;
                    self.send(index, due(*next).as_nanos() as u64);
                    *next += 1;
                }
                wait = wait.min((due(*next) - now).saturating_sub(SPIN));
            }
            self.reconnect_due()?;
            self.poll(&mut events, wait)?;
        }
    }

    /// Handles events until all deliveries have arrived, at most for the time limit.
    fn drain(&mut self) -> Result<(), ClientError> {
        let mut events = Events::with_capacity(1024);
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        while self.count_missing().1 > 0 && Instant::now() < deadline {
            self.poll(&mut events, POLL_INTERVAL)?;
        }
        Ok(())
    }

    fn count_missing(&self) -> (u64, u64) {
        count_missing(&self.sent, self.connections.iter().map(|connection| connection.received))
    }

    fn poll(&mut self, events: &mut Events, wait: Duration) -> Result<(), ClientError> {
        match self.poll.poll(events, Some(wait)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            other => other?,
        }
        for event in &*events {
            let index = event.token().0;
            match self.connections[index].flush() {
                Err(_) if self.on_connection_lost(index) => continue,
                flushed => flushed?,
            }
            if event.is_readable() {
                self.receive(index)?;
            }
        }
        Ok(())
    }

    fn receive(&mut self, index: usize) -> Result<(), ClientError> {
        loop {
            let connection = &mut self.connections[index];
            let count = match connection.stream.read(&mut self.buffer) {
                Ok(0) => {
                    connection.is_closed = true;
                    self.on_connection_lost(index);
                    return Ok(());
                }
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(_) if self.on_connection_lost(index) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let buffer = std::mem::take(&mut self.buffer);
            let may_have_more = self.read(index, &buffer[..count]);
            self.buffer = buffer;
            // A short read has emptied the socket.
            if !may_have_more? || count < self.buffer.len() {
                return Ok(());
            }
        }
    }

    /// Handles received bytes. Returns whether the socket may have more.
    fn read(&mut self, index: usize, bytes: &[u8]) -> Result<bool, ClientError> {
        let Some(bytes) = self.read_handshake(index, bytes)? else { return Ok(false) };
        let connection = &mut self.connections[index];
        let now = self.began.elapsed();
        let now_ns = now.as_nanos() as u64;
        let (counters, mut own, mut pongs) = (&mut self.counters, 0, Vec::new());
        let failover = &mut self.failover;
        connection.reader.push(bytes, |received| match received {
            WsFrame::Message(message) => {
                let Some(message) = message else { return };
                if let Some(failover) = failover
                    && let Some(count) = failover.take(index, &message, now)
                {
                    connection.received += count;
                    counters.deliveries += count;
                    return;
                }
                let Some(timestamp) = SendTimestamp::find(&message) else { return };
                connection.received += 1;
                counters.deliveries += 1;
                counters.latency_ns.saturating_record(now_ns.saturating_sub(timestamp.due_ns));
                own += usize::from(timestamp.sender as usize == index);
            }
            WsFrame::Ping(payload) => pongs.extend(websocket::pong(&payload)),
            WsFrame::Pong(_) => {}
            WsFrame::Close(..) => connection.is_closed = true,
        })?;
        if !pongs.is_empty() {
            connection.send(&pongs)?;
        }
        if self.is_closed_loop {
            for _ in 0..own {
                self.send(index, now_ns);
            }
        }
        Ok(true)
    }

    fn send(&mut self, index: usize, due_ns: u64) {
        let in_room = index % self.load.rooms;
        let timestamp = SendTimestamp { sender: index as u32, due_ns };
        let frame = message(&room(in_room), self.sent_in_all, timestamp);
        self.sent[in_room] += 1;
        self.sent_in_all += 1;
        self.counters.lateness_ns.saturating_record(self.now().saturating_sub(due_ns));
        // A lost connection is noticed by missing deliveries.
        let _ = self.connections[index].send(&frame);
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }
}

impl BenchConnection {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.unsent.extend_from_slice(bytes);
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() && !self.is_closed {
            match self.stream.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl LoadCounters {
    fn new() -> Self {
        Self { deliveries: 0, latency_ns: histogram(), lateness_ns: histogram() }
    }
}

/// Expected deliveries, and missing or duplicated ones. Connection `i` is in room `i % rooms`, and
/// receives all messages of it.
fn count_missing(sent: &[u64], received: impl Iterator<Item = u64>) -> (u64, u64) {
    received.enumerate().fold((0, 0), |(expected, wrong), (index, received)| {
        let sent = sent[index % sent.len()];
        (expected + sent, wrong + received.abs_diff(sent))
    })
}

/// An empty histogram of times in nanoseconds.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(LATENCY_MAX.as_nanos() as u64, 3).expect("3 digits are possible")
}

/// Name of a room.
fn room(number: usize) -> String {
    format!("bench-{number:04}")
}

/// A `message` frame with an id of its own.
fn message(room: &str, number: u64, timestamp: SendTimestamp) -> Vec<u8> {
    let content = timestamp.content(CONTENT_BYTES);
    websocket::text(&format!(
        r#"{{"type":"message","room":"{room}","id":"00000000-0000-4000-8000-{number:012x}","content":"{content}"}}"#
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_duplicated_deliveries_do_not_cancel_out() {
        // Connections are in rooms 0 and 1 in turn.
        assert_eq!(count_missing(&[10, 3], [10, 3, 10, 3].into_iter()), (26, 0));
        assert_eq!(count_missing(&[10, 3], [9, 4, 10, 3].into_iter()), (26, 2));
    }

    #[test]
    fn histogram_has_three_digits_up_to_a_minute() {
        let mut times = histogram();
        for us in 1..=10_000 {
            times.saturating_record(us * 1_000);
        }
        let near = |quantile, us: u64| {
            let ns = times.value_at_quantile(quantile);
            assert!(ns.abs_diff(us * 1_000) <= us, "{ns} ns are not {us} µs");
        };
        near(0.5, 5_000);
        near(0.99, 9_900);
        near(0.999, 9_990);
        times.saturating_record(u64::MAX);
        assert!(times.max() >= LATENCY_MAX.as_nanos() as u64);
    }

    #[test]
    fn gateway_accepts_messages_of_the_bench() {
        use skein_protocol::protocol::client_frame::{ClientFrame, FrameBody};
        use skein_websocket::Decoder;
        let timestamp = SendTimestamp { sender: 7, due_ns: 9 };
        let mut frame = message(&room(3), 1 << 40, timestamp);
        let mut decoder = Decoder::new(1 << 16);
        let (_, received) = decoder.next(&mut frame).unwrap();
        let Some(skein_websocket::DecoderEvent::Text(text)) = received else {
            panic!("{received:?}")
        };
        assert!(matches!(ClientFrame::from_text(text).unwrap().body, FrameBody::Message(_)));
        assert_eq!(SendTimestamp::find(text.as_bytes()), Some(timestamp));
    }
}
