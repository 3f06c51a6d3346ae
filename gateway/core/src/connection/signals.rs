//! Requests of the hub and the session to the task of a connection.

use skein_protocol::ids::{RoomId, UserId};
use smallvec::SmallVec;

/// A request to the task of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Request catch-up in this room. The only signal that waits: until half of the outbox is free.
    CatchUp(RoomId),
    /// Watch this user, with whom the connection exchanges directs.
    Watch(UserId),
    /// The connection was evicted from this room. The signal is sent before the client learns of
    /// the eviction, and taken by itself, before a frame that the client sends afterwards is handled
    /// and when no request is in progress.
    Evicted(RoomId),
    /// The reply to a publish is queued; the copy, if there is one, is on its way.
    PublishAnswered,
}

/// The signals that a connection's task has not taken, each at most once. The usual one needs no
/// allocation.
#[derive(Debug, Default)]
pub(super) struct SignalQueue(SmallVec<[Signal; 1]>);

impl Signal {
    fn waits_for_space(&self) -> bool {
        matches!(self, Self::CatchUp(_))
    }
}

impl SignalQueue {
    pub(super) fn push(&mut self, signal: Signal) {
        if !self.0.contains(&signal) {
            self.0.push(signal);
        }
    }

    pub(super) fn cancel(&mut self, signal: &Signal) {
        self.0.retain(|queued| queued != signal);
    }

    /// Whether a room waits for catch-up.
    pub(super) fn is_lagging(&self) -> bool {
        self.0.iter().any(Signal::waits_for_space)
    }

    /// Takes the signals without evictions, and without those that wait for space unless the outbox
    /// has it.
    pub(super) fn take(&mut self, has_space: bool) -> SmallVec<[Signal; 1]> {
        self.take_if(|signal| match signal {
            Signal::Evicted(_) => false,
            other => has_space || !other.waits_for_space(),
        })
    }

    /// Takes the evictions.
    pub(super) fn take_evictions(&mut self) -> SmallVec<[Signal; 1]> {
        self.take_if(|signal| matches!(signal, Signal::Evicted(_)))
    }

    fn take_if(&mut self, is_taken: impl Fn(&Signal) -> bool) -> SmallVec<[Signal; 1]> {
        if !self.0.iter().any(&is_taken) {
            return SmallVec::new();
        }
        let (taken, kept) = std::mem::take(&mut self.0).into_iter().partition(is_taken);
        self.0 = kept;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_catch_up_waits_for_space() {
        let (room, user): (RoomId, UserId) = ("r".parse().unwrap(), "u".parse().unwrap());
        let all = [
            Signal::PublishAnswered,
            Signal::CatchUp(room.clone()),
            Signal::Watch(user),
            Signal::Evicted(room),
        ];
        let mut queue = SignalQueue::default();
        for signal in all.iter().chain(&all) {
            queue.push(signal.clone());
        }
        let without_space = queue.take(false);
        assert_eq!(without_space[..], [all[0].clone(), all[2].clone()]);
        assert_eq!(queue.take_evictions()[..], [all[3].clone()]);
        assert!(queue.take_evictions().is_empty());
        assert!(queue.is_lagging() && queue.take(false).is_empty());
        queue.push(Signal::PublishAnswered);
        queue.push(all[2].clone());
        queue.cancel(&all[2]);
        assert_eq!(queue.take(true)[..], [all[1].clone(), all[0].clone()]);
        assert!(!queue.is_lagging() && queue.take(true).is_empty());
    }

    #[test]
    fn a_queue_holds_one_signal_in_place() {
        let mut queue = SignalQueue::default();
        for _ in 0..3 {
            queue.push(Signal::PublishAnswered);
            assert!(!queue.0.spilled() && queue.take(true).len() == 1);
        }
        assert!(size_of::<SignalQueue>() <= 48);
    }
}
