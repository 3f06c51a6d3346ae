//! Orders to a single node: to itself.

use std::{
    collections::{HashMap, VecDeque},
    time::{SystemTime, UNIX_EPOCH},
};

use super::MemoryBus;
use crate::bus::{
    BoxFuture, BusError,
    commands::{
        CommandBatch, CommandId, CommandProgress, ControlCommand, ControlQueue, QueuedCommand,
    },
    sessions::UnixMicros,
};

/// How many questions it is known what was answered to.
const REPLIES_MAX: usize = 64;

#[derive(Default)]
pub(super) struct CommandLog {
    last: u64,
    waiting: VecDeque<QueuedCommand>,
    applied: CommandId,
    answers: HashMap<CommandId, String>,
}

fn ready<T: Send + 'static>(value: T) -> BoxFuture<T> {
    Box::pin(std::future::ready(value))
}

impl ControlQueue for MemoryBus {
    fn enqueue(&self, order: ControlCommand) -> BoxFuture<Result<CommandId, BusError>> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let book = &mut *self.commands.lock();
        book.last += 1;
        let id = CommandId(0, book.last);
        let at = since_1970.as_micros() as UnixMicros;
        book.waiting.push_back(QueuedCommand { id, at, is_fresh: true, command: order });
        self.command_enqueued.notify_one();
        ready(Ok(id))
    }

    fn poll(&self) -> BoxFuture<CommandBatch> {
        let bus = self.clone();
        Box::pin(async move {
            loop {
                let orders: Vec<QueuedCommand> = bus.commands.lock().waiting.drain(..).collect();
                if !orders.is_empty() {
                    return CommandBatch { commands: orders, missed: false };
                }
                bus.command_enqueued.notified().await;
            }
        })
    }

    fn mark_applied(&self, id: CommandId) -> BoxFuture<Result<(), BusError>> {
        self.commands.lock().applied = id;
        ready(Ok(()))
    }

    fn reply(&self, id: CommandId, answer: String) -> BoxFuture<Result<(), BusError>> {
        let answers = &mut self.commands.lock().answers;
        if answers.len() >= REPLIES_MAX {
            answers.clear();
        }
        answers.insert(id, answer);
        ready(Ok(()))
    }

    fn progress(&self, id: CommandId) -> BoxFuture<Result<CommandProgress, BusError>> {
        let applied = usize::from(self.commands.lock().applied >= id);
        ready(Ok(CommandProgress { applied, nodes: 1 }))
    }

    fn replies(&self, id: CommandId) -> BoxFuture<Result<Vec<String>, BusError>> {
        ready(Ok(self.commands.lock().answers.remove(&id).into_iter().collect()))
    }
}
