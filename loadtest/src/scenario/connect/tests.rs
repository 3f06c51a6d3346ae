//! The whole command against a minimal server over real sockets.

use clap::Parser;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::{
    accept_hdr_async,
    tungstenite::{
        Message,
        handshake::server::{ErrorResponse, Request, Response},
        protocol::CloseFrame,
    },
};

use super::*;
use crate::{
    args::{Cli, LoadCommand},
    report::connections::ConnectionReport,
};

/// Behaviour of the server for each of its connections.
type BehaviourOf = fn(number: u32) -> PeerBehaviour;

#[derive(Clone, Copy, Debug, PartialEq)]
enum PeerBehaviour {
    /// Sends `connected`, answers a `join`, then waits for the close.
    Serve,
    /// Answers with HTTP 429.
    Reject,
    /// Closes with 1008 instead of `connected`.
    Close,
    /// Rejects the `join`.
    RejectJoin,
    /// Serves, pings, and closes with 1012 after the pong.
    Drain,
}

/// Runs `loadtest connect` with `arguments` against a server that behaves as `behaviour_of` says.
async fn check(behaviour_of: BehaviourOf, arguments: &str) -> (ConnectionReport, Vec<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/ws", listener.local_addr().unwrap());
    let command = format!("loadtest connect --url {url} --ramp 1000/s {arguments}");
    let LoadCommand::Connect(args) = Cli::try_parse_from(command.split(' ')).unwrap().command
    else {
        panic!("not `connect`")
    };
    let mut peers = tokio::task::JoinSet::new();
    let accept = async {
        for number in 0.. {
            let (stream, _) = listener.accept().await.unwrap();
            peers.spawn(serve(stream, behaviour_of(number)));
        }
    };
    let report = tokio::select! {
        report = run(args) => report.unwrap().expect("this is the only process"),
        () = accept => panic!("the server ended"),
    };
    while let Some(peer) = peers.join_next().await {
        peer.unwrap();
    }
    // A busy machine may make the times invalid, which is not tested here.
    (report.connections.unwrap(), report.failures)
}

async fn serve(stream: TcpStream, behaviour: PeerBehaviour) {
    #[expect(clippy::result_large_err, reason = "tungstenite wants it so")]
    let callback = |request: &Request, mut response: Response| {
        assert!(request.uri().query().unwrap().starts_with("user=load-"));
        if behaviour == PeerBehaviour::Reject {
            let mut rejection = ErrorResponse::new(None);
            *rejection.status_mut() = 429_u16.try_into().unwrap();
            return Err(rejection);
        }
        response.headers_mut().insert("sec-websocket-protocol", "chat.v1".parse().unwrap());
        Ok(response)
    };
    let Ok(mut socket) = accept_hdr_async(stream, callback).await else { return };
    let close = |code: u16, reason: &'static str| {
        Message::Close(Some(CloseFrame { code: code.into(), reason: reason.into() }))
    };
    if behaviour == PeerBehaviour::Close {
        socket.send(close(1008, "forbidden")).await.unwrap();
    } else {
        socket.send(Message::text(r#"{"type":"connected"}"#)).await.unwrap();
    }
    if behaviour == PeerBehaviour::Drain {
        socket.send(Message::Ping("p".into())).await.unwrap();
    }
    while let Some(Ok(message)) = socket.next().await {
        match message {
            Message::Text(text) => {
                let frame: Value = serde_json::from_str(&text).unwrap();
                assert_eq!((&frame["type"], &frame["history"]), (&json!("join"), &json!(0)));
                let answer = if behaviour == PeerBehaviour::RejectJoin {
                    json!({"type": "error", "code": "room_full"})
                } else {
                    json!({"type": "joined", "room": frame["room"], "seq": 0})
                };
                // After a close this fails as expected.
                let _ = socket.send(Message::text(answer.to_string())).await;
            }
            Message::Pong(_) => socket.send(close(1012, "draining")).await.unwrap(),
            _ => {}
        }
    }
}

#[tokio::test]
async fn connections_are_opened_held_and_closed() {
    let (report, failures) = check(|_| PeerBehaviour::Serve, "-n 20 --hold 10ms --rooms 3").await;
    assert!(failures.is_empty(), "{report:?}");
    assert_eq!((report.opened, report.held), (20, 20));
    assert!(report.connected_ms.unwrap().p50 <= report.joined_ms.unwrap().max);
}

#[tokio::test]
async fn connections_without_rooms_join_none() {
    let (report, failures) = check(|_| PeerBehaviour::Serve, "-n 3 --hold 1ms").await;
    assert!(failures.is_empty() && report.joined_ms.is_none(), "{report:?}");
}

#[tokio::test]
async fn failures_are_counted_by_kind() {
    let behaviour_of = |number: u32| match number % 4 {
        0 => PeerBehaviour::Serve,
        1 => PeerBehaviour::Reject,
        2 => PeerBehaviour::Close,
        _ => PeerBehaviour::RejectJoin,
    };
    let (report, failures) = check(behaviour_of, "-n 8 --hold 1ms --room r").await;
    assert_eq!(failures, ["2 of 8 connections were held"]);
    assert_eq!((report.opened, report.held, report.rejected["429"]), (2, 2, 2));
    assert_eq!(report.failed["closed while opening: 1008 forbidden"], 2);
    assert_eq!(report.failed["join rejected: room_full"], 2);
}

#[tokio::test]
async fn pings_are_answered_and_closes_counted_by_code() {
    // The hold ends when no connection is left.
    let (report, _) = check(|_| PeerBehaviour::Drain, "-n 4 --hold 1m").await;
    assert_eq!((report.opened, report.held), (4, 0));
    assert_eq!(report.closed_while_held["1012 draining"], 4);
}

#[tokio::test]
async fn silent_server_times_out() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/", listener.local_addr().unwrap());
    let command = format!("loadtest connect --url {url} -n 2 --timeout 20ms --hold 1ms");
    let LoadCommand::Connect(args) = Cli::try_parse_from(command.split(' ')).unwrap().command
    else {
        panic!("not `connect`")
    };
    let report = run(args).await.unwrap().and_then(|report| report.connections).unwrap();
    assert_eq!((report.opened, report.failed["timed out"]), (0, 2));
}

#[tokio::test]
async fn impossible_runs_are_rejected_before_they_start() {
    let rejected = async |arguments: &str| {
        let command = format!("loadtest connect {arguments}");
        let LoadCommand::Connect(args) = Cli::try_parse_from(command.split(' ')).unwrap().command
        else {
            panic!("not `connect`")
        };
        match run(args).await {
            Err(error) => error,
            Ok(_) => panic!("the run started"),
        }
    };
    assert!(matches!(rejected("-n 1 --pid 4294967295").await, ScenarioError::Process(_)));
    let error = rejected("-n 1000000").await;
    // The limit that is met first depends on the machine.
    assert!(
        matches!(error, ScenarioError::Descriptors { .. } | ScenarioError::Ports { .. }),
        "{error}"
    );
    let error = rejected("-n 1 --url ws://nowhere.invalid/").await;
    assert!(error.to_string().starts_with("nowhere.invalid:80"), "{error}");
}
