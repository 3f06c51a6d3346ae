//! Floors: above which position the log of a room begins that Redis does not have.
//!
//! The archive may have entries of a room that Redis has forgotten: the room was idle for longer
//! than heads of logs are kept, or Redis lost its data. The room's numbers continue above those
//! entries, in a later epoch. The archive is asked before the first use of a room that Redis does
//! not have. If it does not answer in time, the log begins at the present time as a number, which is
//! above every number of an earlier log.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use skein_core::{archive::Archive, delivery::ordinal};
use skein_protocol::ids::{RoomId, RoomKind};
use tokio::time::{Instant, timeout};

/// How long the archive may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
/// How long its reply counts: by then the room was used, or it is asked again.
const REPLY_VALID_FOR: Duration = Duration::from_secs(30);
/// The most rooms that are remembered.
const ROOMS_MAX: usize = 65_536;
/// 2020-01-01 in seconds since 1970: times as numbers count from here.
const FIRST_TIME: u64 = 1_577_836_800;

/// The floors of rooms; without an archive there are none. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Floors(Option<Arc<KnownFloors>>);

struct KnownFloors {
    archive: Arc<dyn Archive>,
    rooms: Mutex<HashMap<RoomId, KnownRoom>>,
}

/// The facts about a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KnownRoom {
    /// Redis has it.
    Exists,
    /// Redis did not have it, and the archive has this floor for it.
    Absent { floor: LogFloor, asked: Instant },
}

/// A position above which a log begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LogFloor {
    ordinal: u64,
    seq: u64,
}

impl LogFloor {
    /// The floor at a time: seconds since 2020 as ordinal, milliseconds as number. A log would need
    /// a thousand entries per second throughout its life to be above it.
    fn at(now: SystemTime) -> Self {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let since = since.saturating_sub(Duration::from_secs(FIRST_TIME));
        Self { ordinal: since.as_secs(), seq: since.as_millis() as u64 }
    }
}

impl Floors {
    pub(super) fn new(archive: Option<Arc<dyn Archive>>) -> Self {
        Self(archive.map(|archive| Arc::new(KnownFloors { archive, rooms: Mutex::default() })))
    }

    /// Whether a log of the room may be begun without a further question.
    pub(super) fn is_known(&self, room: &RoomId) -> bool {
        let Some(floors) = &self.0 else { return true };
        // The archive keeps no entries of other rooms than those.
        room.kind() != RoomKind::Room || floors.known(room).is_some()
    }

    /// The end of ARGV 3 of a room's scripts: the floor, if there is an archive. The scripts use it
    /// only if Redis does not have the room.
    pub(super) fn argument(&self, room: &RoomId) -> String {
        let Some(floors) = &self.0 else { return String::new() };
        if room.kind() != RoomKind::Room {
            return String::new();
        }
        let floor = match floors.known(room) {
            Some(KnownRoom::Absent { floor, .. }) => floor,
            Some(KnownRoom::Exists) | None => LogFloor::at(SystemTime::now()),
        };
        format!(" {} {}", floor.ordinal, floor.seq)
    }

    /// Records that Redis has the room.
    pub(super) fn exists(&self, room: &RoomId) {
        if let Some(floors) = &self.0
            && room.kind() == RoomKind::Room
        {
            floors.note(room, KnownRoom::Exists);
        }
    }

    /// Asks the archive for the floor of a room that Redis does not have.
    pub(super) async fn ask(&self, room: &RoomId) {
        let Some(floors) = &self.0 else { return };
        let floor = match timeout(ASK_TIMEOUT, floors.archive.head(room.clone())).await {
            Ok(Ok(None)) => LogFloor::default(),
            Ok(Ok(Some(head))) => LogFloor { ordinal: ordinal(&head.epoch), seq: head.seq },
            Ok(Err(error)) => {
                tracing::warn!(%room, %error, "the archive does not tell where the numbers of a \
                    room continue: they continue at the present time");
                LogFloor::at(SystemTime::now())
            }
            Err(_) => {
                tracing::warn!(%room, "the archive does not tell in time where the numbers of a \
                    room continue: they continue at the present time");
                LogFloor::at(SystemTime::now())
            }
        };
        floors.note(room, KnownRoom::Absent { floor, asked: Instant::now() });
    }

    /// Forgets all rooms: the nodes have agreed on another server, which may lack some.
    pub(super) fn clear(&self) {
        if let Some(floors) = &self.0 {
            floors.rooms.lock().clear();
        }
    }
}

impl KnownFloors {
    fn known(&self, room: &RoomId) -> Option<KnownRoom> {
        let known = *self.rooms.lock().get(room)?;
        match known {
            KnownRoom::Absent { asked, .. } if asked.elapsed() > REPLY_VALID_FOR => None,
            known => Some(known),
        }
    }

    fn note(&self, room: &RoomId, known: KnownRoom) {
        let rooms = &mut *self.rooms.lock();
        if rooms.len() >= ROOMS_MAX && !rooms.contains_key(room) {
            rooms.clear();
        }
        rooms.insert(room.clone(), known);
    }
}
