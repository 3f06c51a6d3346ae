"""One member of some rooms: connects, resumes, sends, and reports every frame to the checker.

Written from the text of the protocol: back-off and close codes as it requires, `since` for each
room, and unacknowledged messages sent again with the same id if the recovery did not contain them.
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

from delivery import DeliveryChecker, Kind, MemberView, Position
from websocket import ConnectionClosed, HandshakeRejected, ProtocolError, WebSocket

PROTOCOL = "chat.v1"
BACK_OFF_BASE, BACK_OFF_CAP = 0.5, 30.0
# Time limits for the handshake and for the answer to a close frame.
HANDSHAKE_SECONDS, CLOSE_SECONDS = 5.0, 3.0
# Close codes after which a client reconnects by itself; after others it does not.
RECONNECT_CODES = {1001, 1005, 1006, 1011, 1012, 1013, 4002, 4003}
# Error codes after which a message is sent again with the same id.
TEMPORARY_ERRORS = {"unavailable", "overloaded", "rate_limited"}


@dataclass
class Message:
    """An unacknowledged message of a member."""

    id: str
    content: Any
    echo: bool
    created_at: float


@dataclass
class Room:
    """The state of a room: that of the current connection, and that which outlives it."""

    view: MemberView
    joined: bool = False
    # The end of the recovery; no message is sent before it.
    recovers_to: Position | None = None
    can_send: bool = False
    pending: dict[str, Message] = field(default_factory=dict)


@dataclass
class Profile:
    """The behaviour of members."""

    # Seconds without a frame after which a member closes its connection.
    idle_timeout: float = 3.0
    # Maximum number of unacknowledged messages in all rooms together.
    unacked_max: int = 64
    # Fractions of messages sent with `echo:false` and as binary frames.
    no_echo: float = 0.2
    binary: float = 0.1
    content_bytes: int = 40
    # Mean time in seconds until a member disconnects and reconnects; 0: never.
    reconnect_interval: float = 0.0


@dataclass
class Stats:
    """Statistics that are not violations."""

    counts: Counter[str] = field(default_factory=Counter)
    ack_latency_max: float = 0.0
    delivery_pause_max: float = 0.0


class Member:
    def __init__(
        self,
        name: str,
        urls: list[str],
        rooms: list[str],
        checker: DeliveryChecker,
        stats: Stats,
        profile: Profile,
        rng: random.Random,
        changed: Callable[[], None],
        trace: Callable[[str, str, Any], None],
    ) -> None:
        self.name = name
        self.rooms = {room: Room(checker.view(name, room)) for room in rooms}
        self.ended = False
        self._urls = urls
        self._checker = checker
        self._stats = stats
        self._profile = profile
        self._rng = rng
        self._changed = changed
        self._trace = trace
        self._socket: WebSocket | None = None
        self._connections = 0
        self._session: str | None = None
        self._failures = 0
        self._delivered_at: float | None = None
        # The delay that the last `reconnect` requested, in seconds.
        self._after = 0.0

    # Connections.

    async def run(self) -> None:
        """Reconnects and resumes until it is cancelled."""
        url = self._urls[0]
        while not self.ended:
            wait = await self._run_connection(url)
            # Full jitter.
            most = min(BACK_OFF_CAP, BACK_OFF_BASE * 2 ** min(self._failures, 10))
            self._failures += 1
            await asyncio.sleep(max(wait, self._rng.uniform(0, most)))
            url = self._rng.choice(self._urls)

    async def _run_connection(self, url: str) -> float:
        """Runs one connection. Returns the minimum delay that the server requests."""
        query = {"user": self.name} | ({"session": self._session} if self._session else {})
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                socket = await WebSocket.open(f"{url}?{urllib.parse.urlencode(query)}", PROTOCOL)
        except HandshakeRejected as rejected:
            self._trace(self.name, "rejected", f"{url} {rejected}")
            self._stats.counts["handshakes_rejected"] += 1
            if rejected.status < 500 and rejected.status != 429:
                self._end(str(rejected))
            return rejected.retry_after
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            self._trace(self.name, "no connection", f"{url} {error!r}")
            return 0
        except (ProtocolError, ValueError, IndexError) as error:
            self._end(str(error))
            return 0
        self._connections += 1
        self._stats.counts["connections"] += 1
        self._socket = socket
        watch = asyncio.create_task(self._watch(socket))
        self._after = 0.0
        try:
            await self._receive(socket)
        except ConnectionClosed as closed:
            self._trace(self.name, "closed", f"{url} {closed}")
            if closed.code not in RECONNECT_CODES and not socket.closed_here():
                self._end(str(closed))
        except (ProtocolError, ValueError, KeyError, TypeError) as error:
            self._protocol(f"{type(error).__name__}: {error}")
        finally:
            watch.cancel()
            self._socket = None
            socket.abort()
            for room in self.rooms.values():
                room.joined = room.can_send = False
        return self._after

    async def _watch(self, socket: WebSocket) -> None:
        """Sends pings. Closes the connection when it is idle for too long, or at a random time."""
        loop = asyncio.get_running_loop()
        mean = self._profile.reconnect_interval
        leave_at = loop.time() + self._rng.expovariate(1 / mean) if mean else float("inf")
        while loop.time() - socket.received_at < self._profile.idle_timeout:
            if loop.time() >= leave_at:
                self._trace(self.name, "disconnects", "")
                self._stats.counts["disconnects"] += 1
                # Abruptly, or with a close frame.
                if self._rng.random() < 0.5:
                    socket.close()
                    await asyncio.sleep(CLOSE_SECONDS)
                socket.abort()
                return
            pause = min(1.0, self._profile.idle_timeout / 3)
            await asyncio.sleep(min(pause, max(0, leave_at - loop.time())))
            socket.send('{"type":"ping"}')
        self._trace(self.name, "idle timeout", "")
        self._stats.counts["idle_timeouts"] += 1
        socket.abort()

    async def _receive(self, socket: WebSocket) -> None:
        first = self._decode(await socket.receive())
        if first["type"] != "connected" or first["user"]["id"] != self.name:
            raise ProtocolError(f"the first frame is {first}")
        self._failures = 0
        self._session = first.get("session", self._session)
        for name in self.rooms:
            self._join(name)
        while True:
            frame = self._decode(await socket.receive())
            if frame["type"] == "reconnect":
                self._after = frame["after_ms"] / 1000
            self._on_frame(frame)
            self._changed()

    def _join(self, name: str) -> None:
        cursor = self.rooms[name].view.cursor
        since = {"since": cursor._asdict()} if cursor else {}
        self._send({"type": "join", "room": name, **since})

    def _end(self, why: str) -> None:
        self.ended = True
        self._protocol(f"the connection ended for good: {why}")
        self._changed()

    def _protocol(self, detail: str, room: Room | None = None) -> None:
        view = room.view if room else MemberView(self.name, "-")
        self._checker.violation(Kind.PROTOCOL, view, view.cursor, detail)

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
        """Sends a frame; a binary frame if its content is bytes."""
        self._trace(self.name, ">", frame)
        if self._socket is None:
            return
        if isinstance(frame.get("content"), bytes):
            header = {name: value for name, value in frame.items() if name != "content"}
            text = json.dumps(header).encode()
            self._socket.send(struct.pack("!H", len(text)) + text + frame["content"])
        else:
            self._socket.send(json.dumps(frame))

    def _on_frame(self, frame: dict[str, Any]) -> None:
        kind, room = frame["type"], self.rooms.get(frame.get("room", ""))
        if kind == "error":
            self._on_error(frame, room)
        elif kind not in ("joined", "message", "reset", "ack"):
            # All other frames are at most once, or unknown.
            return
        elif room is None:
            self._protocol(f"a frame of a room that was not joined: {frame}")
        elif kind == "joined":
            self._checker.joined(room.view, frame)
            room.joined, room.recovers_to = True, Position.of(frame)
        elif not room.joined:
            self._protocol(f"received before joined: {frame}", room)
        elif kind == "message":
            self._checker.message(room.view, frame)
            self._on_delivery()
        elif kind == "reset":
            self._checker.reset(room.view, frame)
        else:
            self._on_ack(room, frame)
        if room and room.joined and not room.can_send:
            self._resume_sending(room)

    def _on_delivery(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._delivered_at is not None:
            pause_length = now - self._delivered_at
            self._stats.delivery_pause_max = max(self._stats.delivery_pause_max, pause_length)
        self._delivered_at = now

    def _on_ack(self, room: Room, frame: dict[str, Any]) -> None:
        message = room.pending.pop(frame["id"], None)
        in_stream = message is not None and not message.echo and not frame["duplicate"]
        self._checker.ack(room.view, frame, in_stream)
        if message:
            after = asyncio.get_running_loop().time() - message.created_at
            self._stats.ack_latency_max = max(self._stats.ack_latency_max, after)

    def _on_error(self, frame: dict[str, Any], room: Room | None) -> None:
        """A message or a join was rejected. Only temporary errors are expected."""
        code, frame_type = frame["code"], frame.get("for")
        self._stats.counts[f"rejected_{code}"] += 1
        if room is None or code not in TEMPORARY_ERRORS or "retry_after_ms" not in frame:
            self._protocol(f"unexpected: {frame}", room)
            return
        loop, socket = asyncio.get_running_loop(), self._socket
        message = room.pending.get(frame.get("id", ""))

        def retry() -> None:
            if self._socket is not socket:
                return
            if frame_type == "join":
                self._join(room.view.room)
            elif message and message.id in room.pending and room.can_send:
                self._send_message(room, message)

        loop.call_later(frame["retry_after_ms"] / 1000, retry)

    # Sending.

    def _resume_sending(self, room: Room) -> None:
        """Once the recovery is complete: own ids in it are acknowledged, the others sent again."""
        cursor, target = room.view.cursor, room.recovers_to
        if cursor is None or target is None:
            return
        if cursor.epoch == target.epoch and cursor.seq < target.seq:
            return
        room.can_send = True
        for message in list(room.pending.values()):
            seen = room.view.numbers_of.get(message.id)
            if seen:
                del room.pending[message.id]
                epoch, seq = next(iter(seen.items()))
                self._checker.mark_acknowledged(room.view, message.id, Position(epoch, seq))
            else:
                self._send_message(room, message)

    def _send_message(self, room: Room, message: Message) -> None:
        name = room.view.room
        self._checker.on_sent(room.view, message.id, message.content, self._connections)
        frame = {"type": "message", "room": name, "id": message.id, "content": message.content}
        self._send(frame if message.echo else frame | {"echo": False})

    def pending(self) -> int:
        return sum(len(room.pending) for room in self.rooms.values())

    def send(self, name: str, text: str) -> str | None:
        """Sends a message to a room. Returns its id, or `None` if too many are unacknowledged."""
        if self.pending() >= self._profile.unacked_max:
            return None
        padded = text.ljust(self._profile.content_bytes, ".")
        content: Any = {"by": self.name, "text": padded}
        if self._rng.random() < self._profile.binary:
            content = padded.encode()
        id = str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
        echo = self._rng.random() >= self._profile.no_echo
        message = Message(id, content, echo, asyncio.get_running_loop().time())
        room = self.rooms[name]
        room.pending[id] = message
        if room.can_send:
            self._send_message(room, message)
        return id
