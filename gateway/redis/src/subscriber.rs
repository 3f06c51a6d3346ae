//! The ear of a node: one connection that is subscribed to the channels of the rooms followed.
//!
//! What arrives goes straight from the connection's driver to the mailboxes, which never block. The
//! loop here subscribes and unsubscribes in batches, and after each reconnect subscribes to everything
//! again and then raises doubt: pub/sub has no memory, so that what was missed is read from the logs.
//!
//! Changes of subscriptions wait in [`PendingCommands`], each room once: an unsubscription is never lost, and
//! rooms and inboxes that somebody waits for go ahead of the status of users.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    convert::Infallible,
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use parking_lot::Mutex;
use redis::{PushInfo, PushKind, RedisError, RedisResult, Value, aio::MultiplexedConnection};
use skein_core::envelope::Envelope;
use skein_protocol::ids::{RoomId, RoomKind};
use smallvec::SmallVec;
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    RetryPause, config, ephemeral,
    keyspace::Keyspace,
    links::{LinkKind, LinkStates},
    probe::{CHECK_INTERVAL, Probe},
    requirements::Detector,
    server::RedisServer,
    untrusted,
};
use skein_core::{
    bus::{BoxFuture, BusError, Mailboxes, registry::EphemeralEvent},
    delivery::Entry,
    drain::{Tasks, supervision::catch_panic_sync},
    telemetry::metrics::InvalidValue,
};

/// The most channels in one SUBSCRIBE, so that a node with many rooms does not hold Redis up.
const CHANNELS_MAX: usize = 512;
/// How many of them are of rooms and inboxes to be subscribed to, where other changes wait as well.
const PRIORITY_MAX: usize = CHANNELS_MAX / 4 * 3;

/// A handle to the subscriber's task.
pub(super) struct Subscriber {
    queue: Arc<CommandQueue>,
    resubscriptions: Arc<Resubscriptions>,
}

/// The changes that wait for the loop.
#[derive(Default)]
struct CommandQueue {
    commands: Mutex<PendingCommands>,
    notify: Notify,
}

/// What the node wants to hear, or no longer, and does not yet: the last wish for each room. As large as
/// what the hub has of rooms and watched users.
#[derive(Default)]
struct PendingCommands {
    rooms: HashMap<RoomId, SubscribeCommand>,
    /// The order in which they are granted: rooms and inboxes to be followed, and all else. What is in
    /// neither of the wishes any more was granted before.
    priority: VecDeque<RoomId>,
    others: VecDeque<RoomId>,
    /// The loop has ended, so that nothing is granted any more.
    is_closed: bool,
}

/// What is wished for a room.
#[derive(Default)]
struct SubscribeCommand {
    subscribe: bool,
    /// Whether it stands among the first.
    is_priority: bool,
    /// Who waits for the subscription.
    waiters: SmallVec<[oneshot::Sender<()>; 1]>,
}

impl PendingCommands {
    fn subscribe(&mut self, room: RoomId, heard: oneshot::Sender<()>) {
        if self.is_closed {
            return;
        }
        let is_new = !self.rooms.contains_key(&room);
        let wish = self.rooms.entry(room.clone()).or_default();
        wish.subscribe = true;
        wish.waiters.push(heard);
        if room.kind() == RoomKind::Status {
            if is_new {
                self.others.push_back(room);
            }
        } else if !mem::replace(&mut wish.is_priority, true) {
            self.priority.push_back(room);
        }
    }

    fn unsubscribe(&mut self, room: RoomId) {
        if self.is_closed {
            return;
        }
        match self.rooms.get_mut(&room) {
            Some(wish) => wish.subscribe = false,
            None => {
                self.rooms.insert(room.clone(), SubscribeCommand::default());
                self.others.push_back(room);
            }
        }
    }

    /// Takes the next wishes out, `max` at most.
    fn next_batch(&mut self, max: usize) -> Vec<(RoomId, SubscribeCommand)> {
        let mut taken = Vec::with_capacity(max.min(self.rooms.len()));
        for (from_first, max) in [(true, PRIORITY_MAX.min(max)), (false, max), (true, max)] {
            let queue = if from_first { &mut self.priority } else { &mut self.others };
            while taken.len() < max
                && let Some(room) = queue.pop_front()
            {
                taken.extend(self.rooms.remove_entry(&room));
            }
        }
        taken
    }
}

/// Rooms that another server passed on so far. They are followed already, so nobody waits.
#[derive(Default)]
struct Resubscriptions {
    rooms: Mutex<Vec<RoomId>>,
    notify: Notify,
}

pub(super) fn start(
    server: Arc<RedisServer>,
    links: Arc<LinkStates>,
    mailboxes: Mailboxes,
    tasks: &Tasks,
) -> Subscriber {
    let queue = Arc::new(CommandQueue::default());
    let adopted = Arc::new(Resubscriptions::default());
    let worker = SubscribeWorker {
        server,
        links,
        mailboxes,
        queue: queue.clone(),
        resubscriptions: adopted.clone(),
        subscribed: Arc::default(),
        unconfirmed: Vec::new(),
        tasks: tasks.clone(),
    };
    let stopped = tasks.stopped().clone();
    tasks.spawn_service("redis_subscriber", worker.run(stopped));
    Subscriber { queue, resubscriptions: adopted }
}

impl Subscriber {
    pub(super) fn subscribe(&self, room: RoomId) -> BoxFuture<Result<(), BusError>> {
        let (heard, hears) = oneshot::channel();
        self.queue.commands.lock().subscribe(room, heard);
        self.queue.notify.notify_one();
        Box::pin(async move { hears.await.map_err(|_| BusError::Unavailable) })
    }

    /// Follows rooms from here on that were followed elsewhere before.
    pub(super) fn resubscribe(&self, rooms: Vec<RoomId>) {
        self.resubscriptions.rooms.lock().extend(rooms);
        self.resubscriptions.notify.notify_one();
    }

    pub(super) fn unsubscribe(&self, room: RoomId) {
        self.queue.commands.lock().unsubscribe(room);
        self.queue.notify.notify_one();
    }
}

/// The task that owns the connection.
struct SubscribeWorker {
    server: Arc<RedisServer>,
    links: Arc<LinkStates>,
    mailboxes: Mailboxes,
    queue: Arc<CommandQueue>,
    resubscriptions: Arc<Resubscriptions>,
    /// What is followed. Shared with the connection, which finds out when that ends by itself.
    subscribed: Arc<Mutex<BTreeSet<RoomId>>>,
    /// Who waits for a subscription that is not confirmed yet.
    unconfirmed: Vec<(RoomId, oneshot::Sender<()>)>,
    /// Told where the connection's driver, a task of the library, fails.
    tasks: Tasks,
}

impl Drop for SubscribeWorker {
    fn drop(&mut self) {
        // Callers that wait for a subscription ask again where the room is.
        *self.queue.commands.lock() =
            PendingCommands { is_closed: true, ..PendingCommands::default() };
    }
}

impl SubscribeWorker {
    async fn run(mut self, stopped: CancellationToken) {
        // Dropping the work drops the connection; nothing is owed to anybody.
        tokio::select! {
            biased;
            () = stopped.cancelled() => {}
            () = self.reconnect_forever() => {}
        }
    }

    async fn reconnect_forever(&mut self) {
        let mut pause = RetryPause::default();
        loop {
            pause.wait().await;
            let heard = self.links.probe.received_count();
            let Err(error) = self.run_connection().await;
            self.server.topology_stale.notify_one();
            if self.links.probe.received_count() != heard {
                // It did its work: until then the next attempts become rarer.
                pause = RetryPause::default();
            }
            pause.failed(&error);
            self.server.requirements.record(Detector::Subscriber, &error);
            if pause.should_log() {
                tracing::warn!(%error, "cannot hear Redis");
            }
            self.links.set(&self.server, LinkKind::Subscribe, None);
        }
    }

    /// Connects, subscribes to everything, and serves wishes until the link dies.
    async fn run_connection(&mut self) -> Result<Infallible, RedisError> {
        let ear = PushReceiver::default();
        let config = config().set_push_sender(self.push_handler(&ear));
        let lost = ear.lost.clone();
        let mut remake = self.links.reconnect_all.subscribe();
        let mut owned = self.server.owned.subscribe();
        let (mut connection, server_id) = self.server.connect(config).await?;
        self.subscribe_own_channels(&mut connection).await?;
        self.take_commands();
        self.drop_foreign_rooms();
        let rooms: Vec<RoomId> = self.subscribed.lock().iter().cloned().collect();
        self.subscribe(&mut connection, &rooms).await?;
        // Only when everything is subscribed to: what is read from now on leaves no gap.
        self.mailboxes.mark_all_stale();
        self.server.requirements.allow(Detector::Subscriber);
        self.links.set(&self.server, LinkKind::Subscribe, Some(server_id));

        let mut look = tokio::time::interval(CHECK_INTERVAL);
        loop {
            // Cancel-safe, all of them. Wishes come last, since there may be more and more of them.
            tokio::select! {
                biased;
                () = lost.notified() => return Err(connection_lost()),
                _ = remake.changed() => {
                    return Err((redis::ErrorKind::Io, "all links reconnect").into());
                }
                _ = owned.changed() => {
                    self.drop_foreign_rooms();
                    let probed = self.links.probe.channel();
                    if probed.is_some_and(|(group, _)| !self.server.owns(group)) {
                        self.subscribe_own_channels(&mut connection).await?;
                    }
                }
                _ = look.tick() => {
                    if self.links.probe.is_overdue(Instant::now()) {
                        self.links.metrics.bus_probe_timeouts.inc();
                        self.links.probe.report_lost();
                        return Err((redis::ErrorKind::Io, "what is published is not heard").into());
                    }
                }
                () = self.resubscriptions.notify.notified() => self.apply(&mut connection).await?,
                () = self.queue.notify.notified() => self.apply(&mut connection).await?,
            }
        }
    }

    /// Notes what was wished for while there was no connection.
    fn take_commands(&mut self) {
        self.take_resubscriptions();
        let wishes = self.queue.commands.lock().next_batch(usize::MAX);
        for (room, wish) in wishes {
            self.record(room, wish);
        }
    }

    fn take_resubscriptions(&mut self) -> Vec<RoomId> {
        let mut rooms = mem::take(&mut *self.resubscriptions.rooms.lock());
        rooms.retain(|room| self.owns(room));
        self.subscribed.lock().extend(rooms.iter().cloned());
        rooms
    }

    fn owns(&self, room: &RoomId) -> bool {
        self.server.owns(self.server.keyspace.group_of(room))
    }

    /// Forgets rooms that this server does not serve any more. It has ended their subscriptions by
    /// itself; who waits for one asks again where they are.
    fn drop_foreign_rooms(&mut self) {
        let Self { server, subscribed: followed, unconfirmed: unheard, .. } = self;
        let here = |room: &RoomId| server.owns(server.keyspace.group_of(room));
        followed.lock().retain(here);
        unheard.retain(|(room, _)| here(room));
    }

    /// Subscribes to this process' probes, and to pokes where they are published.
    async fn subscribe_own_channels(
        &self,
        connection: &mut MultiplexedConnection,
    ) -> Result<(), RedisError> {
        let (keyspace, probe) = (self.server.keyspace, &self.links.probe);
        let groups = (self.server.owned.borrow().first().copied(), self.server.owns(0));
        let (Some(group), pokes) = groups else {
            return Err((redis::ErrorKind::Io, "this server serves nothing").into());
        };
        probe.reset();
        let mut channels = vec![probe.choose_channel(keyspace, group)];
        channels.extend(pokes.then(|| keyspace.wake_up_channel()));
        subscribe_to(connection, keyspace, &channels).await
    }

    fn record(&mut self, room: RoomId, wish: SubscribeCommand) {
        // Who wished it asks again where the room is.
        if self.owns(&room) {
            self.unconfirmed.extend(wish.waiters.into_iter().map(|heard| (room.clone(), heard)));
            if wish.subscribe {
                self.subscribed.lock().insert(room);
            } else {
                self.subscribed.lock().remove(&room);
            }
        }
    }

    /// Subscribes and unsubscribes as wished for, as far as one batch goes.
    async fn apply(&mut self, connection: &mut MultiplexedConnection) -> Result<(), RedisError> {
        let (wishes, is_all) = {
            let mut wishes = self.queue.commands.lock();
            (wishes.next_batch(CHANNELS_MAX), wishes.rooms.is_empty())
        };
        if !is_all {
            self.queue.notify.notify_one();
        }
        // All are noted first: where the link dies in between, the next one has them all.
        let (mut more, mut fewer) = (self.take_resubscriptions(), Vec::new());
        let adopted = !more.is_empty();
        for (room, wish) in wishes {
            let follow = wish.subscribe;
            self.record(room.clone(), wish);
            if follow && self.owns(&room) {
                more.push(room);
            } else if self.owns(&room) {
                more.retain(|adopted| *adopted != room);
                fewer.push(room);
            }
        }
        if !fewer.is_empty() {
            unsubscribe_from(connection, self.server.keyspace, &self.channels(&fewer)).await?;
        }
        self.subscribe(connection, &more).await?;
        if adopted {
            // What was said in them meanwhile is in their logs.
            self.mailboxes.mark_all_stale();
        }
        Ok(())
    }

    /// Subscribes to the channels of `rooms`, waits for the confirmation and passes it on.
    async fn subscribe(
        &mut self,
        connection: &mut MultiplexedConnection,
        rooms: &[RoomId],
    ) -> RedisResult<()> {
        for rooms in rooms.chunks(CHANNELS_MAX) {
            subscribe_to(connection, self.server.keyspace, &self.channels(rooms)).await?;
        }
        for (_, heard) in self.unconfirmed.drain(..) {
            // Who does not wait any more has given up on the join.
            let _ = heard.send(());
        }
        Ok(())
    }

    fn channels(&self, rooms: &[RoomId]) -> Vec<String> {
        rooms.iter().map(|room| self.server.keyspace.channel(room)).collect()
    }

    /// Takes what Redis pushes. Runs on the connection's driver task and never blocks.
    fn push_handler(
        &self,
        ear: &PushReceiver,
    ) -> impl Fn(PushInfo) -> Result<(), Infallible> + Send + Sync + 'static {
        let (lost, deaf) = (ear.lost.clone(), ear.closed.clone());
        let (mailboxes, links) = (self.mailboxes.clone(), self.links.clone());
        let (server, followed) = (self.server.clone(), self.subscribed.clone());
        let (pokes, tasks) = (server.keyspace.wake_up_channel(), self.tasks.clone());
        let take = move |push: PushInfo| {
            match push.kind {
                PushKind::Message | PushKind::SMessage => {
                    match decode_push(push.data, &links.probe, &pokes) {
                        Push::Entry(room, entry) => {
                            // What comes late from a server that another has replaced would stand
                            // behind what that one says.
                            if server.owns(server.keyspace.group_of(&room)) {
                                mailboxes.send_entry(room, entry);
                            }
                        }
                        Push::Ephemeral(room, notice) => {
                            if server.owns(server.keyspace.group_of(&room)) {
                                mailboxes.send_ephemeral(room, notice);
                            }
                        }
                        Push::Probe(number) => links.probe.received(number),
                        Push::WakeUp => links.wake_up.notify_one(),
                        Push::Invalid(channel) => {
                            untrusted::report(&links.metrics, InvalidValue::PubsubMessage, channel);
                        }
                    }
                }
                // The slot has moved to another server.
                PushKind::SUnsubscribe
                    if room_of(&push.data).is_some_and(|room| followed.lock().contains(&room)) =>
                {
                    server.topology_stale.notify_one();
                    lost.notify_one();
                }
                PushKind::Disconnection => lost.notify_one(),
                _ => {}
            }
        };
        move |push| {
            if !deaf.load(Ordering::Acquire)
                && let Err(panic) = catch_panic_sync(|| take(push))
            {
                tasks.fail("redis_receiver", panic);
            }
            Ok(())
        }
    }
}

fn connection_lost() -> RedisError {
    (redis::ErrorKind::Io, "the link was closed").into()
}

/// The end of a connection's pushes. Once it is dropped nothing that still comes is taken: it would
/// arrive behind what another connection, maybe to another server, has brought.
#[derive(Default)]
struct PushReceiver {
    lost: Arc<Notify>,
    closed: Arc<AtomicBool>,
}

impl Drop for PushReceiver {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Release);
    }
}

/// Subscribes. On Redis Cluster with a command for each: a confirmation for each is what the client
/// counts on, but for its own `SUBSCRIBE`.
async fn subscribe_to(
    connection: &mut MultiplexedConnection,
    keyspace: Keyspace,
    channels: &[String],
) -> RedisResult<()> {
    match keyspace.sharded {
        false => connection.subscribe(channels).await,
        true => send_each(connection, "SSUBSCRIBE", channels).await,
    }
}

async fn unsubscribe_from(
    connection: &mut MultiplexedConnection,
    keyspace: Keyspace,
    channels: &[String],
) -> RedisResult<()> {
    match keyspace.sharded {
        false => connection.unsubscribe(channels).await,
        true => send_each(connection, "SUNSUBSCRIBE", channels).await,
    }
}

async fn send_each(
    connection: &mut MultiplexedConnection,
    command: &str,
    channels: &[String],
) -> RedisResult<()> {
    let mut pipeline = redis::Pipeline::with_capacity(channels.len());
    for channel in channels {
        pipeline.cmd(command).arg(channel);
    }
    pipeline.exec_async(connection).await
}

/// The room of `[channel, count]`.
fn room_of(data: &[Value]) -> Option<RoomId> {
    let [Value::BulkString(channel), _] = data else { return None };
    Keyspace::room(std::str::from_utf8(channel).ok()?)
}

/// What gateways publish.
enum Push {
    Entry(RoomId, Entry),
    Ephemeral(RoomId, EphemeralEvent),
    Probe(u64),
    WakeUp,
    /// What no gateway publishes, in this channel.
    Invalid(String),
}

/// Reads `[channel, payload]`.
fn decode_push(data: Vec<Value>, probe: &Probe, pokes: &str) -> Push {
    let data: Result<[Value; 2], _> = data.try_into();
    let Ok([Value::BulkString(channel), Value::BulkString(payload)]) = data else {
        return Push::Invalid("?".to_owned());
    };
    let channel = String::from_utf8_lossy(&channel);
    let arrival = decode_payload(&channel, payload.into(), probe, pokes);
    arrival.unwrap_or_else(|| Push::Invalid(channel.into_owned()))
}

/// Reads `<epoch>:<seq>:<stamp>\n<envelope>`, a notice, or the number of a probe.
fn decode_payload(channel: &str, payload: Bytes, probe: &Probe, pokes: &str) -> Option<Push> {
    if probe.is_to(channel) {
        return Some(Push::Probe(std::str::from_utf8(&payload).ok()?.parse().ok()?));
    }
    if channel == pokes {
        return Some(Push::WakeUp);
    }
    let room = Keyspace::room(channel)?;
    if payload.first() == Some(&b'!') {
        let notice = ephemeral::decode(&payload, &room)?;
        return Some(Push::Ephemeral(room, notice));
    }
    let border = payload.iter().position(|byte| *byte == b'\n')?;
    let (position, origin) = std::str::from_utf8(&payload[..border]).ok()?.rsplit_once(':')?;
    let (position, origin) = (position.parse().ok()?, origin.parse().ok()?);
    let envelope = Envelope::parse_for_room(payload.slice(border + 1..), &room).ok()?;
    Some(Push::Entry(room, Entry { position, origin, envelope }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rooms(kind: &str, count: usize) -> impl Iterator<Item = RoomId> {
        (0..count).map(move |number| {
            let name = format!("{kind}{number}");
            match kind {
                "status" => RoomId::status_of(&name.parse().unwrap()),
                _ => name.parse().unwrap(),
            }
        })
    }

    fn heard() -> oneshot::Sender<()> {
        oneshot::channel().0
    }

    #[test]
    fn no_unsubscription_is_lost_however_many_wait() {
        let mut wishes = PendingCommands::default();
        for room in rooms("room", 100_000) {
            wishes.unsubscribe(room);
        }
        let mut taken = BTreeSet::new();
        while !wishes.rooms.is_empty() {
            let some = wishes.next_batch(CHANNELS_MAX);
            assert!(some.len() <= CHANNELS_MAX && some.iter().all(|(_, wish)| !wish.subscribe));
            taken.extend(some.into_iter().map(|(room, _)| room));
        }
        assert_eq!(taken.len(), 100_000);
    }

    #[test]
    fn rooms_go_ahead_of_statuses_and_both_go_on() {
        let mut wishes = PendingCommands::default();
        for room in rooms("status", 10_000) {
            wishes.subscribe(room, heard());
        }
        for room in rooms("room", 1000) {
            wishes.subscribe(room, heard());
        }
        let first = wishes.next_batch(CHANNELS_MAX);
        let of_rooms = first.iter().filter(|(room, _)| room.kind() == RoomKind::Room).count();
        assert_eq!((of_rooms, first.len()), (PRIORITY_MAX, CHANNELS_MAX));
    }

    #[test]
    fn the_last_wish_for_a_room_counts_and_is_granted_once() {
        let (mut wishes, room) = (PendingCommands::default(), rooms("room", 1).next().unwrap());
        for _ in 0..3 {
            wishes.unsubscribe(room.clone());
            wishes.subscribe(room.clone(), heard());
        }
        let taken = wishes.next_batch(CHANNELS_MAX);
        assert!(
            matches!(&taken[..], [(_, SubscribeCommand { subscribe: true, waiters, .. })] if waiters.len() == 3)
        );
        assert!(wishes.next_batch(CHANNELS_MAX).is_empty());
        wishes.subscribe(room.clone(), heard());
        wishes.unsubscribe(room);
        assert!(matches!(
            &wishes.next_batch(CHANNELS_MAX)[..],
            [(_, SubscribeCommand { subscribe: false, .. })]
        ));
    }
}
