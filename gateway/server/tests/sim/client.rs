//! A client that follows section 5 of the protocol to the letter: a state machine that takes frames
//! and timers, and returns what to send and when to be reminded.

use std::collections::{BTreeSet, VecDeque};

use serde_json::{Value, json};
use skein_protocol::position::Position;
use uuid::Uuid;

use super::observer::{Id, RoomObserver, id};

/// The pause before a rejected request is repeated, ms.
const RETRY_MS: f64 = 300.0;

/// An action of a client.
pub enum ClientAction {
    Send(String),
    Later(f64, Reminder),
}

/// A timer of a client.
#[derive(Clone, Copy)]
pub enum Reminder {
    Join(usize),
    Resend(usize, Id),
}

pub struct SimClient {
    pub number: usize,
    /// The connection, if there is one.
    pub connection: Option<u64>,
    /// The client stays disconnected.
    pub away: bool,
    pub outbox_bytes: usize,
    pub rooms: Vec<SimRoom>,
    count: u64,
    /// Messages that it sent without echo: the `ack` stands in for the copy, whenever it comes.
    without_echo: BTreeSet<Id>,
}

/// A client in a room.
pub struct SimRoom {
    pub room: usize,
    pub observer: RoomObserver,
    /// The client wants to be a member.
    pub wanted: bool,
    state: JoinState,
    /// The recovery in progress ends at this number.
    until: Option<u64>,
    pub unacked: VecDeque<OwnMessage>,
    /// The `ref` of the latest join: an earlier one may still be answered.
    join: u64,
    since: Option<Position>,
}

/// A message of this client.
pub struct OwnMessage {
    pub id: Id,
    echo: bool,
    sent: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum JoinState {
    Out,
    Joining,
    Joined,
}

impl SimRoom {
    pub fn new(room: usize) -> Self {
        Self {
            room,
            observer: RoomObserver::default(),
            wanted: true,
            state: JoinState::Out,
            until: None,
            unacked: VecDeque::new(),
            join: 0,
            since: None,
        }
    }

    fn join(&mut self) -> ClientAction {
        self.state = JoinState::Joining;
        self.since = self.observer.cursor.clone();
        self.join += 1;
        let mut join = json!({"type": "join", "room": room_name(self.room), "ref": self.join});
        if let Some(since) = &self.since {
            join["since"] = json!({"epoch": since.epoch.as_str(), "seq": since.seq});
        }
        ClientAction::Send(join.to_string())
    }

    fn is_live(&self) -> bool {
        self.state == JoinState::Joined && self.until.is_none()
    }

    fn send(&mut self, id: Id) -> Option<ClientAction> {
        let message = self.unacked.iter_mut().find(|message| message.id == id)?;
        if message.sent {
            self.observer.resent.insert(id);
        }
        message.sent = true;
        let mut frame = json!({"type": "message", "room": room_name(self.room), "content": "x",
            "id": Uuid::from_u128(id).to_string()});
        if !message.echo {
            frame["echo"] = json!(false);
        }
        Some(ClientAction::Send(frame.to_string()))
    }

    /// Sends all unacknowledged messages, once the recovery is complete.
    fn send_pending(&mut self) -> Vec<ClientAction> {
        let cursor = self.observer.cursor.as_ref().map_or(0, |cursor| cursor.seq);
        if self.state != JoinState::Joined || self.until.is_some_and(|until| cursor < until) {
            return vec![];
        }
        self.until = None;
        let ids: Vec<Id> = self.unacked.iter().map(|message| message.id).collect();
        ids.into_iter().filter_map(|id| self.send(id)).collect()
    }

    /// Forgets a message that is known to be in the log.
    fn acked(&mut self, id: Id) {
        self.unacked.retain(|message| message.id != id);
    }
}

impl SimClient {
    pub fn new(number: usize, outbox_bytes: usize, rooms: Vec<usize>) -> Self {
        let rooms = rooms.into_iter().map(SimRoom::new).collect();
        Self {
            number,
            connection: None,
            away: false,
            outbox_bytes,
            rooms,
            count: 0,
            without_echo: BTreeSet::new(),
        }
    }

    /// Joins rooms on a new connection.
    pub fn connected(&mut self) -> Vec<ClientAction> {
        let wanted = self.rooms.iter_mut().filter(|room| room.wanted);
        wanted.map(SimRoom::join).collect()
    }

    pub fn disconnected(&mut self) {
        self.connection = None;
        for room in &mut self.rooms {
            (room.state, room.until) = (JoinState::Out, None);
        }
    }

    /// Publishes a message to a room.
    pub fn publish(&mut self, room: usize, echo: bool) -> (Id, Vec<ClientAction>) {
        self.count += 1;
        let id = id(self.number, self.count);
        if !echo {
            self.without_echo.insert(id);
        }
        let room = &mut self.rooms[room];
        room.unacked.push_back(OwnMessage { id, echo, sent: false });
        let actions = if room.is_live() { room.send(id).into_iter().collect() } else { vec![] };
        (id, actions)
    }

    /// Leaves a room. `None` if the client is not a member.
    pub fn leave(&mut self, room: usize) -> Option<ClientAction> {
        let room = &mut self.rooms[room];
        room.wanted = false;
        let was_member = room.state != JoinState::Out;
        (room.state, room.until) = (JoinState::Out, None);
        was_member.then(|| {
            ClientAction::Send(json!({"type": "leave", "room": room_name(room.room)}).to_string())
        })
    }

    pub fn on_reminder(&mut self, timer: Reminder) -> Vec<ClientAction> {
        if self.connection.is_none() {
            return vec![];
        }
        match timer {
            Reminder::Join(room) => {
                let room = &mut self.rooms[room];
                let idle = room.wanted && room.state == JoinState::Out;
                if idle { vec![room.join()] } else { vec![] }
            }
            Reminder::Resend(room, id) => {
                let room = &mut self.rooms[room];
                let settled = room.is_live();
                room.send(id).filter(|_| settled).into_iter().collect()
            }
        }
    }

    /// Handles a received frame.
    pub fn handle_frame(&mut self, time: f64, frame: &Value) -> Vec<ClientAction> {
        let of = frame["room"].as_str().unwrap_or_default();
        let Some(at) = self.rooms.iter().position(|room| room_name(room.room) == of) else {
            return vec![];
        };
        let message = self.number;
        let room = &mut self.rooms[at];
        match frame["type"].as_str().unwrap_or_default() {
            "joined" => {
                if room.state != JoinState::Joining || frame["ref"] != room.join {
                    return vec![];
                }
                room.state = JoinState::Joined;
                let (top, since) = (position(frame), room.since.take());
                let history = frame["history"].as_array().unwrap();
                let history: Vec<_> = history.iter().map(|e| (position(e), id_of(e))).collect();
                history.iter().for_each(|(_, id)| room.acked(*id));
                let recovered = frame["recovered"] == true;
                room.until = recovered.then_some(top.seq);
                room.observer.join(time, since.as_ref(), recovered, &top, history);
                room.send_pending()
            }
            "message" if room.state == JoinState::Joined => {
                let id = id_of(frame);
                room.observer.next(time, position(frame), id);
                if super::observer::client_of(id) == message && room.until.is_some() {
                    room.acked(id);
                }
                if room.until.is_some() { room.send_pending() } else { vec![] }
            }
            "reset" if room.state == JoinState::Joined => {
                room.observer.reset(time, position(frame));
                if room.until.take().is_some() { room.send_pending() } else { vec![] }
            }
            "ack" => {
                let (id, position) = (id_of(frame), position(frame));
                room.acked(id);
                if self.without_echo.contains(&id)
                    && frame["duplicate"] == false
                    && room.state == JoinState::Joined
                {
                    room.observer.next(time, position.clone(), id);
                }
                room.observer.acks.entry(id).or_default().push((time, position));
                if room.until.is_some() { room.send_pending() } else { vec![] }
            }
            "left" => {
                // The answer to a leave, or the end of a join that was given up.
                if room.wanted && room.state == JoinState::Joined {
                    (room.state, room.until) = (JoinState::Out, None);
                    return vec![ClientAction::Later(RETRY_MS, Reminder::Join(at))];
                }
                vec![]
            }
            "error" => self.handle_error(at, frame),
            _ => vec![],
        }
    }

    fn handle_error(&mut self, at: usize, frame: &Value) -> Vec<ClientAction> {
        let room = &mut self.rooms[at];
        let retryable =
            matches!(frame["code"].as_str(), Some("unavailable" | "overloaded" | "rate_limited"));
        if !retryable {
            // A message that was sent before leaving may be rejected so.
            if !(frame["code"] == "not_joined" && room.state != JoinState::Joined) {
                room.observer.violations.push(("REFUSED", frame.to_string()));
            }
            return vec![];
        }
        match frame["for"].as_str() {
            Some("join") if room.state == JoinState::Joining && frame["ref"] == room.join => {
                room.state = JoinState::Out;
                vec![ClientAction::Later(RETRY_MS, Reminder::Join(at))]
            }
            Some("message") => {
                vec![ClientAction::Later(RETRY_MS, Reminder::Resend(at, id_of(frame)))]
            }
            _ => vec![],
        }
    }
}

pub fn room_name(number: usize) -> String {
    format!("r{number}")
}

fn position(frame: &Value) -> Position {
    Position::new(frame["epoch"].as_str().unwrap().parse().unwrap(), frame["seq"].as_u64().unwrap())
}

pub fn id_of(frame: &Value) -> Id {
    Uuid::parse_str(frame["id"].as_str().unwrap()).unwrap().as_u128()
}
