//! Which primary of a Redis Cluster serves which slot.
//!
//! All known nodes are queried at once. Each slot belongs to the primary whose claim has the
//! highest epoch, as the nodes settle it among themselves: a primary that is cut off keeps claiming
//! slots that another has taken over, with a lower epoch.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use parking_lot::Mutex;
use redis::{Client, ErrorKind, RedisError, RedisResult};

use super::{Address, ConnectParams, Dial, SingleServer, connection_config, first_answers};

/// The most nodes that are queried; their replies name the others.
const ASKED_MAX: usize = 16;

/// A Redis Cluster.
pub struct RedisCluster {
    params: ConnectParams,
    configured: Vec<Address>,
    /// All nodes that the last replies named.
    nodes: Mutex<BTreeSet<Address>>,
}

/// A primary and its slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Primary {
    pub(crate) address: Address,
    /// Slots, as ranges with both ends included.
    slots: Vec<(u16, u16)>,
    epoch: u64,
}

/// The primaries and their slots.
#[derive(Debug, Default)]
pub(crate) struct SlotMap {
    primaries: Vec<Primary>,
}

impl SlotMap {
    /// The primary that serves a slot.
    pub(crate) fn primary_of(&self, slot: u16) -> Option<&Address> {
        let serves = |primary: &&Primary| {
            primary.slots.iter().any(|(first, last)| (*first..=*last).contains(&slot))
        };
        let claims = self.primaries.iter().filter(serves);
        claims.max_by_key(|primary| primary.epoch).map(|primary| &primary.address)
    }
}

impl RedisCluster {
    pub(super) fn new(params: ConnectParams, configured: Vec<Address>) -> Self {
        Self { params, configured, nodes: Mutex::default() }
    }

    /// Makes connections to one of the nodes.
    pub(crate) fn dial(&self, address: &Address) -> RedisResult<Arc<dyn Dial>> {
        Ok(Arc::new(SingleServer::new(self.params.info(address)?)?))
    }

    /// The current slots, according to the nodes that reply soon.
    pub(crate) async fn slot_map(&self) -> RedisResult<SlotMap> {
        let known: Vec<Address> = self.nodes.lock().iter().cloned().collect();
        let nodes: BTreeSet<&Address> = self.configured.iter().chain(&known).collect();
        let asked = nodes.into_iter().take(ASKED_MAX).map(|node| self.query_nodes(node));
        let views =
            first_answers(asked, no_cluster("no node of the Redis Cluster replies")).await?;
        let named = views.iter().flat_map(|view| view.nodes.iter().cloned()).collect();
        *self.nodes.lock() = named;
        Ok(merge_views(views))
    }

    async fn query_nodes(&self, node: &Address) -> RedisResult<ClusterView> {
        let client = Client::open(self.params.info(node)?)?;
        let mut connection =
            client.get_multiplexed_async_connection_with_config(&connection_config()).await?;
        let text: String = redis::cmd("CLUSTER").arg("NODES").query_async(&mut connection).await?;
        parse_nodes(&text, node, self.params.tls.is_some())
            .ok_or_else(|| no_cluster("a node of the Redis Cluster replies in an unknown format"))
    }
}

/// The reply of one node.
#[derive(Debug, Default, PartialEq, Eq)]
struct ClusterView {
    nodes: Vec<Address>,
    primaries: Vec<Primary>,
}

/// Merges replies into the newest claim of each primary.
fn merge_views(views: Vec<ClusterView>) -> SlotMap {
    let mut newest: BTreeMap<Address, Primary> = BTreeMap::new();
    for primary in views.into_iter().flat_map(|view| view.primaries) {
        let known = newest.entry(primary.address.clone()).or_insert_with(|| primary.clone());
        if primary.epoch > known.epoch {
            *known = primary;
        }
    }
    SlotMap { primaries: newest.into_values().collect() }
}

/// Parses the reply of `asked` to `CLUSTER NODES`. With TLS, nodes are addressed by their names if
/// they have any, since their certificates contain those.
fn parse_nodes(text: &str, asked: &Address, by_name: bool) -> Option<ClusterView> {
    let mut view = ClusterView::default();
    for line in text.lines() {
        let mut fields = line.split(' ');
        let (_id, address, flags) = (fields.next()?, fields.next()?, fields.next()?);
        let epoch = fields.nth(3)?.parse().ok()?;
        let flags: Vec<&str> = flags.split(',').collect();
        if flags.contains(&"noaddr") || flags.contains(&"handshake") {
            continue;
        }
        let address = address_of(address, asked, by_name)?;
        view.nodes.push(address.clone());
        if !flags.contains(&"master") {
            continue;
        }
        // Behind the state of the node's link; slots in brackets are migrating.
        let slots = fields.skip(1).filter(|slots| !slots.starts_with('['));
        let slots = slots.map(|slots| {
            let (first, last) = slots.split_once('-').unwrap_or((slots, slots));
            Some((first.parse().ok()?, last.parse().ok()?))
        });
        let slots = slots.collect::<Option<_>>()?;
        view.primaries.push(Primary { address, slots, epoch });
    }
    Some(view)
}

/// `ip:port@busport[,name[,…]]`, without the ip if a node does not know its own.
fn address_of(text: &str, asked: &Address, by_name: bool) -> Option<Address> {
    let mut parts = text.split(',');
    let (host, port) = parts.next()?.split('@').next()?.rsplit_once(':')?;
    let name = parts.next().filter(|name| by_name && !name.is_empty());
    let host = match name.unwrap_or(host) {
        "" => &asked.host,
        host => host,
    };
    Some(Address { host: host.to_owned(), port: port.parse().ok()? })
}

fn no_cluster(text: &'static str) -> RedisError {
    (ErrorKind::Io, text).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(host: &str, port: u16) -> Address {
        Address { host: host.to_owned(), port }
    }

    #[test]
    fn nodes_name_primaries_and_their_slots() {
        let text = "\
            a 10.0.0.1:7000@17000,redis-a myself,master - 0 0 1 connected 0-5460 [93->-b]\n\
            b :7001@17001,,shard-id=x master - 0 1700000000000 7 connected 5461 5463-16383\n\
            c fd00::3:7002@17002 slave a 0 1700000000000 1 connected\n\
            d :0@0 master,noaddr - 0 0 0 disconnected\n";
        let by_ip = parse_nodes(text, &at("asked", 1), false).unwrap();
        assert_eq!(by_ip.nodes, [at("10.0.0.1", 7000), at("asked", 7001), at("fd00::3", 7002)]);
        let map = merge_views(vec![by_ip]);
        assert_eq!(map.primary_of(93), Some(&at("10.0.0.1", 7000)));
        assert_eq!(map.primary_of(5461), Some(&at("asked", 7001)));
        assert_eq!(map.primary_of(5462), None);
        assert_eq!(map.primary_of(16_383), Some(&at("asked", 7001)));
        let by_name = parse_nodes(text, &at("asked", 1), true).unwrap();
        assert_eq!(by_name.nodes[0], at("redis-a", 7000));
        assert_eq!(parse_nodes("+OK", &at("asked", 1), false), None);
    }

    #[test]
    fn the_claim_with_the_higher_epoch_counts() {
        let primary = |port, epoch| Primary { address: at("h", port), slots: vec![(0, 9)], epoch };
        let view = |primaries| ClusterView { nodes: Vec::new(), primaries };
        // A primary that was replaced, as it sees itself, and as the others see it.
        let old = view(vec![primary(1, 3), primary(2, 2)]);
        let new = view(vec![primary(2, 4)]);
        assert_eq!(merge_views(vec![old, new]).primary_of(5), Some(&at("h", 2)));
        // A primary that gave slots away.
        let before = view(vec![primary(1, 3)]);
        let after = view(vec![Primary { slots: vec![(0, 4)], ..primary(1, 4) }, primary(2, 2)]);
        assert_eq!(merge_views(vec![before, after]).primary_of(5), Some(&at("h", 2)));
    }
}
