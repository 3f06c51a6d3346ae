//! Control commands of a single node, to itself. The reference for [`ControlQueue`].

use std::time::{SystemTime, UNIX_EPOCH};

use super::{MemoryBus, ready};
use crate::bus::{
    BoxFuture, BusError,
    commands::{
        CommandBatch, CommandId, CommandProgress, ControlCommand, ControlQueue, QueuedCommand,
    },
    sessions::UnixMicros,
};

/// The most queries whose replies are kept.
const REPLIES_MAX: usize = 64;

impl ControlQueue for MemoryBus {
    fn enqueue(&self, command: ControlCommand) -> BoxFuture<Result<CommandId, BusError>> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let log = &mut *self.commands.lock();
        log.last += 1;
        let id = CommandId(0, log.last);
        let at = since_1970.as_micros() as UnixMicros;
        log.waiting.push_back(QueuedCommand { id, at, is_fresh: true, command });
        self.command_enqueued.notify_one();
        ready(Ok(id))
    }

    fn poll(&self) -> BoxFuture<CommandBatch> {
        let bus = self.clone();
        Box::pin(async move {
            loop {
                let commands: Vec<QueuedCommand> = bus.commands.lock().waiting.drain(..).collect();
                if !commands.is_empty() {
                    return CommandBatch { commands, missed: false };
                }
                bus.command_enqueued.notified().await;
            }
        })
    }

    fn mark_applied(&self, id: CommandId) -> BoxFuture<Result<(), BusError>> {
        self.commands.lock().applied = id;
        ready(Ok(()))
    }

    fn reply(&self, id: CommandId, reply: String) -> BoxFuture<Result<(), BusError>> {
        let replies = &mut self.commands.lock().replies;
        if replies.len() >= REPLIES_MAX {
            replies.clear();
        }
        replies.insert(id, reply);
        ready(Ok(()))
    }

    fn progress(&self, id: CommandId) -> BoxFuture<Result<CommandProgress, BusError>> {
        let applied = usize::from(self.commands.lock().applied >= id);
        ready(Ok(CommandProgress { applied, nodes: 1 }))
    }

    fn replies(&self, id: CommandId) -> BoxFuture<Result<Vec<String>, BusError>> {
        ready(Ok(self.commands.lock().replies.remove(&id).into_iter().collect()))
    }
}
