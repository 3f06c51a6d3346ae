//! nginx is reloaded under load: clients notice nothing.

use std::time::Duration;

use super::{
    addresses,
    clients::{TestClients, default_profiles},
    length, start_nodes,
};
use crate::harness::{Nginx, Redis, connect, within};

#[tokio::test(flavor = "multi_thread")]
async fn an_nginx_reload_interrupts_no_client() {
    let redis = Redis::start().await;
    let nodes = start_nodes(&redis, 2).await;
    let nginx = Nginx::start_with_worker(&addresses(&nodes)).await;
    let mut profiles = default_profiles(&addresses(&nodes));
    for profile in &mut profiles {
        profile.urls = vec![format!("ws://{}/ws", nginx.address)];
    }
    let clients = TestClients::with_profiles(profiles).await.unwrap();
    let reloads = length(3, 10);
    for i in 0..reloads {
        clients.wait_for_acks(100).await.unwrap();
        nginx.signal("HUP").await;
        // New clients connect meanwhile, to the old worker or the new one.
        for j in 0..5 {
            within(connect(nginx.address, &format!("new-{i}-{j}"))).await;
            clients.run_for(Duration::from_millis(20)).await;
        }
    }
    clients.wait_for_acks(100).await.unwrap();
    let report = clients.finish().await.unwrap();
    nginx.stop().await;
    report.check_seamless(&format!("{reloads} x nginx reload"));
    assert!(report.connections.iter().all(|count| *count == 1), "{:?}", report.connections);
    assert!(report.longest_silence() < super::SHORT, "{:?}", report.silences);
}
