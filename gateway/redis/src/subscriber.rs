//! The subscriber of a node: one connection that is subscribed to the channels of the subscribed
//! rooms.
//!
//! Messages go straight from the connection's driver to the mailboxes, which never block. The loop
//! here subscribes and unsubscribes in batches. After each reconnect it subscribes to all rooms
//! again and then requests a resync: pub/sub has no memory, so that missed entries are read from
//! the logs.
//!
//! Subscribe commands wait in [`PendingCommands`], one per room: no unsubscription is lost, and
//! rooms and inboxes, which joins wait for, go ahead of the status of users.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    convert::Infallible,
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
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
    ephemeral,
    keyspace::Keyspace,
    links::{LinkKind, LinkStates},
    probe::{CHECK_INTERVAL, Probe},
    requirements::Detector,
    retry::RetryPause,
    server::RedisServer,
    topology::connection_config,
    untrusted,
};
use skein_core::{
    bus::{BoxFuture, BusError, Mailboxes, presence_store::EphemeralEvent},
    delivery::Entry,
    drain::{Tasks, supervision::catch_panic_sync},
    telemetry::metrics::InvalidValue,
};

/// The most channels in one SUBSCRIBE, so that a node with many rooms does not block Redis.
const CHANNELS_MAX: usize = 512;
/// How many of them belong to rooms and inboxes to subscribe to, while other changes wait as well.
const PRIORITY_MAX: usize = CHANNELS_MAX / 4 * 3;

/// A handle to the subscriber's task.
pub(super) struct Subscriber {
    queue: Arc<CommandQueue>,
    resubscriptions: Arc<Resubscriptions>,
}

/// The commands that wait for the loop.
#[derive(Default)]
struct CommandQueue {
    commands: Mutex<PendingCommands>,
    notify: Notify,
}

/// Subscribe commands that were not applied yet: the last one for each room. Bounded by the rooms
/// and watched users of the hub.
#[derive(Default)]
struct PendingCommands {
    rooms: HashMap<RoomId, SubscribeCommand>,
    /// The order of the commands: first rooms and inboxes to subscribe to, then all others. A room
    /// without a command in `rooms` was served before.
    priority: VecDeque<RoomId>,
    others: VecDeque<RoomId>,
    /// The loop has ended and applies no more commands.
    is_closed: bool,
}

/// A pending change of a room's subscription.
#[derive(Default)]
struct SubscribeCommand {
    subscribe: bool,
    /// Whether the room is in `priority`.
    is_priority: bool,
    /// Notified when the subscription is confirmed.
    waiters: SmallVec<[oneshot::Sender<()>; 1]>,
}

impl PendingCommands {
    fn subscribe(&mut self, room: RoomId, confirmed: oneshot::Sender<()>) {
        if self.is_closed {
            return;
        }
        let is_new = !self.rooms.contains_key(&room);
        let command = self.rooms.entry(room.clone()).or_default();
        command.subscribe = true;
        command.waiters.push(confirmed);
        if room.kind() == RoomKind::Status {
            if is_new {
                self.others.push_back(room);
            }
        } else if !mem::replace(&mut command.is_priority, true) {
            self.priority.push_back(room);
        }
    }

    fn unsubscribe(&mut self, room: RoomId) {
        if self.is_closed {
            return;
        }
        match self.rooms.get_mut(&room) {
            Some(command) => command.subscribe = false,
            None => {
                self.rooms.insert(room.clone(), SubscribeCommand::default());
                self.others.push_back(room);
            }
        }
    }

    /// Takes the next commands, at most `max`.
    fn next_batch(&mut self, max: usize) -> Vec<(RoomId, SubscribeCommand)> {
        let mut batch = Vec::with_capacity(max.min(self.rooms.len()));
        for (from_first, max) in [(true, PRIORITY_MAX.min(max)), (false, max), (true, max)] {
            let queue = if from_first { &mut self.priority } else { &mut self.others };
            while batch.len() < max
                && let Some(room) = queue.pop_front()
            {
                batch.extend(self.rooms.remove_entry(&room));
            }
        }
        batch
    }
}

/// Rooms that another server has published so far. They are subscribed, so no caller waits for
/// them.
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
    let resubscribed = Arc::new(Resubscriptions::default());
    let worker = SubscribeWorker {
        server,
        links,
        mailboxes,
        queue: queue.clone(),
        resubscriptions: resubscribed.clone(),
        subscribed: Arc::default(),
        unconfirmed: Vec::new(),
        tasks: tasks.clone(),
    };
    let stopped = tasks.stopped().clone();
    tasks.spawn_service("redis_subscriber", worker.run(stopped));
    Subscriber { queue, resubscriptions: resubscribed }
}

impl Subscriber {
    pub(super) fn subscribe(&self, room: RoomId) -> BoxFuture<Result<(), BusError>> {
        let (confirmed, confirmation) = oneshot::channel();
        self.queue.commands.lock().subscribe(room, confirmed);
        self.queue.notify.notify_one();
        Box::pin(async move { confirmation.await.map_err(|_| BusError::Unavailable) })
    }

    /// Subscribes to rooms that were subscribed on another server before.
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
    /// The subscribed rooms. Shared with the connection's driver, which learns when Redis ends a
    /// subscription.
    subscribed: Arc<Mutex<BTreeSet<RoomId>>>,
    /// Callers that wait for a subscription that is not confirmed yet.
    unconfirmed: Vec<(RoomId, oneshot::Sender<()>)>,
    /// Notified of a panic in the connection's driver, a task of the library.
    tasks: Tasks,
}

impl Drop for SubscribeWorker {
    fn drop(&mut self) {
        // Callers that wait for a subscription subscribe again, on the server that has the room.
        *self.queue.commands.lock() =
            PendingCommands { is_closed: true, ..PendingCommands::default() };
    }
}

impl SubscribeWorker {
    async fn run(mut self, stopped: CancellationToken) {
        // Dropping the future drops the connection; no answer is pending.
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
            let received = self.links.probe.received_count();
            let Err(error) = self.run_connection().await;
            self.server.topology_stale.notify_one();
            if self.links.probe.received_count() != received {
                // The connection worked. As long as none does, attempts become rarer.
                pause = RetryPause::default();
            }
            pause.failed(&error);
            self.server.requirements.record(Detector::Subscriber, &error);
            if pause.should_log() {
                let server = self.server.dial.server_name();
                tracing::warn!(%error, server, "cannot subscribe to Redis");
            }
            self.links.set(&self.server, LinkKind::Subscribe, None);
        }
    }

    /// Connects, subscribes to all rooms, and applies commands until the connection fails.
    async fn run_connection(&mut self) -> Result<Infallible, RedisError> {
        let receiver = PushReceiver::default();
        let config = connection_config().set_push_sender(self.push_handler(&receiver));
        let lost = receiver.lost.clone();
        let mut reconnect_all = self.links.reconnect_all.subscribe();
        let mut owned = self.server.owned.subscribe();
        let (mut connection, server_id) = self.server.connect(config).await?;
        self.subscribe_own_channels(&mut connection).await?;
        self.take_commands();
        self.drop_foreign_rooms();
        let rooms: Vec<RoomId> = self.subscribed.lock().iter().cloned().collect();
        self.subscribe(&mut connection, &rooms).await?;
        // Only when all rooms are subscribed: a read from now on leaves no gap.
        self.mailboxes.mark_all_stale();
        self.server.requirements.allow(Detector::Subscriber);
        self.links.set(&self.server, LinkKind::Subscribe, Some(server_id));

        let mut probe_check = tokio::time::interval(CHECK_INTERVAL);
        loop {
            // All arms are cancel-safe. Commands come last, since there may be ever more of them.
            tokio::select! {
                biased;
                () = lost.notified() => return Err(connection_lost()),
                _ = reconnect_all.changed() => {
                    return Err((redis::ErrorKind::Io, "all links reconnect").into());
                }
                _ = owned.changed() => {
                    self.drop_foreign_rooms();
                    let probed = self.links.probe.channel();
                    if probed.is_some_and(|(group, _)| !self.server.owns(group)) {
                        self.subscribe_own_channels(&mut connection).await?;
                    }
                }
                _ = probe_check.tick() => {
                    if self.links.probe.is_overdue(Instant::now()) {
                        self.links.metrics.bus_probe_timeouts.inc();
                        self.links.probe.report_lost();
                        return Err((redis::ErrorKind::Io, "probe timeout: this node does not receive what it publishes").into());
                    }
                }
                () = self.resubscriptions.notify.notified() => self.apply(&mut connection).await?,
                () = self.queue.notify.notified() => self.apply(&mut connection).await?,
            }
        }
    }

    /// Records the commands that came while there was no connection.
    fn take_commands(&mut self) {
        self.take_resubscriptions();
        let commands = self.queue.commands.lock().next_batch(usize::MAX);
        for (room, command) in commands {
            self.record(room, command);
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

    /// Forgets rooms that this server does not serve any more. It has ended their subscriptions
    /// itself; callers that wait for one subscribe again on the server that has the room.
    fn drop_foreign_rooms(&mut self) {
        let Self { server, subscribed, unconfirmed, .. } = self;
        let here = |room: &RoomId| server.owns(server.keyspace.group_of(room));
        subscribed.lock().retain(here);
        unconfirmed.retain(|(room, _)| here(room));
    }

    /// Subscribes to the probes of this process, and to wake-ups if this server publishes them.
    async fn subscribe_own_channels(
        &self,
        connection: &mut MultiplexedConnection,
    ) -> Result<(), RedisError> {
        let (keyspace, probe) = (self.server.keyspace, &self.links.probe);
        let groups = (self.server.owned.borrow().first().copied(), self.server.owns(0));
        let (Some(group), wake_up_channel) = groups else {
            return Err((redis::ErrorKind::Io, "this server serves no placement group").into());
        };
        probe.reset();
        let mut channels = vec![probe.choose_channel(keyspace, group)];
        if wake_up_channel {
            channels.extend([keyspace.wake_up_channel(), keyspace.canary_channel()]);
        }
        subscribe_to(connection, keyspace, &channels).await
    }

    fn record(&mut self, room: RoomId, command: SubscribeCommand) {
        // Otherwise the caller subscribes again on the server that has the room.
        if self.owns(&room) {
            self.unconfirmed
                .extend(command.waiters.into_iter().map(|confirmed| (room.clone(), confirmed)));
            if command.subscribe {
                self.subscribed.lock().insert(room);
            } else {
                self.subscribed.lock().remove(&room);
            }
        }
    }

    /// Applies one batch of commands.
    async fn apply(&mut self, connection: &mut MultiplexedConnection) -> Result<(), RedisError> {
        let (commands, is_all) = {
            let mut commands = self.queue.commands.lock();
            (commands.next_batch(CHANNELS_MAX), commands.rooms.is_empty())
        };
        if !is_all {
            self.queue.notify.notify_one();
        }
        // All commands are recorded first: if the connection dies in between, the next one
        // subscribes to all.
        let (mut to_subscribe, mut to_unsubscribe) = (self.take_resubscriptions(), Vec::new());
        let resubscribed = !to_subscribe.is_empty();
        for (room, command) in commands {
            let follow = command.subscribe;
            self.record(room.clone(), command);
            if follow && self.owns(&room) {
                to_subscribe.push(room);
            } else if self.owns(&room) {
                to_subscribe.retain(|resubscribed| *resubscribed != room);
                to_unsubscribe.push(room);
            }
        }
        if !to_unsubscribe.is_empty() {
            unsubscribe_from(connection, self.server.keyspace, &self.channels(&to_unsubscribe))
                .await?;
        }
        self.subscribe(connection, &to_subscribe).await?;
        if resubscribed {
            // Entries that were published meanwhile are in the logs.
            self.mailboxes.mark_all_stale();
        }
        Ok(())
    }

    /// Subscribes to the channels of `rooms`, waits for the confirmation and notifies the waiters.
    async fn subscribe(
        &mut self,
        connection: &mut MultiplexedConnection,
        rooms: &[RoomId],
    ) -> RedisResult<()> {
        for rooms in rooms.chunks(CHANNELS_MAX) {
            subscribe_to(connection, self.server.keyspace, &self.channels(rooms)).await?;
        }
        for (_, confirmed) in self.unconfirmed.drain(..) {
            // A caller that does not wait any more has given up the join.
            let _ = confirmed.send(());
        }
        Ok(())
    }

    fn channels(&self, rooms: &[RoomId]) -> Vec<String> {
        rooms.iter().map(|room| self.server.keyspace.channel(room)).collect()
    }

    /// The handler of the messages that Redis pushes. Runs on the connection's driver task and
    /// never blocks.
    fn push_handler(
        &self,
        receiver: &PushReceiver,
    ) -> impl Fn(PushInfo) -> Result<(), Infallible> + Send + Sync + 'static {
        let (lost, closed) = (receiver.lost.clone(), receiver.closed.clone());
        let (mailboxes, links) = (self.mailboxes.clone(), self.links.clone());
        let (server, subscribed) = (self.server.clone(), self.subscribed.clone());
        let (own_channels, tasks) = (OwnChannels::of(server.keyspace), self.tasks.clone());
        let take = move |push: PushInfo| {
            match push.kind {
                PushKind::Message | PushKind::SMessage => {
                    match decode_push(push.data, &links.probe, &own_channels) {
                        Push::Entry(room, entry) => {
                            // Late messages of a server that was replaced would follow those of its
                            // successor.
                            if server.owns(server.keyspace.group_of(&room)) {
                                mailboxes.send_entry(room, entry);
                            }
                        }
                        Push::Ephemeral(room, event) => {
                            if server.owns(server.keyspace.group_of(&room)) {
                                mailboxes.send_ephemeral(room, event);
                            }
                        }
                        Push::Probe(number) => links.probe.received(number, Instant::now()),
                        Push::WakeUp => links.wake_up.notify_one(),
                        Push::Canary(payload) => {
                            let (now, wall) = (Instant::now(), SystemTime::now());
                            if !links.canary.received(&payload, now, wall) {
                                let kind = InvalidValue::PubsubMessage;
                                untrusted::report(&links.metrics, kind, &own_channels.canary);
                            }
                        }
                        Push::Invalid(channel) => {
                            untrusted::report(&links.metrics, InvalidValue::PubsubMessage, channel);
                        }
                    }
                }
                // The slot has moved to another server.
                PushKind::SUnsubscribe
                    if room_of(&push.data)
                        .is_some_and(|room| subscribed.lock().contains(&room)) =>
                {
                    server.topology_stale.notify_one();
                    lost.notify_one();
                }
                PushKind::Disconnection => lost.notify_one(),
                _ => {}
            }
        };
        move |push| {
            if !closed.load(Ordering::Acquire)
                && let Err(panic) = catch_panic_sync(|| take(push))
            {
                tasks.fail("redis_receiver", panic);
            }
            Ok(())
        }
    }
}

fn connection_lost() -> RedisError {
    (redis::ErrorKind::Io, "the connection was closed").into()
}

/// Receives the pushes of one connection. Once it is dropped, later messages are discarded: they
/// would follow those of another connection, possibly to another server.
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

/// Subscribes. In a Redis Cluster with one command per channel: the client expects a confirmation
/// for each command, except for `SUBSCRIBE`.
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

/// A message that gateways publish.
enum Push {
    Entry(RoomId, Entry),
    Ephemeral(RoomId, EphemeralEvent),
    Probe(u64),
    WakeUp,
    Canary(Bytes),
    /// A message that no gateway publishes, with its channel.
    Invalid(String),
}

/// The channels that all nodes share.
struct OwnChannels {
    wake_up: String,
    canary: String,
}

impl OwnChannels {
    fn of(keyspace: Keyspace) -> Self {
        Self { wake_up: keyspace.wake_up_channel(), canary: keyspace.canary_channel() }
    }
}

/// Decodes `[channel, payload]`.
fn decode_push(data: Vec<Value>, probe: &Probe, own_channels: &OwnChannels) -> Push {
    let data: Result<[Value; 2], _> = data.try_into();
    let Ok([Value::BulkString(channel), Value::BulkString(payload)]) = data else {
        return Push::Invalid("?".to_owned());
    };
    let channel = String::from_utf8_lossy(&channel);
    let push = decode_payload(&channel, payload.into(), probe, own_channels);
    push.unwrap_or_else(|| Push::Invalid(channel.into_owned()))
}

/// Decodes `<epoch>:<seq>:<origin>\n<envelope>`, an ephemeral event, or the number of a probe.
fn decode_payload(
    channel: &str,
    payload: Bytes,
    probe: &Probe,
    own_channels: &OwnChannels,
) -> Option<Push> {
    if probe.is_to(channel) {
        return Some(Push::Probe(std::str::from_utf8(&payload).ok()?.parse().ok()?));
    }
    if channel == own_channels.wake_up {
        return Some(Push::WakeUp);
    }
    if channel == own_channels.canary {
        return Some(Push::Canary(payload));
    }
    let room = Keyspace::room(channel)?;
    if payload.first() == Some(&b'!') {
        let event = ephemeral::decode(&payload, &room)?;
        return Some(Push::Ephemeral(room, event));
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

    fn confirmed() -> oneshot::Sender<()> {
        oneshot::channel().0
    }

    #[test]
    fn no_unsubscription_is_lost_however_many_wait() {
        let mut commands = PendingCommands::default();
        for room in rooms("room", 100_000) {
            commands.unsubscribe(room);
        }
        let mut batch = BTreeSet::new();
        while !commands.rooms.is_empty() {
            let some = commands.next_batch(CHANNELS_MAX);
            assert!(
                some.len() <= CHANNELS_MAX && some.iter().all(|(_, command)| !command.subscribe)
            );
            batch.extend(some.into_iter().map(|(room, _)| room));
        }
        assert_eq!(batch.len(), 100_000);
    }

    #[test]
    fn rooms_go_ahead_of_statuses_and_both_progress() {
        let mut commands = PendingCommands::default();
        for room in rooms("status", 10_000) {
            commands.subscribe(room, confirmed());
        }
        for room in rooms("room", 1000) {
            commands.subscribe(room, confirmed());
        }
        let first = commands.next_batch(CHANNELS_MAX);
        let of_rooms = first.iter().filter(|(room, _)| room.kind() == RoomKind::Room).count();
        assert_eq!((of_rooms, first.len()), (PRIORITY_MAX, CHANNELS_MAX));
    }

    #[test]
    fn the_last_command_for_a_room_counts_and_is_applied_once() {
        let (mut commands, room) = (PendingCommands::default(), rooms("room", 1).next().unwrap());
        for _ in 0..3 {
            commands.unsubscribe(room.clone());
            commands.subscribe(room.clone(), confirmed());
        }
        let batch = commands.next_batch(CHANNELS_MAX);
        assert!(
            matches!(&batch[..], [(_, SubscribeCommand { subscribe: true, waiters, .. })] if waiters.len() == 3)
        );
        assert!(commands.next_batch(CHANNELS_MAX).is_empty());
        commands.subscribe(room.clone(), confirmed());
        commands.unsubscribe(room);
        assert!(matches!(
            &commands.next_batch(CHANNELS_MAX)[..],
            [(_, SubscribeCommand { subscribe: false, .. })]
        ));
    }
}
