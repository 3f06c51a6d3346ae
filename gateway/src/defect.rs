//! Defects to be planted, so that a simulation can show that it finds them. No release has this
//! module: it is behind the feature `defects`.

use std::cell::Cell;

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
            let text = replaced(text, "if epoch and meta[3] == token then", "if epoch then");
            replaced(text, "if not term then", "term, owed = term or 0, owed or 0 if false then")
        }
        Some(Defect::NoBump) => {
            replaced(text, "if not (all_heard and is_whole) then", "if false then")
        }
        _ => text,
    }
}
