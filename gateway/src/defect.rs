//! Defects to be planted, so that what looks for defects can show that it finds them. No release has
//! this module: it is behind the feature `defects`.
//!
//! A [`Defect`] is planted in a thread, for the simulation; a [`Misdelivery`] in a process, by the
//! variable `SKEIN_DEFECT`, for `loadtest`.

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
use shared::ids::ConnectionId;

/// A part of the agreement between nodes, or of the order in a room, that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// Scripts do not ask under which server a room was declared whole, and nodes do not wait.
    NoFence,
    /// A server opens as soon as one node has checked in.
    NoBarrier,
    /// Publishers keep nothing of what was acknowledged.
    NoTail,
    /// A number that was acknowledged and reached nobody goes to whoever comes first.
    NumbersTaken,
    /// A publish counts as come by when another entry with its number does.
    TailBySeq,
    /// Rooms go on in their epoch although somebody was not heard.
    NoBump,
    /// What was read of a log counts as whole whatever it skips.
    NoContiguity,
    /// A process that holds nothing counts as one that remembers.
    FreshTrusted,
    /// What a log has lost is not appended anew.
    OrphanDropped,
    /// A gap is passed over.
    SkipRepair,
    /// What arrived during a read is passed on although the read had it.
    DoubleInjection,
}

impl Defect {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::NoFence,
        Self::NoBarrier,
        Self::NoTail,
        Self::NumbersTaken,
        Self::TailBySeq,
        Self::NoBump,
        Self::NoContiguity,
        Self::FreshTrusted,
        Self::OrphanDropped,
        Self::SkipRepair,
        Self::DoubleInjection,
    ];
}

thread_local! {
    static PLANTED: Cell<Option<Defect>> = const { Cell::new(None) };
}

/// Plants a defect in all that runs on this thread from here on, or takes it out.
pub fn plant(defect: Option<Defect>) {
    PLANTED.set(defect);
}

/// Whether `defect` is planted on this thread.
pub fn planted(defect: Defect) -> bool {
    PLANTED.get() == Some(defect)
}

/// A script with the defects that are in scripts.
pub fn script(text: String) -> String {
    let replaced = |text: String, from: &str, to: &str| {
        assert!(text.contains(from), "no script has `{from}`");
        text.replace(from, to)
    };
    match PLANTED.get() {
        Some(Defect::NoFence) => {
            let text = replaced(text, "if is_good and meta[3] == token then", "if is_good then");
            replaced(text, "if not term then", "term, owed = term or 0, owed or 0 if false then")
        }
        Some(Defect::NoBump) => {
            replaced(text, "if not (all_heard and is_whole) then", "if false then")
        }
        _ => text,
    }
}

/// Something that a gateway does wrong with what it has to deliver, or with who it delivers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misdelivery {
    /// One delivery of 10,000 is dropped.
    Drop,
    /// One of 1,000 is made twice.
    Duplicate,
    /// One of 1,000 is made behind the next on the same connection.
    Swap,
    /// One of 1,000 is waited with for 200 ms, and all behind it.
    Stall,
    /// 100 bytes of each connection are kept for ever.
    Leak,
}

impl Misdelivery {
    /// All of them, by the names that `SKEIN_DEFECT` has for them.
    pub const ALL: [(&str, Self); 5] = [
        ("drop", Self::Drop),
        ("duplicate", Self::Duplicate),
        ("swap", Self::Swap),
        ("stall", Self::Stall),
        ("leak", Self::Leak),
    ];

    fn planted() -> Option<Self> {
        static PLANTED: OnceLock<Option<Misdelivery>> = OnceLock::new();
        *PLANTED.get_or_init(|| {
            let name = std::env::var("SKEIN_DEFECT").ok().filter(|name| name != PANIC)?;
            let known = Self::ALL.into_iter().find(|(known, _)| *known == name);
            Some(known.unwrap_or_else(|| panic!("there is no defect {name}")).1)
        })
    }
}

/// The name that `SKEIN_DEFECT` has for panics at places that messages name.
pub const PANIC: &str = "panic";

/// Panics where panics are planted and `text` says `panic in <place>`.
pub fn panic_in(place: &str, text: &[u8]) {
    static PLANTED: OnceLock<bool> = OnceLock::new();
    let planted =
        *PLANTED.get_or_init(|| std::env::var("SKEIN_DEFECT").is_ok_and(|name| name == PANIC));
    if planted && String::from_utf8_lossy(text).contains(&format!("panic in {place}")) {
        panic!("planted in {place}");
    }
}

/// What becomes of a delivery by the planted defect: the frames that are sent in its place. `None`:
/// it is made as it should be.
pub fn deliver(connection: ConnectionId, frame: &Bytes) -> Option<Vec<Bytes>> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static HELD: Mutex<Option<(ConnectionId, Bytes)>> = Mutex::new(None);
    let every = |many: u64| COUNT.fetch_add(1, Ordering::Relaxed) % many == many - 1;
    match Misdelivery::planted()? {
        Misdelivery::Drop => every(10_000).then(Vec::new),
        Misdelivery::Duplicate => every(1_000).then(|| vec![frame.clone(); 2]),
        Misdelivery::Swap => {
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
        Misdelivery::Stall => {
            if every(1_000) {
                #[expect(clippy::disallowed_methods, reason = "that is the defect")]
                std::thread::sleep(Duration::from_millis(200));
            }
            None
        }
        Misdelivery::Leak => None,
    }
}

/// Does to a new connection what the planted defect does.
pub fn connect() {
    if Misdelivery::planted() == Some(Misdelivery::Leak) {
        std::mem::forget(vec![1_u8; 100]);
    }
}
