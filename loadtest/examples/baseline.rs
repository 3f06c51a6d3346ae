//! The baseline of `loadtest bench`: a chat server reduced to one `write(2)` per frame and socket.
//!
//! One thread, one epoll, no queue, no log, no limits. It implements the part of `chat.v1` that the
//! load generator needs: `connected`, `join` → `joined`, and each `message` is relayed unchanged to
//! every member of its sender's room; `/ws/echo` echoes. Relayed frames are padded to the size of a
//! gateway's frames, so that the kernel copies as much.
//!
//! With `--coalesce` all frames for a socket in one turn of the epoll are sent by one write, as a
//! server that writes less often would.
//!
//! A member whose socket accepts no more is disconnected, and the load generator reports missing
//! deliveries.

use std::{
    collections::HashMap,
    error::Error,
    io::{self, Read as _, Write as _},
    net::SocketAddr,
};

use mio::{
    Events, Interest, Poll, Token,
    net::{TcpListener, TcpStream},
};
use skein_websocket::{Decoder, DecoderEvent, Opcode, encode};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// Payload of a gateway's frame with 128 bytes of content.
const PAYLOAD_BYTES: usize = 430;
const LISTENER: Token = Token(usize::MAX);

#[derive(Debug)]
struct BaselineConnection {
    stream: TcpStream,
    /// Bytes to send at the end of the turn.
    buffered: Vec<u8>,
    /// The request, until it is complete.
    head: Vec<u8>,
    decoder: Decoder,
    state: BaselineState,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum BaselineState {
    Handshake,
    Lobby,
    Room(usize),
    Echo,
}

/// The effect of a frame.
enum BaselineAction {
    Join(String),
    Relay(Vec<u8>),
    Echo(Vec<u8>),
    Leave,
}

#[derive(Default)]
struct BaselineServer {
    /// By token; the slot of a closed connection is reused.
    connections: Vec<Option<BaselineConnection>>,
    free: Vec<usize>,
    names: HashMap<String, usize>,
    rooms: Vec<Vec<usize>>,
    /// Connections to write to at the end of the turn, with `--coalesce`.
    pending_writes: Option<Vec<usize>>,
}

fn main() -> Result<(), Box<dyn Error>> {
    rlimit::increase_nofile_limit(u64::MAX)?;
    let mut listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    // In the format of the gateway's log, which the bench parses.
    eprintln!(r#"{{"listen":"{}"}}"#, listener.local_addr()?);
    let mut poll = Poll::new()?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut events = Events::with_capacity(1024);
    let coalesce = std::env::args().any(|argument| argument == "--coalesce");
    let mut server =
        BaselineServer { pending_writes: coalesce.then(Vec::new), ..BaselineServer::default() };
    let mut buffer = vec![0; 64 * 1024];
    loop {
        poll.poll(&mut events, None)?;
        for event in &events {
            if event.token() == LISTENER {
                server.accept(&listener, &poll)?;
            } else {
                server.read(event.token().0, &mut buffer);
            }
        }
        server.flush_turn();
    }
}

impl BaselineServer {
    fn accept(&mut self, listener: &TcpListener, poll: &Poll) -> io::Result<()> {
        loop {
            let mut stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            stream.set_nodelay(true)?;
            let index = self.free.pop().unwrap_or(self.connections.len());
            poll.registry().register(&mut stream, Token(index), Interest::READABLE)?;
            let connection = BaselineConnection {
                stream,
                buffered: Vec::new(),
                head: Vec::new(),
                decoder: Decoder::new(1 << 16),
                state: BaselineState::Handshake,
            };
            if index == self.connections.len() {
                self.connections.push(Some(connection));
            } else {
                self.connections[index] = Some(connection);
            }
        }
    }

    fn read(&mut self, index: usize, buffer: &mut [u8]) {
        loop {
            let Some(Some(connection)) = self.connections.get_mut(index) else { return };
            let count = match connection.stream.read(buffer) {
                Ok(count) if count > 0 => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(_) | Err(_) => return self.drop_connection(index),
            };
            if connection.state == BaselineState::Handshake {
                match connection.handle_handshake(&buffer[..count]) {
                    Some(answer) => self.write(index, &answer),
                    None => continue,
                }
            } else {
                for action in connection.actions(&mut buffer[..count]) {
                    self.handle(index, action);
                }
            }
            // A short read has emptied the socket.
            if count < buffer.len() {
                return;
            }
        }
    }

    fn handle(&mut self, index: usize, action: BaselineAction) {
        match action {
            BaselineAction::Join(name) => {
                let room = *self.names.entry(name).or_insert_with(|| {
                    self.rooms.push(Vec::new());
                    self.rooms.len() - 1
                });
                self.rooms[room].push(index);
                if let Some(Some(connection)) = self.connections.get_mut(index) {
                    connection.state = BaselineState::Room(room);
                }
                self.write(index, &encode(Opcode::Text, &[br#"{"type":"joined"}"#]));
            }
            BaselineAction::Relay(payload) => {
                let padding = [b' '; PAYLOAD_BYTES];
                let padding = &padding[payload.len().min(PAYLOAD_BYTES)..];
                let frame = encode(Opcode::Text, &[&payload, padding]);
                let Some(Some(BaselineConnection { state: BaselineState::Room(room), .. })) =
                    self.connections.get(index)
                else {
                    return;
                };
                let room = *room;
                for place in 0..self.rooms[room].len() {
                    self.write(self.rooms[room][place], &frame);
                }
            }
            BaselineAction::Echo(payload) => self.write(index, &encode(Opcode::Text, &[&payload])),
            BaselineAction::Leave => self.drop_connection(index),
        }
    }

    fn write(&mut self, index: usize, frame: &[u8]) {
        let Some(Some(connection)) = self.connections.get_mut(index) else { return };
        if let Some(pending_writes) = &mut self.pending_writes {
            if connection.buffered.is_empty() {
                pending_writes.push(index);
            }
            connection.buffered.extend_from_slice(frame);
        } else {
            connection.write(frame);
        }
    }

    fn flush_turn(&mut self) {
        for index in
            self.pending_writes.iter_mut().flat_map(|pending_writes| pending_writes.drain(..))
        {
            if let Some(Some(connection)) = self.connections.get_mut(index) {
                let buffered = std::mem::take(&mut connection.buffered);
                connection.write(&buffered);
                connection.buffered = buffered;
                connection.buffered.clear();
            }
        }
    }

    fn drop_connection(&mut self, index: usize) {
        let Some(connection) = self.connections[index].take() else { return };
        if let BaselineState::Room(room) = connection.state {
            self.rooms[room].retain(|member| *member != index);
        }
        self.free.push(index);
    }
}

impl BaselineConnection {
    fn write(&mut self, bytes: &[u8]) {
        if !matches!(self.stream.write(bytes), Ok(count) if count == bytes.len()) {
            eprintln!("a socket accepts no more bytes");
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Handles bytes of the request. Returns the response, followed by `connected`, when the
    /// request is complete.
    fn handle_handshake(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        self.head.extend_from_slice(bytes);
        let head = std::str::from_utf8(&self.head).ok()?.strip_suffix("\r\n\r\n")?;
        let key = head.lines().find_map(|line| line.strip_prefix("Sec-WebSocket-Key: "))?;
        let mut answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {}\r\n\r\n",
            derive_accept_key(key.as_bytes())
        )
        .into_bytes();
        let echo = head.starts_with("GET /ws/echo");
        self.state = if echo { BaselineState::Echo } else { BaselineState::Lobby };
        if !echo {
            answer.extend_from_slice(&encode(Opcode::Text, &[br#"{"type":"connected"}"#]));
        }
        self.head = Vec::new();
        Some(answer)
    }

    fn actions(&mut self, mut input: &mut [u8]) -> Vec<BaselineAction> {
        let mut actions = Vec::new();
        while !input.is_empty() {
            let (used, action) = match self.decoder.next(input) {
                Ok((used, Some(DecoderEvent::Text(text)))) => (used, action_of(self.state, text)),
                Ok((used, Some(DecoderEvent::Close(_)))) => (used, Some(BaselineAction::Leave)),
                Ok((used, _)) => (used, None),
                Err(_) => (input.len(), Some(BaselineAction::Leave)),
            };
            actions.extend(action);
            input = &mut input[used..];
        }
        actions
    }
}

fn action_of(state: BaselineState, text: &str) -> Option<BaselineAction> {
    match state {
        BaselineState::Handshake => None,
        BaselineState::Lobby => {
            let (_, rest) = text.split_once(r#""room":""#)?;
            Some(BaselineAction::Join(rest.split_once('"')?.0.to_owned()))
        }
        BaselineState::Room(_) => Some(BaselineAction::Relay(text.as_bytes().to_vec())),
        BaselineState::Echo => Some(BaselineAction::Echo(text.as_bytes().to_vec())),
    }
}
