//! The announcements of nodes in Redis: `gw:nodes` (hash: of each process `<time, ms>
//! <announcement>`).

use std::{sync::Arc, time::Duration};

use super::{
    store::StoreWorker,
    untrusted::{Lossy, report},
};
use skein_core::{
    bus::{
        BusError,
        nodes::{AnnouncedNode, Announcements, NodeAnnouncement},
    },
    telemetry::metrics::InvalidValue,
};

/// Retention of the announcement of a node that was killed: so long is it missing.
const ANNOUNCEMENT_TTL: Duration = Duration::from_secs(15 * 60);

impl StoreWorker {
    /// Publishes the announcement of this node, and returns those of all nodes.
    pub(super) async fn announce_node(
        self: Arc<Self>,
        own: NodeAnnouncement,
    ) -> Result<Announcements, BusError> {
        let process = self.router.process();
        let text = serde_json::to_string(&own).expect("an announcement serialises");
        let mut announce = self.scripts.announce_node.key(self.router.keyspace().nodes());
        announce.arg(&process.name).arg(text).arg(ANNOUNCEMENT_TTL.as_millis() as u64);
        announce.arg(process.node_prefix());
        let (now, rows): (u64, Vec<(Lossy, Lossy)>) =
            self.run_script(0, "announcements of nodes", &announce).await?;
        let lease = process.lease.duration;
        let mut nodes = Vec::with_capacity(rows.len());
        let mut returning = None;
        for (Lossy(name), Lossy(row)) in rows {
            match parse_row(&row, now, lease) {
                Some(node) if name != process.name && name.starts_with(process.node_prefix()) => {
                    // The row of this node's former process, which the script has removed.
                    returning = node.time_until_return();
                }
                Some(node) if node.has_not_returned() => {}
                Some(node) => nodes.push(AnnouncedNode { is_own: name == process.name, ..node }),
                None => report(self.router.metrics(), InvalidValue::Announcement, &name),
            }
        }
        nodes.sort_unstable_by(|a, b| {
            (&a.announcement.node, a.started).cmp(&(&b.announcement.node, b.started))
        });
        Ok(Announcements { nodes, returning })
    }

    /// Removes the announcement of this node.
    pub(super) async fn withdraw_node(self: Arc<Self>) -> Result<(), BusError> {
        let (key, process) = (self.router.keyspace().nodes(), &self.router.process().name);
        self.query(0, async |connection| {
            redis::cmd("HDEL").arg(&key).arg(process).query_async(connection).await
        })
        .await
    }
}

/// Parses a row, at the time `now` of the server.
fn parse_row(row: &str, now: u64, lease: Duration) -> Option<AnnouncedNode> {
    let (at, announcement) = row.split_once(' ')?;
    let at: u64 = at.parse().ok()?;
    let announcement: NodeAnnouncement = serde_json::from_str(announcement).ok()?;
    let age = Duration::from_millis(now.saturating_sub(at));
    let started = at.saturating_sub(announcement.uptime_ms);
    let returns_after = Duration::from_millis(announcement.returning_ms.unwrap_or_default());
    let is_alive = age < lease.max(returns_after);
    Some(AnnouncedNode { announcement, is_own: false, age, is_alive, started })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_is_alive_for_as_long_as_a_lease_lasts() {
        let lease = Duration::from_secs(10);
        let row = r#"1000000 {"node":"a","uptime_ms":400}"#;
        let node = |now| parse_row(row, now, lease).unwrap();
        assert!(node(1_000_000).is_alive && node(1_009_999).is_alive && node(0).is_alive);
        assert!(!node(1_010_000).is_alive);
        assert_eq!((node(1_002_000).age.as_secs(), node(0).started), (2, 999_600));
        let row = r#"1000000 {"node":"a","connections":7,"returning_ms":12000}"#;
        let node = |now| parse_row(row, now, lease).unwrap();
        assert_eq!(node(1_004_000).time_until_return(), Some((7, Duration::from_secs(8))));
        assert!(node(1_011_000).is_alive && !node(1_011_000).has_not_returned());
        assert!(
            node(1_013_000).has_not_returned() && node(1_013_000).time_until_return().is_none()
        );
        for bad in ["", "x {}", "1 {}", "1", r#"1 {"node":""}"#] {
            assert!(parse_row(bad, 0, lease).is_none(), "{bad}");
        }
    }
}
