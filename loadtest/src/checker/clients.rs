//! Clients that talk while something goes wrong, each watched by the ledger.

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
    timeline::Timeline,
};

/// All clients of one room. They end with it.
#[derive(Debug)]
pub struct TestClients {
    /// What they have seen.
    pub checker: Arc<Mutex<DeliveryChecker>>,
    controls: Vec<watch::Sender<ClientControl>>,
    begun: Vec<Arc<watch::Sender<(usize, bool)>>>,
    tasks: JoinSet<()>,
}

/// How long a client may take to send a message at the end, through the longest outage there is.
const END_MAX: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What was waited for did not happen.
#[derive(Debug, thiserror::Error)]
#[error("{what}: not within a minute: {report}")]
pub struct WaitTimeout {
    /// What was waited for.
    pub what: &'static str,
    /// The counts so far.
    pub report: Box<DeliveryReport>,
}

/// Two clients for each address, that go on to the other addresses.
pub fn default_profiles(addresses: &[SocketAddr]) -> Vec<ClientProfile> {
    let profile = |i: usize| {
        let nth = |j: usize| format!("ws://{}/ws", addresses[(i + j) % addresses.len()]);
        ClientProfile {
            urls: (0..addresses.len()).map(nth).collect(),
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
    /// Starts the clients. None of them speaks yet.
    pub fn spawn(profiles: Vec<ClientProfile>, timeline: Arc<Mutex<Timeline>>) -> Self {
        let checker =
            Arc::new(Mutex::new(DeliveryChecker::with_timeline(timeline, profiles.len())));
        let mut clients = Self { checker, controls: vec![], begun: vec![], tasks: JoinSet::new() };
        for (number, profile) in profiles.into_iter().enumerate() {
            let (control, control_rx) =
                watch::channel(ClientControl { connected: true, messages_max: 0 });
            let begun = Arc::new(watch::Sender::new((0, false)));
            let client =
                TestClient::new(number, profile, &clients.checker, control_rx, begun.clone());
            clients.tasks.spawn(client.run());
            clients.controls.push(control);
            clients.begun.push(begun);
        }
        clients
    }

    /// How many have not been in the room yet.
    pub fn not_joined(&self) -> usize {
        let checker = self.checker.lock();
        (0..self.controls.len()).filter(|client| checker.cursor(*client).is_none()).count()
    }

    /// Has everybody speak from here on.
    pub fn start_sending(&self) {
        for control in &self.controls {
            control.send_modify(|control| control.messages_max = usize::MAX);
        }
    }

    /// Starts the clients, and has them speak when all are in the room.
    ///
    /// # Errors
    ///
    /// [`Stuck`]
    pub async fn with_profiles(profiles: Vec<ClientProfile>) -> Result<Self, WaitTimeout> {
        let clients = Self::spawn(profiles, Arc::default());
        clients.wait_until("everybody is in the room", |clients| clients.not_joined() == 0).await?;
        clients.start_sending();
        Ok(clients)
    }

    /// The usual clients at these addresses.
    ///
    /// # Errors
    ///
    /// [`Stuck`]
    pub async fn connect(addresses: &[SocketAddr]) -> Result<Self, WaitTimeout> {
        Self::with_profiles(default_profiles(addresses)).await
    }

    /// Waits for something of the clients.
    ///
    /// # Errors
    ///
    /// [`Stuck`] after a minute.
    pub async fn wait_until(
        &self,
        what: &'static str,
        holds: impl Fn(&Self) -> bool,
    ) -> Result<(), WaitTimeout> {
        let deadline = Instant::now() + END_MAX;
        while !holds(self) {
            if Instant::now() > deadline {
                let report = Box::new(self.checker.lock().report());
                return Err(WaitTimeout { what, report });
            }
            sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    /// Waits until so many more messages have been acknowledged.
    ///
    /// # Errors
    ///
    /// [`Stuck`]
    pub async fn wait_for_acks(&self, messages: usize) -> Result<(), WaitTimeout> {
        let before = self.checker.lock().acked();
        let enough = |clients: &Self| clients.checker.lock().acked() >= before + messages;
        self.wait_until("messages are acknowledged", enough).await
    }

    /// Lets the clients send for a while: the time is the load, not a wait for something.
    pub async fn run_for(&self, time: Duration) {
        sleep(time).await;
    }

    /// A client closes its connection and stays away.
    pub fn disconnect(&self, client: usize) {
        self.controls[client].send_modify(|control| control.connected = false);
    }

    /// It comes back.
    pub fn reconnect(&self, client: usize) {
        self.controls[client].send_modify(|control| control.connected = true);
    }

    /// Nobody begins another message from here on.
    pub fn stop_sending(&self) {
        for (control, begun) in self.controls.iter().zip(&self.begun) {
            control.send_modify(|control| control.messages_max = begun.borrow().0);
        }
    }

    /// Everybody ends what was begun; then one last message shows that all are at the end of the
    /// log, whose numbers ascend, so that nothing before it is still to come.
    ///
    /// # Errors
    ///
    /// [`Stuck`]
    pub async fn finish(self) -> Result<DeliveryReport, WaitTimeout> {
        self.stop_sending();
        // Who had looked at its orders before begins one more.
        sleep(LOOK_AGAIN).await;
        self.wait_until("what was begun is acknowledged", Self::is_idle).await?;
        let speaker = 0;
        let last = self.begun[speaker].borrow().0 + 1;
        self.controls[speaker].send_modify(|control| control.messages_max = last);
        let said = |clients: &Self| clients.begun[speaker].borrow().0 >= last && clients.is_idle();
        self.wait_until("the last message is acknowledged", said).await?;
        let count = self.controls.len();
        self.wait_until("everybody has the last message", |clients| {
            let checker = clients.checker.lock();
            let top = checker.last_acked(speaker);
            (0..count).all(|client| top.is_some_and(|id| checker.position_of(client, id).is_some()))
        })
        .await?;
        Ok(self.checker.lock().report())
    }

    fn is_idle(&self) -> bool {
        self.begun.iter().all(|begun| !begun.borrow().1)
    }
}
