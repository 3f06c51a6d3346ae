//! Clients of the trials: steady traffic, clients that break rules, clients that read nothing.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use skein_client::{connection::ClientConnection, options::ConnectOptions};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    harness::within,
    soak::raw_client::{handshake, join_frame},
};

/// The rooms that the steady traffic goes to.
const ROOMS: usize = 10;
/// How long a request of the steady traffic may take before its client reconnects.
const REQUEST_MAX: Duration = Duration::from_secs(10);

/// Clients that publish to some rooms and read them, whatever happens to their nodes.
pub struct Traffic {
    bytes: Arc<AtomicUsize>,
    is_paused: Arc<AtomicBool>,
    _clients: JoinSet<()>,
}

impl Traffic {
    /// One client of each node, which sends 10 messages per second.
    pub fn start(nodes: impl IntoIterator<Item = SocketAddr>) -> Self {
        let (bytes, is_paused) = (Arc::new(AtomicUsize::new(10)), Arc::new(AtomicBool::new(false)));
        let mut clients = JoinSet::new();
        for (number, node) in nodes.into_iter().enumerate() {
            clients.spawn(talk(node, format!("talker{number}"), bytes.clone(), is_paused.clone()));
        }
        Self { bytes, is_paused, _clients: clients }
    }

    /// Sets the size of the messages.
    pub fn set_bytes(&self, bytes: usize) {
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    pub fn pause(&self, is_paused: bool) {
        self.is_paused.store(is_paused, Ordering::Relaxed);
    }
}

/// Sends whether or not earlier messages are acknowledged, as people do.
async fn talk(node: SocketAddr, user: String, bytes: Arc<AtomicUsize>, is_paused: Arc<AtomicBool>) {
    let mut every = interval(Duration::from_millis(100));
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut number = 0;
    loop {
        every.tick().await;
        let Some(mut connection) = join_rooms(node, &user).await else { continue };
        loop {
            tokio::select! {
                _ = every.tick() => {}
                received = connection.next() => match received {
                    Ok(_) => continue,
                    Err(_) => break,
                },
            }
            if is_paused.load(Ordering::Relaxed) {
                continue;
            }
            number += 1;
            let content = "x".repeat(bytes.load(Ordering::Relaxed));
            let room = format!("talk{}", number % ROOMS);
            let frame = json!({"type": "message", "room": room, "content": content});
            // A frozen node reads nothing.
            if !timeout(REQUEST_MAX, connection.send_json(&frame))
                .await
                .is_ok_and(|sent| sent.is_ok())
            {
                break;
            }
        }
    }
}

async fn join_rooms(node: SocketAddr, user: &str) -> Option<ClientConnection> {
    let connecting = async {
        let options = ConnectOptions::new(format!("ws://{node}/ws")).user(user);
        let mut connection = ClientConnection::open(&options).await.ok()?;
        connection.expect_connected().await.ok()?;
        for number in 0..ROOMS {
            connection.join(&format!("talk{number}").parse().unwrap()).await.ok()?;
        }
        Some(connection)
    };
    timeout(REQUEST_MAX, connecting).await.ok().flatten()
}

/// Connections that do nothing.
pub async fn idle(node: SocketAddr, count: usize) -> Vec<ClientConnection> {
    let mut connections = vec![];
    for number in 0..count {
        connections.push(crate::harness::connect(node, &format!("idle{number}")).await);
    }
    connections
}

/// Clients that join a room and read nothing, with small buffers.
pub async fn non_readers(node: SocketAddr, room: &str, count: usize) -> Vec<TcpStream> {
    let mut sockets = vec![];
    for number in 0..count {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut socket = within(socket.connect(node)).await.unwrap();
        let mut bytes = handshake(&format!("asleep{number}")).into_bytes();
        bytes.extend(join_frame(room));
        socket.write_all(&bytes).await.unwrap();
        sockets.push(socket);
    }
    sockets
}

/// Sends this frame `per_second` times a second and discards the answers, for ever.
pub async fn repeat(mut connection: ClientConnection, frame: Value, per_second: u32) {
    let mut every = interval(Duration::from_secs(1) / per_second);
    loop {
        tokio::select! {
            _ = every.tick() => {
                if connection.send_json(&frame).await.is_err() {
                    return;
                }
            }
            received = connection.next() => if received.is_err() { return },
        }
    }
}
