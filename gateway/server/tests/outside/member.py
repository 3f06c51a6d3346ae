"""One member of some rooms: connects, resumes, sends, and tells the judge of all it is given.

Written from the protocol's text: back-off and close codes as its section 5 and 3.5 ask, `since` for
each room, unacknowledged messages again with the same id once the recovery has not shown them.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import struct
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from judge import Judge, Kind, Position, View
from websocket import Broken, Closed, Refused, WebSocket

PROTOCOL = "chat.v1"
BACK_OFF_BASE, BACK_OFF_CAP = 0.5, 30.0
# How long a server may take to shake hands, and to say goodbye.
HANDSHAKE_SECONDS, CLOSE_SECONDS = 5.0, 3.0
# After these a client comes back by itself; after any other it does not.
COME_BACK = {1001, 1005, 1006, 1011, 1012, 1013, 4002, 4003}
# A send that is answered by one of these is sent again with the same id.
SEND_AGAIN = {"unavailable", "overloaded", "rate_limited"}


@dataclass
class Message:
    """What a member has to say and has no `ack` for."""

    id: str
    content: Any
    echo: bool
    begun_at: float


@dataclass
class Room:
    """A room on the present connection, and what outlives it."""

    view: View
    joined: bool = False
    # Up to where the recovery goes, before which nothing is sent.
    recovers_to: Position | None = None
    is_open: bool = False
    pending: dict[str, Message] = field(default_factory=dict)


@dataclass
class Manner:
    """How members behave."""

    # Seconds of silence after which a connection is given up.
    patience: float = 3.0
    # How many messages may be unacknowledged in all rooms together.
    window: int = 64
    # Shares of messages sent with `echo:false` and as binary frames.
    no_echo: float = 0.2
    binary: float = 0.1
    content_bytes: int = 40
    # Seconds, on average, after which a member leaves by itself and comes back; 0: never.
    roam: float = 0.0


@dataclass
class Stats:
    """What is no verdict but worth knowing."""

    counts: Counter[str] = field(default_factory=Counter)
    ack_slowest: float = 0.0
    quiet_longest: float = 0.0


class Member:
    def __init__(
        self,
        name: str,
        urls: list[str],
        rooms: list[str],
        judge: Judge,
        stats: Stats,
        manner: Manner,
        rng: random.Random,
        changed: Callable[[], None],
        trace: Callable[[str, str, Any], None],
    ) -> None:
        self.name = name
        self.rooms = {room: Room(judge.view(name, room)) for room in rooms}
        self.closed_for_good = False
        self._urls = urls
        self._judge = judge
        self._stats = stats
        self._manner = manner
        self._rng = rng
        self._changed = changed
        self._trace = trace
        self._socket: WebSocket | None = None
        self._connections = 0
        self._session: str | None = None
        self._failures = 0
        self._delivered_at: float | None = None
        # What the last `reconnect` asked for, in seconds.
        self._after = 0.0

    # Connections.

    async def run(self) -> None:
        """Is there for its rooms until it is cancelled, whatever happens to its connections."""
        url = self._urls[0]
        while not self.closed_for_good:
            wait = await self._one_connection(url)
            # Full jitter.
            most = min(BACK_OFF_CAP, BACK_OFF_BASE * 2 ** min(self._failures, 10))
            self._failures += 1
            await asyncio.sleep(max(wait, self._rng.uniform(0, most)))
            url = self._rng.choice(self._urls)

    async def _one_connection(self, url: str) -> float:
        """Lives through one connection. Returns how long the server wants to be left alone."""
        query = {"user": self.name} | ({"session": self._session} if self._session else {})
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                socket = await WebSocket.open(f"{url}?{urllib.parse.urlencode(query)}", PROTOCOL)
        except Refused as refused:
            self._trace(self.name, "refused", f"{url} {refused}")
            self._stats.counts["handshakes_refused"] += 1
            if refused.status < 500 and refused.status != 429:
                self._give_up(str(refused))
            return refused.retry_after
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            self._trace(self.name, "no connection", f"{url} {error!r}")
            return 0
        except (Broken, ValueError, IndexError) as broken:
            self._give_up(str(broken))
            return 0
        self._connections += 1
        self._stats.counts["connections"] += 1
        self._socket = socket
        watch = asyncio.create_task(self._watch(socket))
        self._after = 0.0
        try:
            await self._listen(socket)
        except Closed as closed:
            self._trace(self.name, "closed", f"{url} {closed}")
            if closed.code not in COME_BACK and not socket.was_left():
                self._give_up(str(closed))
        except (Broken, ValueError, KeyError, TypeError) as error:
            self._protocol(f"{type(error).__name__}: {error}")
        finally:
            watch.cancel()
            self._socket = None
            socket.abort()
            for room in self.rooms.values():
                room.joined = room.is_open = False
        return self._after

    async def _watch(self, socket: WebSocket) -> None:
        """Asks for signs of life; gives up what is silent, or what it has had enough of."""
        loop = asyncio.get_running_loop()
        roam = self._manner.roam
        leave_at = loop.time() + self._rng.expovariate(1 / roam) if roam else float("inf")
        while loop.time() - socket.heard_at < self._manner.patience:
            if loop.time() >= leave_at:
                self._trace(self.name, "leaves", "")
                self._stats.counts["left"] += 1
                # In the middle of whatever is on its way, or politely.
                if self._rng.random() < 0.5:
                    socket.close()
                    await asyncio.sleep(CLOSE_SECONDS)
                socket.abort()
                return
            pause = min(1.0, self._manner.patience / 3)
            await asyncio.sleep(min(pause, max(0, leave_at - loop.time())))
            socket.send('{"type":"ping"}')
        self._trace(self.name, "silent", "")
        self._stats.counts["given_up_silent"] += 1
        socket.abort()

    async def _listen(self, socket: WebSocket) -> None:
        first = self._decode(await socket.receive())
        if first["type"] != "connected" or first["user"]["id"] != self.name:
            raise Broken(f"the first frame is {first}")
        self._failures = 0
        self._session = first.get("session", self._session)
        for name in self.rooms:
            self._join(name)
        while True:
            frame = self._decode(await socket.receive())
            if frame["type"] == "reconnect":
                self._after = frame["after_ms"] / 1000
            self._take(frame)
            self._changed()

    def _join(self, name: str) -> None:
        cursor = self.rooms[name].view.cursor
        since = {"since": cursor._asdict()} if cursor else {}
        self._send({"type": "join", "room": name, **since})

    def _give_up(self, why: str) -> None:
        self.closed_for_good = True
        self._protocol(f"the connection is over for good: {why}")
        self._changed()

    def _protocol(self, what: str, room: Room | None = None) -> None:
        view = room.view if room else View(self.name, "-")
        self._judge.wrong(Kind.PROTOCOL, view, view.cursor, what)

    # Frames.

    def _decode(self, raw: str | bytes) -> dict[str, Any]:
        if isinstance(raw, str):
            frame = json.loads(raw)
        else:
            (length,) = struct.unpack_from("!H", raw)
            frame = json.loads(raw[2 : 2 + length])
            frame["content"] = raw[2 + length :]
        self._trace(self.name, "<", frame)
        for entry in frame.get("history", []):
            if entry.get("encoding") == "base64":
                entry["content"] = base64.b64decode(entry["content"], validate=True)
        return frame

    def _send(self, frame: dict[str, Any]) -> None:
        """Sends a frame, a binary one where its content is bytes."""
        self._trace(self.name, ">", frame)
        if self._socket is None:
            return
        if isinstance(frame.get("content"), bytes):
            header = {name: value for name, value in frame.items() if name != "content"}
            text = json.dumps(header).encode()
            self._socket.send(struct.pack("!H", len(text)) + text + frame["content"])
        else:
            self._socket.send(json.dumps(frame))

    def _take(self, frame: dict[str, Any]) -> None:
        kind, room = frame["type"], self.rooms.get(frame.get("room", ""))
        if kind == "error":
            self._refused(frame, room)
        elif kind not in ("joined", "message", "reset", "ack"):
            # Everything else is at most once, or unknown.
            return
        elif room is None:
            self._protocol(f"a frame of no room of ours: {frame}")
        elif kind == "joined":
            self._judge.joined(room.view, frame)
            room.joined, room.recovers_to = True, Position.of(frame)
        elif not room.joined:
            self._protocol(f"not joined, and got {frame}", room)
        elif kind == "message":
            self._judge.message(room.view, frame)
            self._delivery()
        elif kind == "reset":
            self._judge.reset(room.view, frame)
        else:
            self._acknowledged(room, frame)
        if room and room.joined and not room.is_open:
            self._go_on_sending(room)

    def _delivery(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._delivered_at is not None:
            quiet = now - self._delivered_at
            self._stats.quiet_longest = max(self._stats.quiet_longest, quiet)
        self._delivered_at = now

    def _acknowledged(self, room: Room, frame: dict[str, Any]) -> None:
        message = room.pending.pop(frame["id"], None)
        in_stream = message is not None and not message.echo and not frame["duplicate"]
        self._judge.ack(room.view, frame, in_stream)
        if message:
            after = asyncio.get_running_loop().time() - message.begun_at
            self._stats.ack_slowest = max(self._stats.ack_slowest, after)

    def _refused(self, frame: dict[str, Any], room: Room | None) -> None:
        """A send or a join was refused; for the time being, or else that is wrong."""
        code, what = frame["code"], frame.get("for")
        self._stats.counts[f"refused_{code}"] += 1
        if room is None or code not in SEND_AGAIN or "retry_after_ms" not in frame:
            self._protocol(f"unexpected: {frame}", room)
            return
        loop, socket = asyncio.get_running_loop(), self._socket
        message = room.pending.get(frame.get("id", ""))

        def again() -> None:
            if self._socket is not socket:
                return
            if what == "join":
                self._join(room.view.room)
            elif message and message.id in room.pending and room.is_open:
                self._transmit(room, message)

        loop.call_later(frame["retry_after_ms"] / 1000, again)

    # Sending.

    def _go_on_sending(self, room: Room) -> None:
        """When the recovery is complete: an own id seen in it is acknowledged, others go again."""
        cursor, target = room.view.cursor, room.recovers_to
        if cursor is None or target is None:
            return
        if cursor.epoch == target.epoch and cursor.seq < target.seq:
            return
        room.is_open = True
        for message in list(room.pending.values()):
            seen = room.view.places.get(message.id)
            if seen:
                del room.pending[message.id]
                epoch, seq = next(iter(seen.items()))
                self._judge.taken(room.view, message.id, Position(epoch, seq))
            else:
                self._transmit(room, message)

    def _transmit(self, room: Room, message: Message) -> None:
        name = room.view.room
        self._judge.transmitted(room.view, message.id, message.content, self._connections)
        frame = {"type": "message", "room": name, "id": message.id, "content": message.content}
        self._send(frame if message.echo else frame | {"echo": False})

    def pending(self) -> int:
        return sum(len(room.pending) for room in self.rooms.values())

    def say(self, name: str, text: str) -> str | None:
        """Has something to say in a room. Returns its id; nothing where too much waits already."""
        if self.pending() >= self._manner.window:
            return None
        padded = text.ljust(self._manner.content_bytes, ".")
        content: Any = {"by": self.name, "text": padded}
        if self._rng.random() < self._manner.binary:
            content = padded.encode()
        id = str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
        echo = self._rng.random() >= self._manner.no_echo
        message = Message(id, content, echo, asyncio.get_running_loop().time())
        room = self.rooms[name]
        room.pending[id] = message
        if room.is_open:
            self._transmit(room, message)
        return id
