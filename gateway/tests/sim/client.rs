//! A client that follows section 5 of the protocol to the letter: a state that is given frames and
//! moments, and says what to send and when to be asked again.

use std::collections::{BTreeSet, VecDeque};

use serde_json::{Value, json};
use shared::position::Position;
use uuid::Uuid;

use super::witness::{Id, Witness, id};

/// How long to wait before something that was refused is tried again, ms.
const AGAIN_MS: f64 = 300.0;

/// What a client wants of the world.
pub enum Wish {
    Send(String),
    Later(f64, Timer),
}

/// What a client wants to be reminded of.
#[derive(Clone, Copy)]
pub enum Timer {
    Join(usize),
    Resend(usize, Id),
}

pub struct Client {
    pub number: usize,
    /// The connection, if there is one.
    pub talk: Option<u64>,
    /// It stays away.
    pub away: bool,
    pub outbox_bytes: usize,
    pub places: Vec<Place>,
    count: u64,
    /// What it wanted no copy of: the `ack` stands in its place, whenever that comes.
    silent: BTreeSet<Id>,
}

/// A client in a room.
pub struct Place {
    pub room: usize,
    pub witness: Witness,
    /// It wants to be in.
    pub wanted: bool,
    state: State,
    /// The recovery under way ends at this number.
    until: Option<u64>,
    pub unacked: VecDeque<Own>,
    /// The join that counts: an earlier one may still be answered.
    join: u64,
    since: Option<Position>,
}

/// A message of its own.
pub struct Own {
    pub id: Id,
    echo: bool,
    sent: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Out,
    Asked,
    In,
}

impl Place {
    pub fn new(room: usize) -> Self {
        Self {
            room,
            witness: Witness::default(),
            wanted: true,
            state: State::Out,
            until: None,
            unacked: VecDeque::new(),
            join: 0,
            since: None,
        }
    }

    fn join(&mut self) -> Wish {
        self.state = State::Asked;
        self.since = self.witness.cursor.clone();
        self.join += 1;
        let mut join = json!({"type": "join", "room": room(self.room), "ref": self.join});
        if let Some(since) = &self.since {
            join["since"] = json!({"epoch": since.epoch.as_str(), "seq": since.seq});
        }
        Wish::Send(join.to_string())
    }

    fn is_settled(&self) -> bool {
        self.state == State::In && self.until.is_none()
    }

    fn message(&mut self, id: Id) -> Option<Wish> {
        let own = self.unacked.iter_mut().find(|own| own.id == id)?;
        if own.sent {
            self.witness.resent.insert(id);
        }
        own.sent = true;
        let mut message = json!({"type": "message", "room": room(self.room), "content": "x",
            "id": Uuid::from_u128(id).to_string()});
        if !own.echo {
            message["echo"] = json!(false);
        }
        Some(Wish::Send(message.to_string()))
    }

    /// Sends all that has no answer, once all that was missed is here.
    fn settle(&mut self) -> Vec<Wish> {
        let cursor = self.witness.cursor.as_ref().map_or(0, |cursor| cursor.seq);
        if self.state != State::In || self.until.is_some_and(|until| cursor < until) {
            return vec![];
        }
        self.until = None;
        let ids: Vec<Id> = self.unacked.iter().map(|own| own.id).collect();
        ids.into_iter().filter_map(|id| self.message(id)).collect()
    }

    /// An own message is known to be in the log.
    fn acked(&mut self, id: Id) {
        self.unacked.retain(|own| own.id != id);
    }
}

impl Client {
    pub fn new(number: usize, outbox_bytes: usize, rooms: Vec<usize>) -> Self {
        let places = rooms.into_iter().map(Place::new).collect();
        Self {
            number,
            talk: None,
            away: false,
            outbox_bytes,
            places,
            count: 0,
            silent: BTreeSet::new(),
        }
    }

    /// The connection stands.
    pub fn connected(&mut self) -> Vec<Wish> {
        let wanted = self.places.iter_mut().filter(|place| place.wanted);
        wanted.map(Place::join).collect()
    }

    pub fn disconnected(&mut self) {
        self.talk = None;
        for place in &mut self.places {
            (place.state, place.until) = (State::Out, None);
        }
    }

    /// Says something in a room.
    pub fn say(&mut self, place: usize, echo: bool) -> (Id, Vec<Wish>) {
        self.count += 1;
        let id = id(self.number, self.count);
        if !echo {
            self.silent.insert(id);
        }
        let place = &mut self.places[place];
        place.unacked.push_back(Own { id, echo, sent: false });
        let wishes =
            if place.is_settled() { place.message(id).into_iter().collect() } else { vec![] };
        (id, wishes)
    }

    /// Leaves a room. `None` where it is not in.
    pub fn leave(&mut self, place: usize) -> Option<Wish> {
        let place = &mut self.places[place];
        place.wanted = false;
        let was = place.state != State::Out;
        (place.state, place.until) = (State::Out, None);
        was.then(|| Wish::Send(json!({"type": "leave", "room": room(place.room)}).to_string()))
    }

    pub fn remind(&mut self, timer: Timer) -> Vec<Wish> {
        if self.talk.is_none() {
            return vec![];
        }
        match timer {
            Timer::Join(place) => {
                let place = &mut self.places[place];
                let idle = place.wanted && place.state == State::Out;
                if idle { vec![place.join()] } else { vec![] }
            }
            Timer::Resend(place, id) => {
                let place = &mut self.places[place];
                let settled = place.is_settled();
                place.message(id).filter(|_| settled).into_iter().collect()
            }
        }
    }

    /// Takes a frame.
    pub fn take(&mut self, time: f64, frame: &Value) -> Vec<Wish> {
        let of = frame["room"].as_str().unwrap_or_default();
        let Some(at) = self.places.iter().position(|place| room(place.room) == of) else {
            return vec![];
        };
        let own = self.number;
        let place = &mut self.places[at];
        match frame["type"].as_str().unwrap_or_default() {
            "joined" => {
                if place.state != State::Asked || frame["ref"] != place.join {
                    return vec![];
                }
                place.state = State::In;
                let (top, since) = (position(frame), place.since.take());
                let history = frame["history"].as_array().unwrap();
                let history: Vec<_> = history.iter().map(|e| (position(e), id_of(e))).collect();
                history.iter().for_each(|(_, id)| place.acked(*id));
                let recovered = frame["recovered"] == true;
                place.until = recovered.then_some(top.seq);
                place.witness.join(time, since.as_ref(), recovered, &top, history);
                place.settle()
            }
            "message" if place.state == State::In => {
                let id = id_of(frame);
                place.witness.next(time, position(frame), id);
                if super::witness::client_of(id) == own && place.until.is_some() {
                    place.acked(id);
                }
                if place.until.is_some() { place.settle() } else { vec![] }
            }
            "reset" if place.state == State::In => {
                place.witness.reset(time, position(frame));
                if place.until.take().is_some() { place.settle() } else { vec![] }
            }
            "ack" => {
                let (id, position) = (id_of(frame), position(frame));
                place.acked(id);
                if self.silent.contains(&id)
                    && frame["duplicate"] == false
                    && place.state == State::In
                {
                    place.witness.next(time, position.clone(), id);
                }
                place.witness.acks.entry(id).or_default().push((time, position));
                if place.until.is_some() { place.settle() } else { vec![] }
            }
            "left" => {
                // Asked for, or the end of a join that was given up.
                if place.wanted && place.state == State::In {
                    (place.state, place.until) = (State::Out, None);
                    return vec![Wish::Later(AGAIN_MS, Timer::Join(at))];
                }
                vec![]
            }
            "error" => self.refused(at, frame),
            _ => vec![],
        }
    }

    fn refused(&mut self, at: usize, frame: &Value) -> Vec<Wish> {
        let place = &mut self.places[at];
        let retryable =
            matches!(frame["code"].as_str(), Some("unavailable" | "overloaded" | "rate_limited"));
        if !retryable {
            // Who has left may be told so of what it sent before.
            if !(frame["code"] == "not_joined" && place.state != State::In) {
                place.witness.bad.push(("REFUSED", frame.to_string()));
            }
            return vec![];
        }
        match frame["for"].as_str() {
            Some("join") if place.state == State::Asked && frame["ref"] == place.join => {
                place.state = State::Out;
                vec![Wish::Later(AGAIN_MS, Timer::Join(at))]
            }
            Some("message") => vec![Wish::Later(AGAIN_MS, Timer::Resend(at, id_of(frame)))],
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
