//! Clients that talk while something goes wrong, each watched by the book.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use super::{
    book::Book,
    client::{Client, Manner, Orders},
    report::Report,
};
use crate::harness::poll_pause;

/// All clients of a trial.
pub struct Party {
    pub book: Arc<Mutex<Book>>,
    orders: Vec<watch::Sender<Orders>>,
    begun: Vec<Arc<watch::Sender<(usize, bool)>>>,
    tasks: Vec<JoinHandle<()>>,
}

/// How long a client may take to send a message at the end, through the longest outage there is.
const END_MAX: Duration = Duration::from_secs(60);

/// Two clients for each address, that go on to the other addresses.
pub fn manners(addresses: &[SocketAddr]) -> Vec<Manner> {
    let manner = |i: usize| {
        let nth = |j: usize| format!("ws://{}/ws", addresses[(i + j) % addresses.len()]);
        Manner {
            urls: (0..addresses.len()).map(nth).collect(),
            pace: Duration::from_millis(20),
            bytes: 16,
            patience: Duration::from_secs(2),
        }
    };
    (0..addresses.len() * 2).map(manner).collect()
}

impl Party {
    /// Starts the clients. Nobody speaks before all are in the room.
    pub async fn start(manners: Vec<Manner>) -> Self {
        let book = Arc::new(Mutex::new(Book::new(manners.len())));
        let mut party = Self { book, orders: vec![], begun: vec![], tasks: vec![] };
        for (number, manner) in manners.into_iter().enumerate() {
            let (orders, orders_seen) = watch::channel(Orders { present: true, messages_max: 0 });
            let begun = Arc::new(watch::Sender::new((0, false)));
            let client = Client::new(number, manner, &party.book, orders_seen, begun.clone());
            party.tasks.push(tokio::spawn(client.run()));
            party.orders.push(orders);
            party.begun.push(begun);
        }
        let clients = party.orders.len();
        party
            .wait("everybody is in the room", |book| {
                (0..clients).all(|client| book.cursor(client).is_some())
            })
            .await;
        for orders in &party.orders {
            orders.send_modify(|orders| orders.messages_max = usize::MAX);
        }
        party
    }

    /// The usual clients at these addresses.
    pub async fn at(addresses: &[SocketAddr]) -> Self {
        Self::start(manners(addresses)).await
    }

    /// Waits for something in the book.
    pub async fn wait(&self, what: &str, holds: impl Fn(&Book) -> bool) {
        let deadline = Instant::now() + END_MAX;
        while !holds(&self.book.lock()) {
            if Instant::now() > deadline {
                let report = self.book.lock().report();
                panic!("{what}: not within {END_MAX:?}: {report}\n{}", report.examples.join("\n"));
            }
            poll_pause().await;
        }
    }

    /// Waits until so many more messages have been acknowledged.
    pub async fn goes_on(&self, messages: usize) {
        let before = self.book.lock().acked();
        self.wait("messages are acknowledged", |book| book.acked() >= before + messages).await;
    }

    /// Lets the party talk for a while: the time is the load, not a wait for something.
    pub async fn talks_for(&self, time: Duration) {
        sleep_until(Instant::now() + time).await;
    }

    /// A client closes its connection and stays away.
    pub fn send_away(&self, client: usize) {
        self.orders[client].send_modify(|orders| orders.present = false);
    }

    /// It comes back.
    pub fn call_back(&self, client: usize) {
        self.orders[client].send_modify(|orders| orders.present = true);
    }

    /// Nobody begins another message from here on.
    pub fn hush(&self) {
        for (orders, begun) in self.orders.iter().zip(&self.begun) {
            orders.send_modify(|orders| orders.messages_max = begun.borrow().0);
        }
    }

    /// Everybody ends what was begun; then one last message shows that all are at the end of the
    /// log, whose numbers ascend, so that nothing before it is still to come.
    pub async fn finish(self) -> Report {
        self.hush();
        // Who had looked at its orders before begins one more.
        poll_pause().await;
        self.wait("what was begun is acknowledged", |_| self.is_idle()).await;
        let speaker = 0;
        let last = self.begun[speaker].borrow().0 + 1;
        self.orders[speaker].send_modify(|orders| orders.messages_max = last);
        self.wait("the last message is acknowledged", |_| {
            self.begun[speaker].borrow().0 >= last && self.is_idle()
        })
        .await;
        let clients = self.orders.len();
        self.wait("everybody has the last message", |book| {
            let top = book.newest(speaker);
            (0..clients).all(|client| top.is_some_and(|id| book.seen(client, id).is_some()))
        })
        .await;
        for task in &self.tasks {
            task.abort();
        }
        self.book.lock().report()
    }

    fn is_idle(&self) -> bool {
        self.begun.iter().all(|begun| !begun.borrow().1)
    }
}
