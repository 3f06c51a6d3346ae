//! One event stream after its handshake: the frames of a connection for clients that cannot open a
//! WebSocket (HTML Living Standard, section 9.2).
//!
//! A stream is a session like any other, whose outbox is read here: each frame becomes one event.
//! The id of an event from a log holds the positions in all rooms and the inbox, so that the client
//! can resume on any node. A slow client continues from the log, like on a WebSocket: the stream is
//! built in chunks, the next one when the kernel has taken the previous one, and chunks in flight
//! count in the outbox. Rooms are joined one after the other, each when the outbox has space for
//! its history.
//!
//! Events are encoded here and not by axum, whose encoder gives its bytes only to its own response
//! body; a chunk of that would not count in the outbox.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use skein_protocol::{
    close::CloseCode,
    error::ErrorCode,
    ids::RoomId,
    position::Position,
    protocol::{
        client_frame::{JoinFrame, history_default},
        server_frame::{ReconnectFrame, ReconnectReason, ServerFrame},
    },
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{ConnectionEnd, deadline_of, status_changed};
use skein_core::{
    bus::{node_state::BusStatus, presence_store::unix_millis_now},
    connection::{
        encoding::JsonFrame,
        handle::ConnectionHandle,
        outbox::{Close, FRAME_OVERHEAD_BYTES},
    },
    drain::schedule::{DrainNotice, MoveAdvice},
    session::{DeferredRequest, Session},
};

/// Delay before a client reconnects.
pub const RETRY: Duration = Duration::from_secs(3);
/// Interval of comments that keep proxies from closing an idle stream.
const PING_EVERY: Duration = Duration::from_secs(25);
/// Longest event id that is decoded: 20 rooms with the longest names.
const CURSOR_BYTES_MAX: usize = 8 * 1024;
/// Bytes of queued frames per chunk of the stream.
const CHUNK_BYTES: usize = 32 * 1024;
/// Chunks that wait for the connection: one, and the last one of the stream.
const CHUNKS_MAX: usize = 2;

/// Positions of a client in its rooms and its inbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursors {
    /// The positions in rooms.
    rooms: BTreeMap<RoomId, Position>,
    /// The position in the inbox.
    pub inbox: Option<Position>,
}

impl Cursors {
    /// Encodes the positions as an event id: base64url of `[<room>]~<epoch>:<seq>`, separated by
    /// commas.
    fn to_id(&self) -> String {
        let inbox = self.inbox.iter().map(|at| format!("~{at}"));
        let rooms = self.rooms.iter().map(|(room, at)| format!("{room}~{at}"));
        URL_SAFE_NO_PAD.encode(inbox.chain(rooms).collect::<Vec<_>>().join(","))
    }

    /// Decodes the valid parts of an event id. An invalid part counts as absent: the client then
    /// learns where the room begins.
    pub fn of_id(id: &[u8]) -> Self {
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

    /// Advances the position in a room, or in the inbox.
    fn advance(&mut self, room: Option<RoomId>, to: Position) {
        match room {
            Some(room) => drop(self.rooms.insert(room, to)),
            None => self.inbox = Some(to),
        }
    }
}

/// Formats the `retry` field: the delay before the client reconnects after the end of the stream.
pub fn retry(wait: Duration) -> String {
    format!("retry: {}\n\n", wait.as_millis())
}

/// Appends an event. A line break between the tokens of its JSON begins a further line of data.
pub fn write_event(stream: &mut String, id: Option<&str>, json: &str) {
    stream.reserve(json.len() + 64);
    if let Some(id) = id {
        let _ = writeln!(stream, "id: {id}");
    }
    for line in json.split(['\n', '\r']) {
        let _ = writeln!(stream, "data: {line}");
    }
    stream.push('\n');
}

/// An open event stream.
pub struct EventStream {
    session: Session,
    handle: Arc<ConnectionHandle>,
    cursors: Cursors,
    /// Rooms to join once the outbox has space for their history.
    waiting: VecDeque<RoomId>,
    chunks: mpsc::Sender<Bytes>,
    expires: Option<Instant>,
}

/// A part of a stream. Counts in the outbox until the kernel has taken it or the client has
/// disconnected.
struct StreamChunk {
    text: String,
    handle: Arc<ConnectionHandle>,
}

impl StreamChunk {
    fn bytes(&self) -> usize {
        self.text.capacity() + FRAME_OVERHEAD_BYTES
    }
}

impl AsRef<[u8]> for StreamChunk {
    fn as_ref(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

impl Drop for StreamChunk {
    fn drop(&mut self) {
        self.handle.outbox.release_held(self.bytes());
    }
}

impl EventStream {
    /// Creates a stream, and the receiver of its chunks.
    ///
    /// The outbox of `handle` must have the encoding `Json`.
    pub fn new(
        session: Session,
        handle: Arc<ConnectionHandle>,
        cursors: Cursors,
        rooms: Vec<RoomId>,
    ) -> (Self, mpsc::Receiver<Bytes>) {
        let expires = deadline_of(&session);
        let (chunks, receiver) = mpsc::channel(CHUNKS_MAX);
        let waiting = rooms.into();
        (Self { session, handle, cursors, waiting, chunks, expires }, receiver)
    }

    /// Joins rooms while the outbox has space, after the session has checked all of them. Returns
    /// the rooms that wait.
    ///
    /// # Errors
    ///
    /// The code of the first room that cannot be joined.
    pub async fn join_first(&mut self) -> Result<&VecDeque<RoomId>, ErrorCode> {
        for room in &self.waiting {
            self.session.check_join(room)?;
        }
        while self.handle.outbox.has_space()
            && let Some(room) = self.waiting.pop_front()
        {
            self.join(room).await?;
        }
        Ok(&self.waiting)
    }

    /// Joins a room. Errors are also sent as a frame.
    async fn join(&mut self, room: RoomId) -> Result<(), ErrorCode> {
        let since = self.cursors.rooms.get(&room).cloned();
        let join = JoinFrame { room, since, history: history_default(), password: None };
        let outcome = self.session.execute(DeferredRequest::Join(None, join)).await;
        self.session.complete(outcome)
    }

    /// Returns the handle of the connection.
    pub fn handle(&self) -> &Arc<ConnectionHandle> {
        &self.handle
    }

    /// Ends the session of a stream that is not served.
    pub async fn end(mut self) {
        self.session.end().await;
    }

    /// Serves the stream until it ends. Returns how a WebSocket would have ended.
    pub async fn run(mut self, drain: &DrainNotice<'_>) -> ConnectionEnd {
        let mut status_rx = Some(self.session.bus_status());
        let end = self.serve(drain, &mut status_rx).await;
        self.session.end().await;
        self.handle.outbox.discard();
        end
    }

    async fn serve(
        &mut self,
        drain: &DrainNotice<'_>,
        status_rx: &mut Option<watch::Receiver<BusStatus>>,
    ) -> ConnectionEnd {
        let handle = self.handle.clone();
        let outbox = &handle.outbox;
        let mut ping = tokio::time::interval(PING_EVERY);
        ping.reset();
        let mut has_held = true;
        self.send(retry(RETRY));
        loop {
            if !outbox.has_held() {
                if std::mem::take(&mut has_held) {
                    handle.health.record_activity(unix_millis_now());
                }
                // Before the end all queued frames are sent.
                let bytes_max = if outbox.is_closing() { usize::MAX } else { CHUNK_BYTES };
                let text = self.events(bytes_max);
                if !text.is_empty() {
                    self.send(text);
                    has_held = true;
                }
            }
            self.session.handle_evictions().await;
            self.session.handle_signals().await;
            if let Some(close) = outbox.begin_close() {
                return ConnectionEnd::by_gateway(close);
            }
            if outbox.has_space()
                && let Some(room) = self.waiting.pop_front()
            {
                if let Err(code) = Box::pin(self.join(room)).await {
                    // The client reconnects, and gets an HTTP error if the cause is permanent.
                    let (code, reason) =
                        (CloseCode::PolicyViolation.number(), code.as_str().to_owned());
                    outbox.close(Close { code, reason });
                }
                continue;
            }
            let expires = self.expired();
            // All arms are cancel-safe.
            tokio::select! {
                biased;
                () = drain.due() => {
                    let MoveAdvice { after_ms, node } = drain.advice();
                    let reason = ReconnectReason::Draining;
                    handle.send(&ServerFrame::Reconnect(ReconnectFrame { after_ms, reason, node }));
                    self.session.end().await;
                    // Browsers ignore `reconnect`; the `retry` field spreads them over time.
                    let wait = RETRY + Duration::from_millis(after_ms);
                    let last = self.events(usize::MAX);
                    self.send(retry(wait) + &last);
                    let (code, reason) =
                        (CloseCode::ServiceRestart.number(), "draining".to_owned());
                    return ConnectionEnd::by_gateway(Close { code, reason });
                }
                () = self.chunks.closed() => return ConnectionEnd::lost(),
                () = expires => {
                    let code = CloseCode::TokenExpired.number();
                    outbox.close(Close { code, reason: String::new() });
                }
                () = outbox.woken() => {}
                status = status_changed(status_rx) => self.session.send_bus_status(status),
                // A chunk in flight keeps the stream alive as well.
                _ = ping.tick() => if !outbox.has_held() {
                    self.send(": ping\n\n".to_owned());
                    has_held = true;
                }
            }
        }
    }

    /// Resolves when the token of the client expires.
    fn expired(&self) -> impl Future<Output = ()> + use<> {
        let expires = self.expires;
        async move {
            match expires {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Passes a chunk to the connection, which sends it when it can.
    fn send(&self, text: String) {
        let chunk = StreamChunk { text, handle: self.handle.clone() };
        self.handle.outbox.count_held(chunk.bytes());
        // The channel has space for one chunk in flight and the last one. If the client has
        // disconnected, `closed` resolves.
        let _ = self.chunks.try_send(Bytes::from_owner(chunk));
    }

    /// Returns the next frames of the outbox as events, about `bytes_max` in total.
    fn events(&mut self, bytes_max: usize) -> String {
        let mut text = String::new();
        for frame in self.handle.outbox.take_up_to(bytes_max) {
            let Some(JsonFrame { position, text: json }) = JsonFrame::parse(&frame) else {
                continue;
            };
            let id = position.map(|(room, to)| {
                self.cursors.advance(room, to);
                self.cursors.to_id()
            });
            write_event(&mut text, id.as_deref(), json);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use skein_protocol::position::Seq;

    use super::*;

    fn at(epoch: &str, seq: Seq) -> Position {
        Position::new(epoch.parse().unwrap(), seq)
    }

    #[test]
    fn event_ids_decode_and_invalid_parts_are_skipped() {
        let mut cursors = Cursors { inbox: Some(at("i", 3)), ..Cursors::default() };
        cursors.advance(Some("a:b".parse().unwrap()), at("1-e_x", 6));
        cursors.advance(Some("a:b".parse().unwrap()), at("1-e_x", 7));
        cursors.advance(Some("r".parse().unwrap()), at("e", 0));
        assert_eq!(Cursors::of_id(cursors.to_id().as_bytes()), cursors);
        cursors.advance(None, at("i", 4));
        assert_eq!(Cursors::of_id(cursors.to_id().as_bytes()).inbox, Some(at("i", 4)));
        for bad in ["", "!", "AAAA", &URL_SAFE_NO_PAD.encode("a b~e:1,r~x,~"), &"A".repeat(9000)] {
            assert_eq!(Cursors::of_id(bad.as_bytes()), Cursors::default(), "{bad}");
        }
    }

    #[test]
    fn line_breaks_between_json_tokens_do_not_end_an_event() {
        let mut text = String::new();
        write_event(&mut text, Some("abc"), r#"{"a":1}"#);
        write_event(&mut text, None, "{\"a\":\r\n\n1}");
        let second = "data: {\"a\":\ndata: \ndata: \ndata: 1}\n\n";
        assert_eq!(text, format!("id: abc\ndata: {{\"a\":1}}\n\n{second}"));
    }
}
