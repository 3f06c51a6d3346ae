//! The announcement of a single node, to itself. The reference for [`NodeRegistry`].

use std::time::Duration;

use super::{MemoryBus, ready};
use crate::bus::{
    BoxFuture, BusError,
    nodes::{AnnouncedNode, Announcements, NodeAnnouncement, NodeRegistry},
    presence_store::unix_millis_now,
};

impl NodeRegistry for MemoryBus {
    fn announce(&self, own: NodeAnnouncement) -> BoxFuture<Result<Announcements, BusError>> {
        let started = unix_millis_now().saturating_sub(own.uptime_ms);
        let (age, announcement) = (Duration::ZERO, own);
        let own = AnnouncedNode { announcement, is_own: true, age, is_alive: true, started };
        ready(Ok(Announcements { nodes: vec![own], returning: None }))
    }

    fn withdraw(&self) -> BoxFuture<Result<(), BusError>> {
        ready(Ok(()))
    }
}
