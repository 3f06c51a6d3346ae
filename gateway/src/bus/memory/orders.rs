//! Orders to a single node: to itself.

use std::{
    collections::{HashMap, VecDeque},
    time::{SystemTime, UNIX_EPOCH},
};

use super::MemoryBus;
use crate::bus::{
    BoxFuture, BusError,
    orders::{Given, Order, OrderId, Orders, Outcome, Taken},
    sessions::Micros,
};

/// How many questions it is known what was answered to.
const ANSWERS_MAX: usize = 64;

#[derive(Default)]
pub(super) struct Book {
    last: u64,
    waiting: VecDeque<Given>,
    applied: OrderId,
    answers: HashMap<OrderId, String>,
}

fn ready<T: Send + 'static>(value: T) -> BoxFuture<T> {
    Box::pin(std::future::ready(value))
}

impl Orders for MemoryBus {
    fn give(&self, order: Order) -> BoxFuture<Result<OrderId, BusError>> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let book = &mut *self.book.lock();
        book.last += 1;
        let id = OrderId(0, book.last);
        let at = since_1970.as_micros() as Micros;
        book.waiting.push_back(Given { id, at, is_fresh: true, order });
        self.ordered.notify_one();
        ready(Ok(id))
    }

    fn take(&self) -> BoxFuture<Taken> {
        let bus = self.clone();
        Box::pin(async move {
            loop {
                let orders: Vec<Given> = bus.book.lock().waiting.drain(..).collect();
                if !orders.is_empty() {
                    return Taken { orders, missed: false };
                }
                bus.ordered.notified().await;
            }
        })
    }

    fn applied(&self, id: OrderId) -> BoxFuture<Result<(), BusError>> {
        self.book.lock().applied = id;
        ready(Ok(()))
    }

    fn answer(&self, id: OrderId, answer: String) -> BoxFuture<Result<(), BusError>> {
        let answers = &mut self.book.lock().answers;
        if answers.len() >= ANSWERS_MAX {
            answers.clear();
        }
        answers.insert(id, answer);
        ready(Ok(()))
    }

    fn outcome(&self, id: OrderId) -> BoxFuture<Result<Outcome, BusError>> {
        let applied = usize::from(self.book.lock().applied >= id);
        ready(Ok(Outcome { applied, nodes: 1 }))
    }

    fn answers(&self, id: OrderId) -> BoxFuture<Result<Vec<String>, BusError>> {
        ready(Ok(self.book.lock().answers.remove(&id).into_iter().collect()))
    }
}
