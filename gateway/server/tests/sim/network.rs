//! The gateway's ends of its connections: to Redis a stream of bytes, to a client a stream of
//! frames. Everything that gateways send becomes a network event, which the simulation delivers
//! later or not at all.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use parking_lot::Mutex;
use redis::{
    AsyncConnectionConfig, ErrorKind, IntoConnectionInfo as _, ProtocolVersion, RedisResult,
    aio::MultiplexedConnection,
};
use skein_core::bus::BoxFuture;
use skein_redis::topology::{Dial, ReadConnection};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Notify, oneshot},
};

use super::gate::Gate;

/// How long a connect may take, as in the gateway.
const CONNECT_MAX: Duration = Duration::from_secs(1);

/// An event that a gateway causes in the network.
pub enum NetworkEvent {
    /// A process connects to Redis.
    Connect {
        node: usize,
        process: u64,
        connection: u64,
        buffer: ReceiveBuffer,
        done: oneshot::Sender<()>,
    },
    /// Bytes for Redis.
    Bytes(u64, Bytes),
    /// The gateway has closed a connection to Redis.
    Closed(u64),
    /// Frames for a client.
    Frames(u64, Vec<Bytes>),
    /// The gateway has closed a client's connection.
    ClientClosed(u64),
}

/// The network events of all gateways. Cheap to clone.
#[derive(Clone, Default)]
pub struct EventQueue(Arc<EventQueueState>);

#[derive(Default)]
struct EventQueueState {
    events: Mutex<VecDeque<NetworkEvent>>,
    numbers: AtomicU64,
    filled: Notify,
}

impl EventQueue {
    pub fn push(&self, event: NetworkEvent) {
        self.0.events.lock().push_back(event);
        self.0.filled.notify_one();
    }

    pub fn pop(&self) -> Option<NetworkEvent> {
        self.0.events.lock().pop_front()
    }

    /// Waits until there may be an event.
    pub async fn filled(&self) {
        self.0.filled.notified().await;
    }

    /// A new id for a connection.
    pub fn next_id(&self) -> u64 {
        self.0.numbers.fetch_add(1, Ordering::Relaxed)
    }
}

/// Bytes that have arrived at a gateway on one connection and were not read. Cheap to clone.
#[derive(Clone, Default)]
pub struct ReceiveBuffer(Arc<Mutex<ReceiveBufferState>>);

#[derive(Default)]
struct ReceiveBufferState {
    bytes: BytesMut,
    closed: bool,
    reader: Option<Waker>,
}

impl ReceiveBuffer {
    pub fn put(&self, bytes: &[u8]) {
        let mut arrived = self.0.lock();
        arrived.bytes.extend_from_slice(bytes);
        arrived.wake();
    }

    pub fn close(&self) {
        let mut arrived = self.0.lock();
        arrived.closed = true;
        arrived.wake();
    }
}

impl ReceiveBufferState {
    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

/// The gateway's end of a connection to Redis.
struct SimStream {
    connection: u64,
    buffer: ReceiveBuffer,
    events: EventQueue,
}

impl AsyncRead for SimStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut arrived = self.buffer.0.lock();
        let count = arrived.bytes.len().min(buffer.remaining());
        if count > 0 {
            buffer.put_slice(&arrived.bytes[..count]);
            arrived.bytes.advance(count);
        } else if !arrived.closed {
            arrived.reader = Some(context.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SimStream {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.events.push(NetworkEvent::Bytes(self.connection, Bytes::copy_from_slice(bytes)));
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        self.events.push(NetworkEvent::Closed(self.connection));
    }
}

/// Makes the connections of one process.
#[derive(Clone)]
pub struct SimDial {
    pub node: usize,
    pub process: u64,
    pub gate: Gate,
    pub events: EventQueue,
}

impl SimDial {
    async fn open(self, config: AsyncConnectionConfig) -> RedisResult<MultiplexedConnection> {
        let Self { node, process, gate, events } = self;
        let (connection, buffer) = (events.next_id(), ReceiveBuffer::default());
        let (done, accepted) = oneshot::channel();
        let stream = SimStream { connection, buffer: buffer.clone(), events: events.clone() };
        events.push(NetworkEvent::Connect { node, process, connection, buffer, done });
        let info = "redis://simulated".into_connection_info()?;
        let info = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let open = async {
            if accepted.await.is_err() {
                return Err((ErrorKind::Io, "connection refused").into());
            }
            MultiplexedConnection::new_with_config(&info, stream, config).await
        };
        let opened = tokio::time::timeout(CONNECT_MAX, open).await;
        let (connection, driver) =
            opened.map_err(|_| (ErrorKind::Io, "no connection in time"))??;
        drop(gate.hold(Box::pin(driver)));
        Ok(connection)
    }
}

impl Dial for SimDial {
    fn connect(
        &self,
        config: AsyncConnectionConfig,
    ) -> BoxFuture<RedisResult<MultiplexedConnection>> {
        Box::pin(self.clone().open(config))
    }

    fn read_connection(&self) -> BoxFuture<RedisResult<ReadConnection>> {
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(CONNECT_MAX * 2));
        let connection = self.clone().open(config);
        Box::pin(async { connection.await.map(ReadConnection::Dedicated) })
    }

    fn server_name(&self) -> String {
        "simulated".to_owned()
    }

    fn moved(&self) -> BoxFuture<()> {
        Box::pin(std::future::pending())
    }
}
