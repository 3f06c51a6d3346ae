//! The ear of a node: one connection that is subscribed to the channels of the rooms followed.
//!
//! What arrives goes straight from the connection's driver to the mailboxes, which never block. The
//! loop here subscribes in batches, and after each reconnect subscribes to everything again and
//! then raises doubt: pub/sub has no memory, so that what was missed is read from the logs.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use redis::{PushInfo, PushKind, RedisError, RedisResult, Value, aio::MultiplexedConnection};
use shared::{envelope::Envelope, ids::RoomId};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Keyspace, RetryPause, Server,
    agreement::POKES,
    config,
    links::{Link, Links},
    probe,
};
use crate::{
    bus::{BoxFuture, BusError, Mailboxes},
    delivery::Entry,
    drain::Tasks,
};

/// The most channels in one SUBSCRIBE, so that a node with many rooms does not hold Redis up.
const CHANNELS_MAX: usize = 512;
/// How many calls may wait for the loop.
const QUEUE_LEN_MAX: usize = 4096;

/// A handle to the subscriber's task.
pub(super) struct Subscriber {
    queue: mpsc::Sender<Wish>,
}

/// What the node wants to hear, or no longer.
enum Wish {
    Follow(RoomId, oneshot::Sender<()>),
    Unfollow(RoomId),
}

pub(super) fn start(
    server: Arc<Server>,
    links: Arc<Links>,
    mailboxes: Mailboxes,
    tasks: &Tasks,
) -> Subscriber {
    let (queue, receiver) = mpsc::channel(QUEUE_LEN_MAX);
    let worker = Worker {
        server,
        links,
        mailboxes,
        queue: receiver,
        followed: BTreeSet::new(),
        unheard: Vec::new(),
    };
    let stopped = tasks.stopped().clone();
    tasks.spawn_service("redis_subscriber", worker.run(stopped));
    Subscriber { queue }
}

impl Subscriber {
    pub(super) fn follow(&self, room: RoomId) -> BoxFuture<Result<(), BusError>> {
        let queue = self.queue.clone();
        Box::pin(async move {
            let (heard, hears) = oneshot::channel();
            let wish = Wish::Follow(room, heard);
            queue.send(wish).await.map_err(|_| BusError::Unavailable)?;
            hears.await.map_err(|_| BusError::Unavailable)
        })
    }

    pub(super) fn unfollow(&self, room: RoomId) {
        // A full queue leaves the room subscribed to: its entries are unwanted and dropped, and
        // the next follow finds it there.
        let sent = self.queue.try_send(Wish::Unfollow(room));
        if matches!(sent, Err(mpsc::error::TrySendError::Full(_))) {
            tracing::warn!("too many subscriptions change at once; one unused one is kept");
        }
    }
}

/// The task that owns the connection.
struct Worker {
    server: Arc<Server>,
    links: Arc<Links>,
    mailboxes: Mailboxes,
    queue: mpsc::Receiver<Wish>,
    followed: BTreeSet<RoomId>,
    /// Who waits for a subscription that is not confirmed yet.
    unheard: Vec<oneshot::Sender<()>>,
}

impl Worker {
    async fn run(mut self, stopped: CancellationToken) {
        // Dropping the work drops the connection; nothing is owed to anybody.
        tokio::select! {
            () = stopped.cancelled() => {}
            () = self.work() => {}
        }
    }

    async fn work(&mut self) {
        let mut pause = RetryPause::default();
        loop {
            pause.wait().await;
            match self.listen(&mut pause).await {
                Ok(()) => return,
                Err(error) => {
                    if pause.is_worth_a_line() {
                        tracing::warn!(%error, "cannot hear Redis");
                    }
                }
            }
            self.links.set(&self.server, Link::Hearing, None);
        }
    }

    /// Connects, subscribes to everything, and serves wishes until the link dies (`Err`) or
    /// nobody can wish any more (`Ok`).
    async fn listen(&mut self, pause: &mut RetryPause) -> Result<(), RedisError> {
        let ear = Ear::default();
        let config =
            config().set_push_sender(receiver(self.mailboxes.clone(), self.links.clone(), &ear));
        let lost = ear.lost.clone();
        let mut remake = self.links.remake.subscribe();
        let (mut connection, token) = self.server.connect(config).await?;
        self.links.probe.forget();
        connection.subscribe(&[self.links.probe.channel.as_str(), POKES]).await?;
        self.take_wishes();
        let rooms: Vec<RoomId> = self.followed.iter().cloned().collect();
        self.subscribe(&mut connection, &rooms).await?;
        // Only when everything is subscribed to: what is read from now on leaves no gap.
        self.mailboxes.doubt();
        self.links.set(&self.server, Link::Hearing, Some(token));
        *pause = RetryPause::default();

        let mut look = tokio::time::interval(probe::LOOK_EVERY);
        let mut wishes = Vec::new();
        loop {
            // Cancel-safe, all of them.
            tokio::select! {
                biased;
                () = lost.notified() => return Err(link_is_lost()),
                _ = remake.changed() => {
                    return Err((redis::ErrorKind::Io, "all links are made again").into());
                }
                count = self.queue.recv_many(&mut wishes, CHANNELS_MAX) => {
                    if count == 0 {
                        return Ok(());
                    }
                }
                _ = look.tick() => {
                    if self.links.probe.is_overdue(Instant::now()) {
                        self.links.metrics.probes_lost.inc();
                        self.links.probe.tell_lost();
                        return Err((redis::ErrorKind::Io, "what is published is not heard").into());
                    }
                }
            }
            if !wishes.is_empty() {
                self.grant(&mut connection, wishes.drain(..)).await?;
            }
        }
    }

    /// Notes what was wished for while there was no connection.
    fn take_wishes(&mut self) {
        while let Ok(wish) = self.queue.try_recv() {
            self.note(wish);
        }
    }

    fn note(&mut self, wish: Wish) {
        match wish {
            Wish::Follow(room, heard) => {
                self.followed.insert(room);
                self.unheard.push(heard);
            }
            Wish::Unfollow(room) => {
                self.followed.remove(&room);
            }
        }
    }

    /// Subscribes and unsubscribes as wished for, in the order of the wishes.
    async fn grant(
        &mut self,
        connection: &mut MultiplexedConnection,
        wishes: impl Iterator<Item = Wish>,
    ) -> Result<(), RedisError> {
        // All are noted first: where the link dies in between, the next one has them all.
        let (mut more, mut fewer) = (Vec::new(), Vec::new());
        for wish in wishes {
            let room = match &wish {
                Wish::Follow(room, _) | Wish::Unfollow(room) => room.clone(),
            };
            self.note(wish);
            // The last wish for a room counts.
            more.retain(|other| *other != room);
            fewer.retain(|other| *other != room);
            if self.followed.contains(&room) { more.push(room) } else { fewer.push(room) }
        }
        for rooms in fewer.chunks(CHANNELS_MAX) {
            connection.unsubscribe(self.channels(rooms)).await?;
        }
        self.subscribe(connection, &more).await
    }

    /// Subscribes to the channels of `rooms`, waits for the confirmation and passes it on.
    async fn subscribe(
        &mut self,
        connection: &mut MultiplexedConnection,
        rooms: &[RoomId],
    ) -> RedisResult<()> {
        for rooms in rooms.chunks(CHANNELS_MAX) {
            connection.subscribe(self.channels(rooms)).await?;
        }
        for heard in self.unheard.drain(..) {
            // Who does not wait any more has given up on the join.
            let _ = heard.send(());
        }
        Ok(())
    }

    fn channels(&self, rooms: &[RoomId]) -> Vec<String> {
        rooms.iter().map(|room| self.server.keyspace.channel(room)).collect()
    }
}

fn link_is_lost() -> RedisError {
    (redis::ErrorKind::Io, "the link was closed").into()
}

/// The end of a connection's pushes. Once it is dropped nothing that still comes is taken: it would
/// arrive behind what another connection, maybe to another server, has brought.
#[derive(Default)]
struct Ear {
    lost: Arc<Notify>,
    deaf: Arc<AtomicBool>,
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.deaf.store(true, Ordering::Release);
    }
}

/// Takes what Redis pushes. Runs on the connection's driver task and never blocks.
fn receiver(
    mailboxes: Mailboxes,
    links: Arc<Links>,
    ear: &Ear,
) -> impl Fn(PushInfo) -> Result<(), std::convert::Infallible> + Send + Sync + 'static {
    let (lost, deaf) = (ear.lost.clone(), ear.deaf.clone());
    move |push| {
        if deaf.load(Ordering::Acquire) {
            return Ok(());
        }
        match push.kind {
            PushKind::Message => match arrival(push.data, &links.probe.channel) {
                Some(Arrival::Entry(room, entry)) => mailboxes.put(room, entry),
                Some(Arrival::Probe(number)) => links.probe.heard(number),
                Some(Arrival::Poke) => links.poked.notify_one(),
                None => tracing::warn!("a message that no gateway published was ignored"),
            },
            PushKind::Disconnection => lost.notify_one(),
            _ => {}
        }
        Ok(())
    }
}

/// What gateways publish.
enum Arrival {
    Entry(RoomId, Entry),
    Probe(u64),
    Poke,
}

/// Reads `[channel, "<epoch>:<seq>:<stamp>\n<envelope>"]`, or the number of a probe.
fn arrival(data: Vec<Value>, probe_channel: &str) -> Option<Arrival> {
    let [Value::BulkString(channel), Value::BulkString(payload)]: [Value; 2] =
        data.try_into().ok()?
    else {
        return None;
    };
    let channel = std::str::from_utf8(&channel).ok()?;
    if channel == probe_channel {
        return Some(Arrival::Probe(std::str::from_utf8(&payload).ok()?.parse().ok()?));
    }
    if channel == POKES {
        return Some(Arrival::Poke);
    }
    let room = Keyspace::room(channel)?;
    let payload = Bytes::from(payload);
    let border = payload.iter().position(|byte| *byte == b'\n')?;
    let (position, stamp) = std::str::from_utf8(&payload[..border]).ok()?.rsplit_once(':')?;
    let (position, stamp) = (position.parse().ok()?, stamp.parse().ok()?);
    let envelope = Envelope::from_bytes(payload.slice(border + 1..)).ok()?;
    Some(Arrival::Entry(room, Entry { position, stamp, envelope }))
}
