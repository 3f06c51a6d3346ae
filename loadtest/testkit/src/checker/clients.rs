//! Test clients of one room that send while faults are injected, with the checker that observes
//! them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    DeliveryChecker,
    client::{ClientControl, ClientProfile, SendSchedule, TestClient},
    report::DeliveryReport,
};
use crate::timeline::Timeline;

/// All clients of one room. They end when this is dropped.
#[derive(Debug)]
pub struct TestClients {
    /// The checker that observes them.
    pub checker: Arc<Mutex<DeliveryChecker>>,
    controls: Vec<watch::Sender<ClientControl>>,
    progress: Vec<Arc<watch::Sender<(usize, bool)>>>,
    tasks: JoinSet<()>,
}

/// Time limit for a message at the end, longer than the longest outage.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A condition did not become true in time.
#[derive(Debug, thiserror::Error)]
#[error("not within a minute: {what}; {report}")]
pub struct WaitTimeout {
    /// The condition.
    pub what: &'static str,
    /// Counts so far.
    pub report: Box<DeliveryReport>,
}

/// Profiles of two clients for each address, which reconnect to the other addresses.
pub fn default_profiles(addresses: &[SocketAddr]) -> Vec<ClientProfile> {
    let profile = |i: usize| {
        let nth = |j: usize| format!("ws://{}/ws", addresses[(i + j) % addresses.len()]);
        ClientProfile {
            urls: (0..addresses.len()).map(nth).collect(),
            tls: None,
            user: format!("u{i}"),
            room: "lobby".parse().expect("a name"),
            schedule: SendSchedule::AfterAck(Duration::from_millis(20)),
            bytes: 16,
            idle_timeout: Duration::from_secs(2),
            ping_every: Duration::from_millis(500),
        }
    };
    (0..addresses.len() * 2).map(profile).collect()
}

impl TestClients {
    /// Starts the clients. They do not send yet.
    pub fn spawn(profiles: Vec<ClientProfile>, timeline: Arc<Mutex<Timeline>>) -> Self {
        let checker =
            Arc::new(Mutex::new(DeliveryChecker::with_timeline(timeline, profiles.len())));
        let mut clients =
            Self { checker, controls: vec![], progress: vec![], tasks: JoinSet::new() };
        for (number, profile) in profiles.into_iter().enumerate() {
            let (control, control_rx) =
                watch::channel(ClientControl { connected: true, messages_max: 0 });
            let progress = Arc::new(watch::Sender::new((0, false)));
            let client =
                TestClient::new(number, profile, &clients.checker, control_rx, progress.clone());
            clients.tasks.spawn(client.run());
            clients.controls.push(control);
            clients.progress.push(progress);
        }
        clients
    }

    /// Number of clients that have never joined the room.
    pub fn not_joined(&self) -> usize {
        let checker = self.checker.lock();
        (0..self.controls.len()).filter(|client| checker.cursor(*client).is_none()).count()
    }

    /// Allows all clients to send.
    pub fn start_sending(&self) {
        for control in &self.controls {
            control.send_modify(|control| control.messages_max = usize::MAX);
        }
    }

    /// Starts the clients, and allows them to send when all have joined.
    ///
    /// # Errors
    ///
    /// [`WaitTimeout`]
    pub async fn with_profiles(profiles: Vec<ClientProfile>) -> Result<Self, WaitTimeout> {
        let clients = Self::spawn(profiles, Arc::default());
        clients.wait_until("all clients have joined", |clients| clients.not_joined() == 0).await?;
        clients.start_sending();
        Ok(clients)
    }

    /// Starts the default clients at these addresses.
    ///
    /// # Errors
    ///
    /// [`WaitTimeout`]
    pub async fn connect(addresses: &[SocketAddr]) -> Result<Self, WaitTimeout> {
        Self::with_profiles(default_profiles(addresses)).await
    }

    /// Waits for a condition.
    ///
    /// # Errors
    ///
    /// [`WaitTimeout`] after a minute.
    pub async fn wait_until(
        &self,
        what: &'static str,
        holds: impl Fn(&Self) -> bool,
    ) -> Result<(), WaitTimeout> {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        while !holds(self) {
            if Instant::now() > deadline {
                let report = Box::new(self.checker.lock().report());
                return Err(WaitTimeout { what, report });
            }
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Waits until `messages` more messages have been acknowledged.
    ///
    /// # Errors
    ///
    /// [`WaitTimeout`]
    pub async fn wait_for_acks(&self, messages: usize) -> Result<(), WaitTimeout> {
        let before = self.checker.lock().acked();
        let enough = |clients: &Self| clients.checker.lock().acked() >= before + messages;
        self.wait_until("messages are acknowledged", enough).await
    }

    /// Lets the clients send for a while: the time is the load, not a wait for a condition.
    pub async fn run_for(&self, time: Duration) {
        sleep(time).await;
    }

    /// Closes the connection of a client and keeps it disconnected.
    pub fn disconnect(&self, client: usize) {
        self.controls[client].send_modify(|control| control.connected = false);
    }

    /// Lets a client connect again.
    pub fn reconnect(&self, client: usize) {
        self.controls[client].send_modify(|control| control.connected = true);
    }

    /// Stops all clients from beginning another message.
    pub fn stop_sending(&self) {
        for (control, progress) in self.controls.iter().zip(&self.progress) {
            control.send_modify(|control| control.messages_max = progress.borrow().0);
        }
    }

    /// Completes all messages, then sends one last message. When every client has received it,
    /// every client is at the end of the log, because numbers ascend: nothing before it is still to
    /// come.
    ///
    /// # Errors
    ///
    /// [`WaitTimeout`]
    pub async fn finish(self) -> Result<DeliveryReport, WaitTimeout> {
        self.stop_sending();
        // A client that had read its control before may begin one more message.
        sleep(POLL_INTERVAL).await;
        self.wait_until("all messages are acknowledged", Self::is_idle).await?;
        let sender = 0;
        let last = self.progress[sender].borrow().0 + 1;
        self.controls[sender].send_modify(|control| control.messages_max = last);
        let is_sent =
            |clients: &Self| clients.progress[sender].borrow().0 >= last && clients.is_idle();
        self.wait_until("the last message is acknowledged", is_sent).await?;
        let count = self.controls.len();
        self.wait_until("all clients have the last message", |clients| {
            let checker = clients.checker.lock();
            let top = checker.last_acked(sender);
            (0..count).all(|client| top.is_some_and(|id| checker.position_of(client, id).is_some()))
        })
        .await?;
        Ok(self.checker.lock().report())
    }

    fn is_idle(&self) -> bool {
        self.progress.iter().all(|progress| !progress.borrow().1)
    }
}
