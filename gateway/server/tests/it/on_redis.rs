//! Behaviour of the Redis bus only: differing nodes, a Redis that is down or evicts, and the
//! presence of a node that has stopped.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use skein_core::{
    bus::{
        BusError,
        presence_store::{JoinConditions, PresenceScope, PresenceStore as _},
    },
    drain::Tasks,
    presence::{PresenceOptions, PresenceTracker},
    telemetry::metrics::Metrics,
};
use skein_protocol::{
    ids::{DisplayName, MessageId, UserId},
    position::Seq,
    protocol::server_frame::UserInfo,
};
use skein_redis::{RedisBus, RedisStartError};
use tokio::time::Instant;

use crate::{
    bus::{PARTITIONS, mailbox, redis},
    harness::{Redis, redis_options, retention, room, until, within},
};

/// So many that HSCAN passes many empty buckets of their hash.
const MANY: usize = 12_000;

#[tokio::test(flavor = "multi_thread")]
async fn many_users_of_a_stopped_node_leave() {
    let server = Redis::start().await;
    let (stays, ends) =
        (RedisRegistry::start(&server, "stays").await, RedisRegistry::start(&server, "ends").await);
    let lobby = room("lobby");
    let presence =
        PresenceTracker::start(ends.bus.clone(), PresenceOptions::default(), &ends.tasks);
    let admitted = (0..MANY).map(async |number| {
        let id: UserId = format!("user-{number}").parse().unwrap();
        let user = UserInfo { name: DisplayName::from(&id), id };
        let scope = PresenceScope::Room(lobby.clone());
        let rules = JoinConditions { create: true, within_quota: true, ..Default::default() };
        let (member, _) = presence.admit(scope, &user, Some(rules)).await.unwrap();
        (member, presence.track_online_soon(&user))
    });
    let guards = join_all(admitted).await;
    let present = async || {
        let snapshots = stays.bus.snapshots(vec![lobby.clone()]).await.unwrap();
        let online = stays.bus.online(String::new(), 1).await.unwrap();
        (snapshots[0].users.len(), online.unwrap().count)
    };
    until("all are there", async || present().await == (MANY, MANY as u64)).await;
    assert!(ends.tasks.finish(Duration::from_secs(5)).await);
    drop(guards);
    until("all have left", async || present().await == (0, 0)).await;
    for pattern in ["*:on:*", "*places:*"] {
        let script = format!("EVAL \"return #redis.call('KEYS', '{pattern}')\" 0");
        assert_eq!(server.command(&script).await.as_deref(), Some(":0"), "{pattern}");
    }
}

/// A node on Redis whose presence store is tested.
struct RedisRegistry {
    bus: Arc<RedisBus>,
    tasks: Tasks,
}

impl RedisRegistry {
    async fn start(server: &Redis, node: &str) -> Self {
        let tasks = Tasks::default();
        let options = redis_options(server.url(), PARTITIONS, node);
        let (mailboxes, metrics) = (mailbox().0, Arc::new(Metrics::new()));
        let bus = Arc::new(RedisBus::start(options, None, mailboxes, metrics, &tasks).unwrap());
        within(bus.reached()).await.unwrap();
        Self { bus, tasks }
    }
}

#[tokio::test]
async fn a_node_with_a_different_partition_count_does_not_start() {
    let server = Redis::start().await;
    let first = redis(&server, retention()).await;
    let tasks = Tasks::default();
    let options = redis_options(server.url(), 17, "n");
    let bus =
        RedisBus::start(options, None, mailbox().0, Arc::new(Metrics::new()), &tasks).unwrap();
    let error = within(bus.reached()).await.unwrap_err();
    assert!(
        matches!(error, RedisStartError::Partitions { configured: 17, recorded: 16 }),
        "{error}"
    );
    assert!(tasks.finish(Duration::from_secs(5)).await);
    assert!(first.tasks.finish(Duration::from_secs(5)).await);
}

#[tokio::test]
async fn appends_wait_for_redis_and_become_one_entry_each() {
    let mut server = Redis::start_durable().await;
    let fixture = redis(&server, retention()).await;
    let lobby = room("lobby");
    fixture.append(&lobby, MessageId::random()).await;
    server.kill().await;
    let waiting: Vec<_> =
        (0..100).map(|_| fixture.begin(&lobby, "ann", MessageId::random(), 10)).collect();
    server.restart().await;
    for (i, answer) in waiting.into_iter().enumerate() {
        let appended = within(answer).await.unwrap().unwrap();
        assert_eq!(appended.position.seq, i as Seq + 2);
    }
    assert!(fixture.tasks.finish(Duration::from_secs(5)).await);
}

#[tokio::test]
async fn an_append_past_its_deadline_is_unavailable() {
    let mut server = Redis::start().await;
    let fixture = redis(&server, retention()).await;
    server.kill().await;
    let begun = Instant::now();
    let answer = fixture.begin(&room("lobby"), "ann", MessageId::random(), 10);
    assert_eq!(within(answer).await.unwrap(), Err(BusError::Unavailable));
    let waited = begun.elapsed();
    assert!((Duration::from_secs(4)..Duration::from_secs(20)).contains(&waited), "{waited:?}");
    assert_eq!(fixture.bus.failed_check(), Some("bus"));
    assert!(fixture.tasks.finish(Duration::from_secs(5)).await);
}

#[tokio::test]
async fn an_evicting_redis_makes_the_node_unready() {
    let server = Redis::start().await;
    server.command("CONFIG SET maxmemory-policy allkeys-lru").await;
    let fixture = redis(&server, retention()).await;
    assert_eq!(fixture.bus.failed_check(), Some("maxmemory_policy"));
    server.command("CONFIG SET maxmemory-policy noeviction").await;
    until("it is ready", async || fixture.bus.failed_check().is_none()).await;
    assert!(fixture.tasks.finish(Duration::from_secs(5)).await);
}
