//! A client that follows section 5 of the protocol to the letter: a state machine that takes frames
//! and times, and returns the frames to send and its next timers.

use std::collections::{BTreeSet, VecDeque};

use serde_json::{Value, json};
use skein_protocol::position::Position;
use uuid::Uuid;

use super::observer::{Id, RoomObserver, id};

/// Delay before a rejected request is retried, ms.
const RETRY_MS: f64 = 300.0;

/// Actions that a client requests from the simulation.
pub enum ClientAction {
    Send(String),
    Later(f64, Reminder),
}

/// Timers of a client.
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
    /// Messages sent with `echo: false`: the `ack` takes the place of the copy, whenever it
    /// arrives.
    without_echo: BTreeSet<Id>,
}

/// A client in a room.
pub struct SimRoom {
    pub room: usize,
    pub observer: RoomObserver,
    /// Whether the client wants to be a member.
    pub wanted: bool,
    state: JoinState,
    /// The recovery under way ends at this number.
    until: Option<u64>,
    pub unacked: VecDeque<OwnMessage>,
    /// The current join; an earlier one may still be answered.
    join: u64,
    since: Option<Position>,
}

/// A message that this client sends.
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
        let mut join = json!({"type": "join", "room": room(self.room), "ref": self.join});
        if let Some(since) = &self.since {
            join["since"] = json!({"epoch": since.epoch.as_str(), "seq": since.seq});
        }
        ClientAction::Send(join.to_string())
    }

    fn is_live(&self) -> bool {
        self.state == JoinState::Joined && self.until.is_none()
    }

    fn send(&mut self, id: Id) -> Option<ClientAction> {
        let own = self.unacked.iter_mut().find(|own| own.id == id)?;
        if own.sent {
            self.observer.resent.insert(id);
        }
        own.sent = true;
        let mut message = json!({"type": "message", "room": room(self.room), "content": "x",
            "id": Uuid::from_u128(id).to_string()});
        if !own.echo {
            message["echo"] = json!(false);
        }
        Some(ClientAction::Send(message.to_string()))
    }

    /// Sends all unanswered messages once the recovery is complete.
    fn send_pending(&mut self) -> Vec<ClientAction> {
        let cursor = self.observer.cursor.as_ref().map_or(0, |cursor| cursor.seq);
        if self.state != JoinState::Joined || self.until.is_some_and(|until| cursor < until) {
            return vec![];
        }
        self.until = None;
        let ids: Vec<Id> = self.unacked.iter().map(|own| own.id).collect();
        ids.into_iter().filter_map(|id| self.send(id)).collect()
    }

    /// Marks an own message as appended to the log.
    fn acked(&mut self, id: Id) {
        self.unacked.retain(|own| own.id != id);
    }
}

impl SimClient {
    pub fn new(number: usize, outbox_bytes: usize, rooms: Vec<usize>) -> Self {
        let places = rooms.into_iter().map(SimRoom::new).collect();
        Self {
            number,
            connection: None,
            away: false,
            outbox_bytes,
            rooms: places,
            count: 0,
            without_echo: BTreeSet::new(),
        }
    }

    /// Handles an established connection.
    pub fn connected(&mut self) -> Vec<ClientAction> {
        let wanted = self.rooms.iter_mut().filter(|place| place.wanted);
        wanted.map(SimRoom::join).collect()
    }

    pub fn disconnected(&mut self) {
        self.connection = None;
        for place in &mut self.rooms {
            (place.state, place.until) = (JoinState::Out, None);
        }
    }

    /// Sends a message to a room.
    pub fn publish(&mut self, place: usize, echo: bool) -> (Id, Vec<ClientAction>) {
        self.count += 1;
        let id = id(self.number, self.count);
        if !echo {
            self.without_echo.insert(id);
        }
        let place = &mut self.rooms[place];
        place.unacked.push_back(OwnMessage { id, echo, sent: false });
        let wishes = if place.is_live() { place.send(id).into_iter().collect() } else { vec![] };
        (id, wishes)
    }

    /// Leaves a room. `None` if the client is not a member.
    pub fn leave(&mut self, place: usize) -> Option<ClientAction> {
        let place = &mut self.rooms[place];
        place.wanted = false;
        let was = place.state != JoinState::Out;
        (place.state, place.until) = (JoinState::Out, None);
        was.then(|| {
            ClientAction::Send(json!({"type": "leave", "room": room(place.room)}).to_string())
        })
    }

    pub fn on_reminder(&mut self, timer: Reminder) -> Vec<ClientAction> {
        if self.connection.is_none() {
            return vec![];
        }
        match timer {
            Reminder::Join(place) => {
                let place = &mut self.rooms[place];
                let idle = place.wanted && place.state == JoinState::Out;
                if idle { vec![place.join()] } else { vec![] }
            }
            Reminder::Resend(place, id) => {
                let place = &mut self.rooms[place];
                let settled = place.is_live();
                place.send(id).filter(|_| settled).into_iter().collect()
            }
        }
    }

    /// Handles a received frame.
    pub fn handle_frame(&mut self, time: f64, frame: &Value) -> Vec<ClientAction> {
        let of = frame["room"].as_str().unwrap_or_default();
        let Some(at) = self.rooms.iter().position(|place| room(place.room) == of) else {
            return vec![];
        };
        let own = self.number;
        let place = &mut self.rooms[at];
        match frame["type"].as_str().unwrap_or_default() {
            "joined" => {
                if place.state != JoinState::Joining || frame["ref"] != place.join {
                    return vec![];
                }
                place.state = JoinState::Joined;
                let (top, since) = (position(frame), place.since.take());
                let history = frame["history"].as_array().unwrap();
                let history: Vec<_> = history.iter().map(|e| (position(e), id_of(e))).collect();
                history.iter().for_each(|(_, id)| place.acked(*id));
                let recovered = frame["recovered"] == true;
                place.until = recovered.then_some(top.seq);
                place.observer.join(time, since.as_ref(), recovered, &top, history);
                place.send_pending()
            }
            "message" if place.state == JoinState::Joined => {
                let id = id_of(frame);
                place.observer.next(time, position(frame), id);
                if super::observer::client_of(id) == own && place.until.is_some() {
                    place.acked(id);
                }
                if place.until.is_some() { place.send_pending() } else { vec![] }
            }
            "reset" if place.state == JoinState::Joined => {
                place.observer.reset(time, position(frame));
                if place.until.take().is_some() { place.send_pending() } else { vec![] }
            }
            "ack" => {
                let (id, position) = (id_of(frame), position(frame));
                place.acked(id);
                if self.without_echo.contains(&id)
                    && frame["duplicate"] == false
                    && place.state == JoinState::Joined
                {
                    place.observer.next(time, position.clone(), id);
                }
                place.observer.acks.entry(id).or_default().push((time, position));
                if place.until.is_some() { place.send_pending() } else { vec![] }
            }
            "left" => {
                // Requested by this client, or the end of a join that was given up.
                if place.wanted && place.state == JoinState::Joined {
                    (place.state, place.until) = (JoinState::Out, None);
                    return vec![ClientAction::Later(RETRY_MS, Reminder::Join(at))];
                }
                vec![]
            }
            "error" => self.handle_error(at, frame),
            _ => vec![],
        }
    }

    fn handle_error(&mut self, at: usize, frame: &Value) -> Vec<ClientAction> {
        let place = &mut self.rooms[at];
        let retryable =
            matches!(frame["code"].as_str(), Some("unavailable" | "overloaded" | "rate_limited"));
        if !retryable {
            // The server may answer earlier messages with `not_joined` after a leave.
            if !(frame["code"] == "not_joined" && place.state != JoinState::Joined) {
                place.observer.violations.push(("REFUSED", frame.to_string()));
            }
            return vec![];
        }
        match frame["for"].as_str() {
            Some("join") if place.state == JoinState::Joining && frame["ref"] == place.join => {
                place.state = JoinState::Out;
                vec![ClientAction::Later(RETRY_MS, Reminder::Join(at))]
            }
            Some("message") => {
                vec![ClientAction::Later(RETRY_MS, Reminder::Resend(at, id_of(frame)))]
            }
            _ => vec![],
        }
    }
}

pub fn room(number: usize) -> String {
    format!("r{number}")
}

fn position(frame: &Value) -> Position {
    Position::new(frame["epoch"].as_str().unwrap().parse().unwrap(), frame["seq"].as_u64().unwrap())
}

pub fn id_of(frame: &Value) -> Id {
    Uuid::parse_str(frame["id"].as_str().unwrap()).unwrap().as_u128()
}
