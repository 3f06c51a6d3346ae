//! Event streams: what a connection would be sent, for those who cannot have a WebSocket (HTML Living
//! Standard, section 9.2).
//!
//! A stream is a session like any other, whose outbox is read here: each frame becomes one event. Those
//! of a log carry the positions in all rooms and the inbox as their id, by which the client goes on
//! elsewhere. Whoever reads slowly lags, as any client does.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Query, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use serde::Deserialize;
use shared::{
    close::CloseCode,
    error::ErrorCode,
    ids::{ConnectionId, RoomId},
    position::{Epoch, Position, Seq},
    protocol::{
        answer::{Answer, Reconnect, ReconnectReason},
        request::{Join, history_default},
    },
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    Ends, Node,
    client::{
        Client, Entered, Params, Refused, connected, follow_inbox, hold_session, param, unread_from,
    },
    error::{refuse, refuse_for},
    places::Places,
    upgrade::route,
};
use crate::{
    bus::{registry::millis_now, standing::Told},
    hub::member::Subscriber,
    limits::Place,
    outbox::{Close, Outbox},
    session::{Request, Session},
    telemetry::metrics::Handshake,
    transport::changed,
};

/// The most rooms of a stream.
const ROOMS_MAX: usize = 20;
/// How often something is sent that means nothing, so that a proxy does not take the stream for dead.
const PING_EVERY: Duration = Duration::from_secs(25);
/// What a client is told to wait before it comes back, in milliseconds.
const RETRY_MS: u64 = 3000;
/// The longest position that is looked at: 20 rooms with the longest names.
const CURSOR_BYTES_MAX: usize = 8 * 1024;
/// How many pieces of a stream wait for the connection to take them.
const PIECES_MAX: usize = 4;

/// How far a client is, in rooms and in the inbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Cursors {
    rooms: BTreeMap<RoomId, Position>,
    inbox: Option<Position>,
}

impl Cursors {
    /// As an event's id: base64url of `[<room>]~<epoch>:<seq>`, with commas between.
    fn to_id(&self) -> String {
        let inbox = self.inbox.iter().map(|at| format!("~{at}"));
        let rooms = self.rooms.iter().map(|(room, at)| format!("{room}~{at}"));
        URL_SAFE_NO_PAD.encode(inbox.chain(rooms).collect::<Vec<_>>().join(","))
    }

    /// What of an id can be read. One that cannot is as none: the client is told where it begins.
    fn of_id(id: &str) -> Self {
        let mut cursors = Self::default();
        let text =
            (id.len() <= CURSOR_BYTES_MAX).then(|| URL_SAFE_NO_PAD.decode(id).ok()).flatten();
        let text = text.and_then(|text| String::from_utf8(text).ok()).unwrap_or_default();
        for (name, at) in text.split(',').filter_map(|part| part.split_once('~')) {
            let Ok(at) = at.parse() else { continue };
            match name {
                "" => cursors.inbox = Some(at),
                room => drop(room.parse().map(|room| cursors.rooms.insert(room, at))),
            }
        }
        cursors
    }

    /// Takes note of a frame. Returns whether a position has moved.
    fn note(&mut self, frame: &Frame<'_>) -> bool {
        let at = |epoch: &Option<Epoch>, seq| Some(Position::new(epoch.clone()?, seq));
        match frame.kind {
            "message" | "direct" | "notification" | "reset" => {
                let Some(at) = at(&frame.epoch, frame.seq) else { return false };
                match &frame.room {
                    Some(room) => drop(self.rooms.insert(room.clone(), at)),
                    None => self.inbox = Some(at),
                }
                true
            }
            "joined" => {
                let (Some(room), Some(top)) = (&frame.room, at(&frame.epoch, frame.seq)) else {
                    return false;
                };
                let shown = frame.history.last().and_then(|last| at(&last.epoch, last.seq));
                // What follows a position comes behind this frame.
                let known = self.rooms.get(room).filter(|_| frame.recovered).cloned();
                self.rooms.insert(room.clone(), shown.or(known).unwrap_or(top));
                true
            }
            _ => false,
        }
    }
}

/// A frame, as far as it moves positions.
#[derive(Deserialize)]
struct Frame<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(default)]
    room: Option<RoomId>,
    #[serde(default)]
    epoch: Option<Epoch>,
    #[serde(default)]
    seq: Seq,
    #[serde(default)]
    recovered: bool,
    #[serde(default)]
    history: Vec<Shown>,
}

#[derive(Deserialize)]
struct Shown {
    #[serde(default)]
    epoch: Option<Epoch>,
    #[serde(default)]
    seq: Seq,
}

/// The JSON of a frame as it stands in an outbox: unmasked and whole (RFC 6455, section 5.2). A binary
/// one has its payload in base64.
fn json_of(frame: &[u8]) -> Option<String> {
    let (head, rest) = frame.split_first_chunk::<2>()?;
    let payload = match head[1] & 0x7F {
        126 => rest.get(2..)?,
        127 => rest.get(8..)?,
        _ => rest,
    };
    match head[0] & 0x0F {
        1 => String::from_utf8(payload.to_vec()).ok(),
        2 => {
            let (length, rest) = payload.split_first_chunk::<2>()?;
            let (header, content) = rest.split_at_checked(u16::from_be_bytes(*length).into())?;
            let header = std::str::from_utf8(header).ok()?.strip_suffix('}')?;
            let content = STANDARD.encode(content);
            Some(format!(r#"{header},"encoding":"base64","content":"{content}"}}"#))
        }
        // Pings are of this stream's own.
        _ => None,
    }
}

fn event(json: &str, id: Option<&str>) -> String {
    match id {
        Some(id) => format!("id: {id}\ndata: {json}\n\n"),
        None => format!("data: {json}\n\n"),
    }
}

/// `GET /sse`
pub(super) async fn stream(
    State(node): State<Arc<Node>>,
    Query(params): Params,
    request: axum::extract::Request,
) -> Response {
    let (parts, _) = request.into_parts();
    let places = match Places::take(&node, &parts) {
        Ok(places) => places,
        Err((outcome, response)) => {
            node.metrics.handshakes.of(outcome).inc();
            return *response;
        }
    };
    let rooms = match rooms_of(&params) {
        Ok(rooms) => rooms,
        Err(text) => return refuse(StatusCode::BAD_REQUEST, "bad_request", text),
    };
    let ends = parts.extensions.get::<Ends>().copied();
    let ends =
        ends.unwrap_or(Ends { peer: ([0, 0, 0, 0], 0).into(), local: ([0, 0, 0, 0], 0).into() });
    let client = Client::read(&node, &parts.headers, &params, ends);
    let id = parts.headers.get("last-event-id").and_then(|value| value.to_str().ok());
    let cursors = Cursors::of_id(id.or(param(&params, "last_event_id")).unwrap_or_default());

    let (answer, opened) = oneshot::channel();
    let route = route(ends);
    let served = node.clone();
    // A task of its own, which ends what it has begun wherever the client goes.
    node.tasks.spawn_connection(async move {
        let node = served;
        match Stream::open(&node, client, rooms, (cursors, route), places).await {
            Ok((mut stream, pieces)) => {
                if answer.send(Ok(pieces)).is_err() {
                    return stream.session.end().await;
                }
                node.metrics.connections.inc();
                stream.run(&node).await;
                node.metrics.connections.dec();
            }
            Err(refused) => drop(answer.send(Err(refused))),
        }
    });
    let pieces = match opened.await {
        Ok(Ok(pieces)) => pieces,
        Ok(Err(refused)) => {
            node.metrics.handshakes.of(Handshake::Bad).inc();
            return *refused;
        }
        // The node ends.
        Err(_) => return *refused(ErrorCode::Unavailable, "this node is stopping"),
    };
    node.metrics.handshakes.of(Handshake::Accepted).inc();
    let pieces = futures_util::stream::unfold(pieces, async |mut pieces| {
        let piece: Bytes = pieces.recv().await?;
        Some((Ok::<_, std::convert::Infallible>(piece), pieces))
    });
    let mut response = Response::new(Body::from_stream(pieces));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // nginx would hold events back until it has many.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    allow_origin(&parts.headers, headers);
    response
}

/// Its origin was allowed (`server.allowed_origins`), so that a page there may read the answer.
fn allow_origin(asked: &HeaderMap, headers: &mut HeaderMap) {
    if let Some(origin) = asked.get(header::ORIGIN) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        headers.insert(header::VARY, HeaderValue::from_static("Origin"));
    }
}

fn rooms_of(params: &[(String, String)]) -> Result<Vec<RoomId>, &'static str> {
    let names =
        param(params, "rooms").unwrap_or_default().split(',').filter(|name| !name.is_empty());
    let mut rooms = names
        .map(str::parse)
        .collect::<Result<Vec<RoomId>, _>>()
        .map_err(|_| "`rooms` are names with commas between")?;
    rooms.sort_unstable();
    rooms.dedup();
    if rooms.len() > ROOMS_MAX { Err("`rooms` are at most 20") } else { Ok(rooms) }
}

/// A client that reads an event stream.
struct Stream {
    session: Session,
    subscriber: Arc<Subscriber>,
    cursors: Cursors,
    pieces: mpsc::Sender<Bytes>,
    expires: Option<Instant>,
    _places: Places,
    _user: Place<shared::ids::UserId>,
}

/// The stream is to end, or its client has gone.
struct Ended;

/// A refusal in HTTP.
type Answered = Box<Response>;

fn refused(code: ErrorCode, text: &str) -> Answered {
    let status = match code {
        ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::LimitReached | ErrorCode::RateLimited => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::Unavailable | ErrorCode::Overloaded | ErrorCode::Internal => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        _ => StatusCode::FORBIDDEN,
    };
    Box::new(match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            refuse_for(status, code.as_str(), text, Duration::from_secs(1))
        }
        status => refuse(status, code.as_str(), text),
    })
}

impl Stream {
    /// Opens the session and joins the rooms. What is to be sent waits in the outbox.
    async fn open(
        node: &Node,
        client: Client,
        rooms: Vec<RoomId>,
        (mut cursors, route): (Cursors, String),
        places: Places,
    ) -> Result<(Self, mpsc::Receiver<Bytes>), Answered> {
        let connection = ConnectionId::random();
        let entered = client.enter(node, connection).await.map_err(|error| match error {
            Refused::Nobody(error) => {
                refused(ErrorCode::Unauthorized, &format!("you are nobody here: {error}"))
            }
            Refused::TooMany => {
                refused(ErrorCode::LimitReached, "this user has too many connections")
            }
            Refused::Unavailable => refused(ErrorCode::Unavailable, "the bus is away"),
        })?;
        let outbox = Outbox::to_owner(node.options.limits.outbox_bytes_max, node.metrics.clone());
        let subscriber = Arc::new(Subscriber::new(connection, outbox).of(entered.owner()));
        let (user, wait) = (entered.identity.user.clone(), node.services.limits.wait_max);
        let online = node.services.presence.appear(&user, wait).await;
        subscriber.answer(&connected(node, &entered, &subscriber, route));
        let Entered { identity, place, opened, .. } = entered;
        let inbox = cursors.inbox.clone().map(Ok).or(client.inbox);
        // Where the inbox begins is part of every position from now on.
        let begins = Position::new(opened.inbox.epoch.clone(), unread_from(&opened.inbox));
        cursors.inbox = Some(inbox.clone().and_then(Result::ok).unwrap_or(begins));
        let follows = follow_inbox(node, &subscriber, &user.id, opened.inbox, inbox).await;
        let services = node.services.clone();
        let session = Session::new(services, identity, opened.session, subscriber.clone(), online);
        let expires = session.expires_at().and_then(|at| {
            let left = at.duration_since(std::time::SystemTime::now()).unwrap_or_default();
            Instant::now().checked_add(left)
        });
        let (pieces, taken) = mpsc::channel(PIECES_MAX);
        let (_places, _user) = (places, place);
        let mut stream = Self { session, subscriber, cursors, pieces, expires, _places, _user };
        if follows.is_err() {
            stream.session.end().await;
            return Err(refused(ErrorCode::Unavailable, "the bus is away"));
        }
        for room in rooms {
            let since = stream.cursors.rooms.get(&room).cloned();
            let join = Join { room, since, history: history_default(), password: None };
            let performed = stream.session.perform(Request::Join(None, join)).await;
            if let Err(code) = stream.session.finish(performed) {
                stream.session.end().await;
                return Err(refused(code, "a room could not be joined"));
            }
        }
        hold_session(node, &stream.subscriber).await;
        Ok((stream, taken))
    }

    async fn run(mut self, node: &Node) {
        let mut told = Some(self.session.told());
        self.serve(node, &mut told).await;
        self.session.end().await;
        self.subscriber.outbox.discard();
    }

    async fn serve(&mut self, node: &Node, told: &mut Option<tokio::sync::watch::Receiver<Told>>) {
        let subscriber = self.subscriber.clone();
        let outbox = &subscriber.outbox;
        let batch = node.departure.batch(subscriber.connection);
        let mut ping = tokio::time::interval(PING_EVERY);
        ping.reset();
        if self.send(node, format!("retry: {RETRY_MS}\n\n")).await.is_err() {
            return;
        }
        loop {
            let frames = outbox.take();
            if !frames.is_empty() {
                let text: String = frames.iter().filter_map(|frame| self.event_of(frame)).collect();
                if self.send(node, text).await.is_err() {
                    return;
                }
            }
            let behind = self.session.take_behind();
            if !behind.is_empty() {
                Box::pin(self.session.catch_up(behind)).await;
            }
            if let Some(Close { code, .. }) = outbox.begin_close() {
                tracing::debug!(connection = %subscriber.connection, code, "an event stream ends");
                return;
            }
            let expires = self.expired();
            // All arms are cancel-safe.
            tokio::select! {
                biased;
                () = batch.left() => {
                    let after_ms = batch.after_ms();
                    subscriber.answer(&Answer::Reconnect(Reconnect {
                        after_ms,
                        reason: ReconnectReason::Draining,
                        node: None,
                    }));
                    self.session.end().await;
                    let frames = outbox.take();
                    let last = frames.iter().filter_map(|frame| self.event_of(frame));
                    // Browsers read no `reconnect`: this is what spreads them.
                    let last: String =
                        last.chain([format!("retry: {}\n\n", RETRY_MS + after_ms)]).collect();
                    // Who does not take it now comes back by itself.
                    let _ = self.pieces.try_send(last.into());
                    return;
                }
                () = self.pieces.closed() => return,
                () = expires => {
                    let code = CloseCode::TokenExpired.number();
                    outbox.close(Close { code, reason: String::new() });
                }
                () = outbox.woken() => {}
                news = changed(told) => self.session.tell(news),
                _ = ping.tick() => {
                    if self.send(node, ": ping\n\n".to_owned()).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Resolves when the client's token ends.
    fn expired(&self) -> impl Future<Output = ()> + use<> {
        let expires = self.expires;
        async move {
            match expires {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Hands a piece to the connection, which takes it when it can; unless the stream is to end before
    /// that.
    async fn send(&self, node: &Node, text: String) -> Result<(), Ended> {
        let outbox = &self.subscriber.outbox;
        let closing = async {
            while !outbox.is_closing() {
                outbox.woken().await;
            }
        };
        // All arms are cancel-safe, as far as a stream that ends needs it.
        tokio::select! {
            biased;
            sent = self.pieces.send(text.into()) => sent.map_err(|_| Ended)?,
            () = node.departure.batch(self.subscriber.connection).left() => return Err(Ended),
            () = self.expired() => return Err(Ended),
            () = closing => return Err(Ended),
        }
        self.subscriber.health.hear(millis_now());
        Ok(())
    }

    fn event_of(&mut self, frame: &[u8]) -> Option<String> {
        let json = json_of(frame)?;
        let moved = serde_json::from_str(&json).is_ok_and(|frame| self.cursors.note(&frame));
        let id = moved.then(|| self.cursors.to_id());
        Some(event(&json, id.as_deref()))
    }
}

#[cfg(test)]
mod tests {
    use shared::codec::{self, Opcode};

    use super::*;

    fn at(epoch: &str, seq: Seq) -> Position {
        Position::new(epoch.parse().unwrap(), seq)
    }

    #[test]
    fn positions_are_read_back_and_nonsense_is_none() {
        let mut cursors = Cursors { inbox: Some(at("i", 3)), ..Cursors::default() };
        cursors.rooms.insert("a:b".parse().unwrap(), at("1-e_x", 7));
        cursors.rooms.insert("r".parse().unwrap(), at("e", 0));
        assert_eq!(Cursors::of_id(&cursors.to_id()), cursors);
        for bad in ["", "!", "AAAA", &URL_SAFE_NO_PAD.encode("a b~e:1,r~x,~"), &"A".repeat(9000)] {
            assert_eq!(Cursors::of_id(bad), Cursors::default(), "{bad}");
        }
    }

    #[test]
    fn entries_move_positions_and_other_frames_do_not() {
        let mut cursors = Cursors::default();
        let mut note = |json: &str| cursors.note(&serde_json::from_str(json).unwrap());
        assert!(note(
            r#"{"type":"joined","room":"r","epoch":"e","seq":9,"recovered":false,"history":[{"type":"message","epoch":"e","seq":8}]}"#
        ));
        assert!(note(r#"{"type":"message","room":"r","epoch":"e","seq":9}"#));
        assert!(note(r#"{"type":"direct","epoch":"i","seq":2}"#));
        assert!(!note(r#"{"type":"typing","room":"r","user":"ann","is_typing":true}"#));
        assert!(
            !note(r#"{"type":"message","room":"live","content":1}"#),
            "of a room without a log"
        );
        assert_eq!((&cursors.rooms["r"], &cursors.inbox), (&at("e", 9), &Some(at("i", 2))));
    }

    #[test]
    fn a_stream_that_is_resumed_is_where_it_was_until_it_gets_more() {
        let mut cursors = Cursors::default();
        cursors.rooms.insert("r".parse().unwrap(), at("e", 4));
        let joined =
            r#"{"type":"joined","room":"r","epoch":"e","seq":9,"recovered":true,"history":[]}"#;
        cursors.note(&serde_json::from_str(joined).unwrap());
        assert_eq!(cursors.rooms["r"], at("e", 4));
    }

    #[test]
    fn frames_become_json_whatever_their_length_and_kind() {
        for length in [5, 200, 70_000] {
            let json = format!(r#"{{"a":"{}"}}"#, "x".repeat(length));
            let frame = codec::encode(Opcode::Text, &[json.as_bytes()]);
            assert_eq!(json_of(&frame).as_deref(), Some(&*json));
        }
        let header = br#"{"type":"message"}"#;
        let length = (header.len() as u16).to_be_bytes();
        let frame = codec::encode(Opcode::Binary, &[&length, header, &[0, 255]]);
        let json = json_of(&frame).unwrap();
        assert_eq!(json, r#"{"type":"message","encoding":"base64","content":"AP8="}"#);
        assert_eq!(json_of(&codec::encode(Opcode::Ping, &[])), None);
    }
}
