//! Clients that send useless frames as fast as they can: they are throttled, then closed with 1008
//! `rate_limited`, and others are served meanwhile.

use crate::{
    harness::{Gateway, Nginx, get, poll_pause, room, say},
    rfc::client::{BINARY, CLOSE, CONTINUATION, FIN, PING, PONG, RawClient, TEXT, frame, text},
};

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_useless_frames_close_with_rate_limited() {
    let gateway = Gateway::start(&[]).await;
    let ping = frame(FIN | PING, b"");
    let empty = frame(CONTINUATION, b"");
    let deep = text(&format!(r#"{{"type":"ping","timestamp":{}"#, "[".repeat(200)));
    let mut floods = vec![];
    for (path, begun, frames) in [
        ("/ws/echo", vec![], ping.clone()),
        ("/ws?user=a", vec![], ping),
        ("/ws?user=b", vec![], frame(FIN | PONG, b"x")),
        ("/ws/echo", frame(TEXT, b""), empty),
        ("/ws?user=c", vec![], text("x")),
        ("/ws?user=d", vec![], deep),
        ("/ws?user=e", vec![], frame(FIN | BINARY, &[0xFF, 0xFF, 1])),
        ("/ws?user=f", vec![], text(r#"{"type":"message","room":"nowhere","content":1}"#)),
    ] {
        let mut client = RawClient::open(gateway.address, path, &[]).await;
        client.send(&begun).await;
        let frames = frames.repeat(1 + 4096 / frames.len());
        floods.push((path, tokio::spawn(async move { client.flood(&frames).await })));
    }
    let mut legitimate = gateway.connect("legitimate").await;
    let lobby = room("lobby");
    legitimate.join(&lobby).await.unwrap();
    let mut said = 0;
    while floods.iter().any(|(_, flood)| !flood.is_finished()) {
        say(&mut legitimate, &lobby, "here").await;
        said += 1;
        // Stays below the rate limit.
        for _ in 0..5 {
            poll_pause().await;
        }
    }
    assert!(said > 10, "{said} messages");
    for (path, flood) in floods {
        let closed = flood.await.unwrap();
        let expected = [&1008_u16.to_be_bytes()[..], b"rate_limited"].concat();
        assert_eq!(closed, Some(expected), "{path}");
    }
    let metrics = get(gateway.admin, "/metrics").await.body;
    assert!(metrics.contains("gateway_input_rate_limit_closes_total 8"), "{metrics}");
    assert!(metrics.contains(r#"gateway_input_throttles_total{reason="overhead"}"#));
}

#[tokio::test]
async fn a_close_frame_reaches_a_client_that_is_still_sending() {
    let gateway = Gateway::start(&[]).await;
    let nginx = Nginx::start(&[gateway.address]).await;
    let big = text(&"x".repeat(4 << 20));
    for address in [gateway.address, nginx.address] {
        for path in ["/ws/echo", "/ws?user=a"] {
            let mut client = RawClient::open(address, path, &[]).await;
            // A client that writes everything before it reads.
            client.send(&big).await;
            let close = loop {
                let (first, payload) = client.next().await.expect("the close frame arrives");
                if first == FIN | CLOSE {
                    break payload;
                }
            };
            assert_eq!(&close[..2], 1009_u16.to_be_bytes(), "{address}{path}");
            client.send(&frame(FIN | CLOSE, &close)).await;
            assert_eq!(client.next().await, None, "{address}{path}");
        }
    }
}
