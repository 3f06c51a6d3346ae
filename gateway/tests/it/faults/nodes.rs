//! A gateway dies, or is told to go: its clients continue elsewhere, the others notice nothing.

use std::time::Duration;

use super::{SHORT, UNLIMITED, addresses, length, party::Party, start_nodes, until_ready};
use crate::harness::{Node, Redis};

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_takes_nothing_with_it() {
    let redis = Redis::start().await;
    let mut nodes = start_nodes(&redis, 3).await;
    let party = Party::at(&addresses(&nodes)).await;
    let kills = length(1, 10);
    for kill in 0..kills {
        party.goes_on(200).await;
        let at = kill % nodes.len();
        nodes[at].process.kill().await;
        party.goes_on(300).await;
        if kill + 1 < kills {
            let address = nodes[at].address;
            nodes[at] = Node::start(&redis, Some(address), &UNLIMITED).await;
        }
    }
    let report = party.finish().await;
    report.check_seamless(&format!("{kills} x gateway SIGKILL"));
    // Those who were elsewhere heard the others all the time.
    if kills == 1 {
        for reader in [1, 2, 4, 5] {
            assert_eq!(report.connections[reader], 1);
            assert!(report.quiet[reader] < SHORT, "{:?}", report.quiet);
        }
    }
    assert!(report.connections.iter().sum::<usize>() > report.clients);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_told_to_go_sends_its_clients_on() {
    let redis = Redis::start().await;
    let mut nodes = start_nodes(&redis, 3).await;
    let party = Party::at(&addresses(&nodes)).await;
    let rounds = length(1, 6);
    for round in 0..rounds {
        party.goes_on(200).await;
        let at = round % nodes.len();
        let address = nodes[at].address;
        nodes[at].process.signal("TERM");
        let gone = nodes.remove(at);
        let (code, said) = gone.end().await;
        assert_eq!(code, Some(0), "{said}");
        party.goes_on(200).await;
        nodes.insert(at, Node::start(&redis, Some(address), &UNLIMITED).await);
    }
    until_ready(&nodes).await;
    party.talks_for(Duration::from_millis(200)).await;
    let report = party.finish().await;
    report.check_seamless(&format!("{rounds} x gateway SIGTERM"));
    if rounds == 1 {
        for reader in [1, 2, 4, 5] {
            assert_eq!(report.connections[reader], 1);
            assert!(report.quiet[reader] < SHORT, "{:?}", report.quiet);
        }
    }
}
