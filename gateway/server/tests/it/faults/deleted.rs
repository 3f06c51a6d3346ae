//! A deleted room stays deleted: a node that was cut off does not restore it.

use std::{sync::Arc, time::Duration};

use skein_client::{
    connection::{ReceivedMessage, RequestError},
    frames,
};
use skein_core::{
    bus::{Bus, Mailboxes, ReadRange},
    drain::Tasks,
    hub::{Hub, MAILBOX_LEN},
    telemetry::metrics::Metrics,
};
use skein_protocol::{error::ErrorCode, protocol::server_frame::ServerFrame};
use skein_redis::RedisBus;

use super::proxy::{Mode, Proxy};
use crate::harness::{
    Gateway, Redis, get, next_message, redis_options, room, say, start_hub, until, within,
};

/// A node without a listener, for calls that no frame can make.
struct NodeWithoutListener {
    bus: Arc<dyn Bus>,
    _hub: Hub,
    tasks: Tasks,
}

impl NodeWithoutListener {
    async fn start(redis: &Redis) -> Self {
        let (metrics, tasks) = (Arc::new(Metrics::new()), Tasks::default());
        let (mailboxes, letters) = Mailboxes::new(1, MAILBOX_LEN, metrics.clone());
        let options = redis_options(redis.url(), 256, "bare");
        let bus =
            RedisBus::start(options, None, mailboxes.clone(), metrics.clone(), &tasks).unwrap();
        within(bus.reached()).await.unwrap();
        let bus: Arc<dyn Bus> = Arc::new(bus);
        let hub = start_hub(&bus, mailboxes, letters, &metrics, &tasks);
        Self { bus, _hub: hub, tasks }
    }
}

/// Ann's node is cut off while her room is deleted, and `meanwhile` happens.
async fn delete_while_cut_off(mut redis: Redis, restarts: bool) {
    let proxy = Proxy::to(redis.address()).await.unwrap();
    let url = proxy.redis_url();
    let cut_off = Gateway::start_on(&redis, &[("cluster.redis_url", url.as_str())]).await;
    let other = NodeWithoutListener::start(&redis).await;
    let lobby = room("lobby");
    let mut ann = cut_off.connect("ann").await;
    let joined = ann.join(&lobby).await.unwrap();
    for seq in 1..=20 {
        assert_eq!(say(&mut ann, &lobby, "secret").await.seq, seq);
        next_message(&mut ann).await;
    }
    proxy.set(Mode::Cut);
    until("cut off", async || get(cut_off.address, "/ready").await.status == 503).await;
    within(other.bus.delete(lobby.clone())).await.unwrap();
    if restarts {
        redis.kill().await;
        redis.restart().await;
    }
    proxy.set(Mode::Open);
    until("back", async || get(cut_off.address, "/ready").await.status == 200).await;

    let told = async {
        loop {
            if let ReceivedMessage::Frame(ServerFrame::RoomClosed(closed), _) =
                ann.next().await.unwrap()
            {
                return closed;
            }
        }
    };
    assert_eq!(within(told).await.room, lobby);
    let frame = frames::OutgoingMessage::text(&lobby, &serde_json::Value::Null);
    let refused = ann.request(&frame).await.unwrap_err();
    assert!(matches!(refused, RequestError::Rejected(no) if no.code == ErrorCode::NotJoined));
    let again = ann.join(&lobby).await.unwrap();
    let epoch = again.epoch;
    assert_ne!(epoch, joined.epoch);
    assert_eq!(again.seq, 0);
    let page =
        within(other.bus.read(lobby.clone(), ReadRange::Newest { limit: 100 })).await.unwrap();
    assert!(page.entries.is_empty(), "what was deleted is back: {} entries", page.entries.len());
    assert_eq!(page.epoch, epoch);
    assert_eq!(say(&mut ann, &lobby, "anew").await.seq, 1);
    assert_eq!(next_message(&mut ann).await.seq, 1);
    let page = within(other.bus.read(lobby, ReadRange::Newest { limit: 100 })).await.unwrap();
    assert_eq!(page.entries.len(), 1);
    cut_off.stop().await;
    assert!(other.tasks.finish(Duration::from_secs(5)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_room_deleted_while_a_node_was_cut_off_stays_deleted() {
    delete_while_cut_off(Redis::start().await, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_outlives_a_redis_restart_before_all_nodes_know() {
    delete_while_cut_off(Redis::start_durable().await, true).await;
}
