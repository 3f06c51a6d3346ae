//! Faults that tests inject, so that the simulation and `loadtest` can show that they find them.
//!
//! A release build has none of this: the module and each of its uses exist only with
//! `debug_assertions`, which the profiles `dev` and `sim` have and `release` has not.
//!
//! A [`ProtocolFault`] is injected into the current thread, for the simulation. A
//! [`DeliveryFault`], or [`PANIC`], is injected into a process by the environment variable
//! [`VARIABLE`], for `loadtest`.

use std::{
    cell::Cell,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use skein_protocol::ids::ConnectionId;

/// A rule of the agreement between nodes, or of the order in a room, that is not applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolFault {
    /// Scripts do not compare the server with the one that the nodes have agreed on, and nodes
    /// do not wait for the agreement.
    NoFence,
    /// A server opens as soon as one node has checked in.
    NoBarrier,
    /// Publishers keep none of their acknowledged, unconfirmed messages.
    UnconfirmedNotKept,
    /// The sequence number of an acknowledged message that no node received goes to the next one.
    SequencesReused,
    /// A publish counts as confirmed when another entry with its sequence number arrives.
    ConfirmedBySequence,
    /// Rooms keep their epoch although a node did not check in.
    NoEpochChange,
    /// A read of a log counts as complete although it skips entries.
    NoContiguityCheck,
    /// A process that holds no entries counts as one that remembers.
    FreshNodeTrusted,
    /// Entries that a log has lost are not appended again.
    LostEntriesNotReappended,
    /// A gap in a room is ignored.
    GapIgnored,
    /// An entry that arrives during a read is delivered although the read had it.
    ReadEntriesRepeated,
}

impl ProtocolFault {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::NoFence,
        Self::NoBarrier,
        Self::UnconfirmedNotKept,
        Self::SequencesReused,
        Self::ConfirmedBySequence,
        Self::NoEpochChange,
        Self::NoContiguityCheck,
        Self::FreshNodeTrusted,
        Self::LostEntriesNotReappended,
        Self::GapIgnored,
        Self::ReadEntriesRepeated,
    ];
}

thread_local! {
    static INJECTED: Cell<Option<ProtocolFault>> = const { Cell::new(None) };
}

/// Injects a fault into everything that runs on this thread from now on; `None` removes it.
pub fn inject(fault: Option<ProtocolFault>) {
    INJECTED.set(fault);
}

/// Whether `fault` is injected into this thread.
pub fn is_injected(fault: ProtocolFault) -> bool {
    INJECTED.get() == Some(fault)
}

/// Whether any fault is injected into this thread, so that what it breaks must not be asserted.
pub fn is_any_injected() -> bool {
    INJECTED.get().is_some()
}

/// Returns a Redis script with the injected fault, where that fault is one of scripts.
///
/// # Panics
///
/// The fault replaces a line that the script no longer has.
pub fn script(text: String) -> String {
    let replaced = |text: String, from: &str, to: &str| {
        assert!(text.contains(from), "no script has `{from}`");
        text.replace(from, to)
    };
    match INJECTED.get() {
        Some(ProtocolFault::NoFence) => {
            let text =
                replaced(text, "if is_good and meta[3] == server_id then", "if is_good then");
            let fixed =
                "generation, last_incomplete = generation or 0, last_incomplete or 0 if false then";
            replaced(text, "if not generation then", fixed)
        }
        Some(ProtocolFault::NoEpochChange) => {
            replaced(text, "if not (is_complete and is_restored) then", "if false then")
        }
        _ => text,
    }
}

/// The environment variable that names the fault of a process.
pub const VARIABLE: &str = "SKEIN_INJECT";

/// The name of the fault that is injected into this process, if any.
pub fn of_process() -> Option<&'static str> {
    static NAME: OnceLock<Option<String>> = OnceLock::new();
    NAME.get_or_init(|| std::env::var(VARIABLE).ok()).as_deref()
}

/// A wrong delivery, or a leak, of a whole process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryFault {
    /// One delivery of 10,000 is dropped.
    Drop,
    /// One of 1,000 is made twice.
    Duplicate,
    /// One of 1,000 is made after the next one on the same connection.
    Swap,
    /// One of 1,000, and all behind it, is delayed by 200 ms.
    Stall,
    /// 100 bytes of each connection are never freed.
    Leak,
}

impl DeliveryFault {
    /// All of them, with their names in [`VARIABLE`].
    pub const ALL: [(&str, Self); 5] = [
        ("drop", Self::Drop),
        ("duplicate", Self::Duplicate),
        ("swap", Self::Swap),
        ("stall", Self::Stall),
        ("leak", Self::Leak),
    ];

    fn injected() -> Option<Self> {
        static INJECTED: OnceLock<Option<DeliveryFault>> = OnceLock::new();
        *INJECTED.get_or_init(|| {
            let name = of_process().filter(|name| *name != PANIC)?;
            let known = Self::ALL.into_iter().find(|(known, _)| *known == name);
            Some(known.unwrap_or_else(|| panic!("{VARIABLE}: there is no fault `{name}`")).1)
        })
    }
}

/// The name of panics at places that messages name.
pub const PANIC: &str = "panic";

/// Panics where [`PANIC`] is injected and `text` contains `panic in <place>`.
pub fn panic_in(place: &str, text: &[u8]) {
    static IS_INJECTED: OnceLock<bool> = OnceLock::new();
    let is_injected = *IS_INJECTED.get_or_init(|| of_process() == Some(PANIC));
    if is_injected && String::from_utf8_lossy(text).contains(&format!("panic in {place}")) {
        panic!("injected in {place}");
    }
}

/// The frames that the injected fault delivers in place of `frame`. `None`: `frame` itself.
pub fn deliver(connection: ConnectionId, frame: &Bytes) -> Option<Vec<Bytes>> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static HELD: Mutex<Option<(ConnectionId, Bytes)>> = Mutex::new(None);
    let every = |many: u64| COUNT.fetch_add(1, Ordering::Relaxed) % many == many - 1;
    match DeliveryFault::injected()? {
        DeliveryFault::Drop => every(10_000).then(Vec::new),
        DeliveryFault::Duplicate => every(1_000).then(|| vec![frame.clone(); 2]),
        DeliveryFault::Swap => {
            let mut held = HELD.lock();
            match held.take() {
                Some((of, earlier)) if of == connection => Some(vec![frame.clone(), earlier]),
                Some(other) => {
                    *held = Some(other);
                    None
                }
                None if every(1_000) => {
                    *held = Some((connection, frame.clone()));
                    Some(Vec::new())
                }
                None => None,
            }
        }
        DeliveryFault::Stall => {
            if every(1_000) {
                #[expect(clippy::disallowed_methods, reason = "the delay is the fault")]
                std::thread::sleep(Duration::from_millis(200));
            }
            None
        }
        DeliveryFault::Leak => None,
    }
}

/// Applies the injected fault to a new connection.
pub fn on_connect() {
    if DeliveryFault::injected() == Some(DeliveryFault::Leak) {
        std::mem::forget(vec![1_u8; 100]);
    }
}
