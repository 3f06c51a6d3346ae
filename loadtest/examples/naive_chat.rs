//! A naive chat with axum and tokio, as their documentation shows it: a broadcast channel per room,
//! two tasks per connection. `loadtest bench` measures it beside the gateway. With
//! `REDIS=redis://…` messages pass through Redis' pub/sub to every node.
//!
//! It keeps no log, has no limits, and disconnects a client that falls 4,096 messages behind.

#![allow(clippy::disallowed_methods, reason = "the example is written as usual")]

use std::{collections::HashMap, sync::Arc};

use axum::{
    Router,
    extract::{
        Query, State,
        ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade},
    },
    response::Response,
    routing::get,
    serve::ListenerExt as _,
};
use futures_util::{SinkExt as _, StreamExt as _};
use parking_lot::Mutex;
use redis::{AsyncTypedCommands as _, aio::MultiplexedConnection};
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

type ChatRooms = Arc<Mutex<HashMap<String, broadcast::Sender<Utf8Bytes>>>>;
type BoxError = Box<dyn std::error::Error>;

#[derive(Clone)]
struct NaiveChat {
    rooms: ChatRooms,
    redis: Option<MultiplexedConnection>,
}

#[derive(Deserialize)]
struct ConnectQuery {
    user: Option<String>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum NaiveRequest {
    Join { room: String },
    Message { id: String, content: String },
}

#[derive(Serialize)]
struct NaiveMessage<'a> {
    r#type: &'static str,
    room: &'a str,
    id: &'a str,
    from: &'a str,
    content: &'a str,
    timestamp: String,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    rlimit::increase_nofile_limit(u64::MAX)?;
    let rooms = ChatRooms::default();
    let redis = match std::env::var("REDIS") {
        Ok(url) => Some(connect(&url, rooms.clone()).await?),
        Err(_) => None,
    };
    let router = Router::new()
        .route("/ws", get(chat))
        .route("/ws/echo", get(echo))
        .route("/ready", get(async || "ready"))
        .with_state(NaiveChat { rooms, redis });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    eprintln!(r#"{{"listen":"{}"}}"#, listener.local_addr()?);
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, router).await?;
    Ok(())
}

/// Returns the connection to publish on; messages that any node publishes are sent to the rooms.
async fn connect(url: &str, rooms: ChatRooms) -> Result<MultiplexedConnection, BoxError> {
    let client = redis::Client::open(url)?;
    let mut subscription = client.get_async_pubsub().await?;
    subscription.psubscribe("*").await?;
    tokio::spawn(async move {
        let mut messages = subscription.into_on_message();
        while let Some(message) = messages.next().await {
            let room = rooms.lock().get(message.get_channel_name()).cloned();
            if let (Some(room), Ok(payload)) = (room, message.get_payload::<String>()) {
                let _ = room.send(payload.into());
            }
        }
    });
    Ok(client.get_multiplexed_async_connection().await?)
}

async fn chat(
    State(chat): State<NaiveChat>,
    query: Query<ConnectQuery>,
    ws: WebSocketUpgrade,
) -> Response {
    let user = query.0.user.unwrap_or_else(|| "anonymous".to_owned());
    ws.protocols([skein_protocol::SUBPROTOCOL]).on_upgrade(|socket| serve(socket, user, chat))
}

async fn serve(socket: WebSocket, user: String, mut chat: NaiveChat) {
    let (mut sender, mut receiver) = socket.split();
    if sender.send(Message::Text(r#"{"type":"connected"}"#.into())).await.is_err() {
        return;
    }
    let Some(Ok(Message::Text(text))) = receiver.next().await else { return };
    let Ok(NaiveRequest::Join { room }) = serde_json::from_str(&text) else { return };
    let room_sender = chat.rooms.lock().entry(room.clone()).or_insert_with(new_room).clone();
    let mut messages = room_sender.subscribe();
    if sender.send(Message::Text(r#"{"type":"joined"}"#.into())).await.is_err() {
        return;
    }
    let mut sending = tokio::spawn(async move {
        while let Ok(message) = messages.recv().await {
            if sender.send(Message::Text(message)).await.is_err() {
                return;
            }
        }
    });
    let mut receiving = tokio::spawn(async move {
        while let Some(Ok(Message::Text(text))) = receiver.next().await {
            let Ok(NaiveRequest::Message { id, content }) = serde_json::from_str(&text) else {
                continue;
            };
            let timestamp = skein_protocol::timestamp(std::time::SystemTime::now());
            let (room, id, content) = (&room, &id, &content);
            let message =
                NaiveMessage { r#type: "message", room, id, from: &user, content, timestamp };
            let Ok(message) = serde_json::to_string(&message) else { continue };
            match &mut chat.redis {
                Some(redis) => {
                    let _ = redis.publish(room, message).await;
                }
                None => {
                    let _ = room_sender.send(message.into());
                }
            }
        }
    });
    tokio::select! {
        _ = &mut sending => receiving.abort(),
        _ = &mut receiving => sending.abort(),
    }
}

fn new_room() -> broadcast::Sender<Utf8Bytes> {
    broadcast::channel(4096).0
}

async fn echo(ws: WebSocketUpgrade) -> Response {
    ws.on_upgrade(async |mut socket| {
        while let Some(Ok(Message::Text(text))) = socket.recv().await {
            if socket.send(Message::Text(text)).await.is_err() {
                return;
            }
        }
    })
}
