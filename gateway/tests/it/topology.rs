//! Redis in the arrangements that `cluster.redis_url` can name.

use std::{sync::Arc, time::Duration};

use gateway::bus::redis::topology::{self, Dial, TlsFiles, Way};
use redis::{AsyncConnectionConfig, RedisResult};

use crate::{
    harness::{Gateway, get, until, within},
    servers::{Encrypted, Watched},
    talk::{Talk, talk_for},
};

fn open(url: &str, tls: &TlsFiles) -> Arc<dyn Dial> {
    match topology::open(url, tls) {
        Ok(Way::One(dial)) => dial,
        Ok(Way::Many(_)) => panic!("it is no Redis Cluster"),
        Err(error) => panic!("{error}"),
    }
}

/// The port of the server that a new connection leads to.
async fn port(dial: &Arc<dyn Dial>) -> RedisResult<u16> {
    let mut connection = dial.connect(AsyncConnectionConfig::new()).await?;
    port_of(redis::cmd("INFO").arg("server").query_async(&mut connection).await?)
}

/// The same of a connection to read by.
async fn reader_port(dial: &Arc<dyn Dial>) -> RedisResult<u16> {
    let mut reader = dial.reader().await?;
    port_of(redis::cmd("INFO").arg("server").query_async(&mut *reader).await?)
}

fn port_of(info: String) -> RedisResult<u16> {
    let port = info.lines().find_map(|line| line.strip_prefix("tcp_port:"));
    Ok(port.and_then(|port| port.trim().parse().ok()).expect("a server has a port"))
}

#[tokio::test]
async fn tls_is_checked_by_both_sides_and_users_log_in() {
    let server = Encrypted::start().await;
    let files = |ca: bool, own: bool| TlsFiles {
        ca: ca.then(|| server.ca.clone()),
        own: own.then(|| server.own.clone()),
    };
    let open = |url: &str, files: TlsFiles| open(url, &files);

    let dial = open(&server.url(), files(true, true));
    assert_eq!(within(port(&dial)).await.unwrap(), server.port);
    assert_eq!(within(reader_port(&dial)).await.unwrap(), server.port);

    // A server that the public authorities do not know, a node without a certificate, a server of
    // another name, and a wrong password.
    let dial = open(&server.url(), files(false, true));
    let error = within(port(&dial)).await.unwrap_err().to_string();
    assert!(error.contains("UnknownIssuer"), "{error}");
    let dial = open(&server.url(), files(true, false));
    assert!(within(port(&dial)).await.is_err());
    let dial = open(&server.url().replace("127.0.0.1", "localhost"), files(true, true));
    let error = within(port(&dial)).await.unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    let dial = open(&format!("rediss://gateway:no@127.0.0.1:{}", server.port), files(true, true));
    let error = within(port(&dial)).await.unwrap_err();
    assert!(
        error.to_string().contains("WRONGPASS") || error.code() == Some("WRONGPASS"),
        "{error}"
    );
}

#[tokio::test]
async fn files_that_are_not_there_or_no_certificates_are_told_at_the_start() {
    let path = tempfile::NamedTempFile::new().unwrap().path().to_owned();
    let files = TlsFiles { ca: Some(path.clone()), own: None };
    let Err(error) = topology::open("rediss://127.0.0.1", &files) else { panic!("accepted") };
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    let text = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(text.path(), "no certificate").unwrap();
    let path = text.path().to_owned();
    for files in [
        TlsFiles { ca: Some(path.clone()), own: None },
        TlsFiles { ca: None, own: Some((path.clone(), path.clone())) },
    ] {
        let Err(error) = topology::open("rediss://127.0.0.1", &files) else { panic!("accepted") };
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

#[tokio::test]
async fn the_primary_is_the_one_that_sentinels_name() {
    let mut watched = Watched::start().await;
    let (first, second) = (watched.servers[0].port, watched.servers[1].port);
    let dial = open(&watched.url(0), &TlsFiles::default());
    assert!(dial.reader().await.is_err(), "where to read is known when a primary is");
    assert_eq!(within(port(&dial)).await.unwrap(), first);
    assert_eq!(within(reader_port(&dial)).await.unwrap(), first);

    // A failover in which the old primary lives on: its connections would stand.
    let moved = dial.moved();
    watched.fail_over(0).await;
    within(moved).await;
    until("the new primary is reached", async || port(&dial).await.is_ok_and(|p| p == second))
        .await;
    assert_eq!(within(reader_port(&dial)).await.unwrap(), second);

    // Where it dies.
    until("the old primary follows", async || watched.is_followed(1).await).await;
    let moved = dial.moved();
    watched.servers[1].process.kill().await;
    within(moved).await;
    until("the first is reached again", async || port(&dial).await.is_ok_and(|p| p == first)).await;
    assert_eq!(within(reader_port(&dial)).await.unwrap(), first);
}

#[tokio::test]
async fn sentinels_tell_of_each_other_and_one_that_is_frozen_holds_nobody_up() {
    let mut watched = Watched::start().await;
    let (first, second) = (watched.servers[0].port, watched.servers[1].port);
    // One is configured, and learns of the others before it dies.
    let dial = open(&watched.url(2), &TlsFiles::default());
    assert_eq!(within(port(&dial)).await.unwrap(), first);
    watched.sentinels[2].process.kill().await;
    assert_eq!(within(port(&dial)).await.unwrap(), first);

    // One that answers nothing holds nobody up, also while another primary takes over.
    watched.sentinels[1].process.signal("STOP");
    watched.fail_over(0).await;
    until("the new primary is reached", async || port(&dial).await.is_ok_and(|p| p == second))
        .await;
}

#[tokio::test]
async fn a_name_that_sentinels_do_not_know_is_told() {
    let watched = Watched::start().await;
    let url = watched.url(0).replace("/main?", "/mian?");
    let dial = open(&url, &TlsFiles::default());
    let error = within(port(&dial)).await.unwrap_err().to_string();
    assert!(error.contains("mian"), "{error}");
}

/// Two nodes on what `url` names, with room for the time that a failover takes.
async fn two_nodes(url: &str) -> [Gateway; 2] {
    let options = [
        ("cluster.redis_url", url),
        ("auth.allow_anonymous", "true"),
        ("limits.messages_per_second", "0"),
        ("publish.wait", "20s"),
    ];
    [Gateway::start(&options).await, Gateway::start(&options).await]
}

/// Waits until clients are served, by a server that agrees `agreed` times with its nodes.
async fn served_after_agreement(gateway: &Gateway, agreed: usize) {
    until("the nodes agree", async || {
        let metrics = get(gateway.admin, "/metrics").await.body;
        let count =
            |line: &str| line.rsplit(' ').next().and_then(|count| count.parse::<usize>().ok());
        let agreements =
            metrics.lines().filter(|line| line.starts_with("gateway_agreements_total"));
        agreements.filter_map(count).sum::<usize>() >= agreed
            && get(gateway.address, "/ready").await.status == 200
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_sentinels_fail_over() {
    let mut watched = Watched::start().await;
    let nodes = two_nodes(&watched.url(0)).await;
    let talk = Talk::start(&nodes.each_ref().map(|node| node.address)).await;
    let acked = talk
        .check_while(async {
            talk_for(Duration::from_millis(500)).await;
            // The old primary is told to follow, and closes no connection before that.
            watched.fail_over(0).await;
            served_after_agreement(&nodes[0], 2).await;
            until("the old primary follows", async || watched.is_followed(1).await).await;
            talk_for(Duration::from_millis(500)).await;
            watched.servers[1].process.kill().await;
            served_after_agreement(&nodes[0], 3).await;
            talk_for(Duration::from_millis(500)).await;
        })
        .await;
    println!("2 failovers behind Sentinels: {acked} acknowledged, 0 lost, 0 duplicated");
}
