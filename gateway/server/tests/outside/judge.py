"""Judges what members of rooms were given, against what protocol `chat.v1` promises.

Pure: no socket, no clock. It is told of every transmission, every `joined`, `message`, `reset` and
`ack` in the order in which a member got them, and holds every word of it against the promises:

- within an epoch a member's numbers ascend by one: else a repeat, disorder, or a hole;
- the epoch changes only by `reset` or `recovered:false`: else an unannounced break;
- all members and acks agree on what stands at a position, and an id has one number in an epoch;
- what was acknowledged reaches every member, unless a break announced to it jumped over its place;
- what one connection sent once gets its numbers in sending order, and nothing gets a number below
  one that had been acknowledged to the same sender before.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Position(NamedTuple):
    """A place in a room's log. Epochs are compared for equality only."""

    epoch: str
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}:{self.seq}"

    @classmethod
    def of(cls, frame: dict[str, Any]) -> Position:
        return cls(frame["epoch"], frame["seq"])


class Kind(enum.Enum):
    """What a server can do wrong. The value is the name of the count."""

    LOST = "lost"
    DUPLICATED = "duplicated"
    OUT_OF_ORDER = "out_of_order"
    HOLE = "holes"
    UNANNOUNCED = "unannounced_breaks"
    ACK_MOVED = "acks_with_two_positions"
    DISAGREEMENT = "disagreements"
    SENDER_ORDER = "sender_order"
    PROTOCOL = "protocol"
    UNSETTLED = "unsettled"


@dataclass(frozen=True)
class Violation:
    kind: Kind
    room: str
    position: Position | None
    member: str
    detail: str

    def __str__(self) -> str:
        where = f"room {self.room}, position {self.position}, member {self.member}"
        return f"{self.kind.value}: {where}: {self.detail}"


@dataclass
class Sent:
    """A message, from its sender's side."""

    id: str
    room: str
    sender: str
    content: Any
    # The sender's connections it went out on, once for each time.
    connections: list[int] = field(default_factory=list)
    # What had been acknowledged to the sender when it went out first: the highest, by epoch.
    floor: dict[str, int] = field(default_factory=dict)
    acks: dict[str, int] = field(default_factory=dict)
    # By what it counts as acknowledged: an ack, or its sight in a recovery.
    acked_at: Position | None = None


@dataclass
class View:
    """A room as one member sees it."""

    member: str
    room: str
    cursor: Position | None = None
    had: set[Position] = field(default_factory=set)
    # Where each id came, by epoch.
    places: dict[str, dict[str, int]] = field(default_factory=dict)
    # Announced breaks: from where to where.
    breaks: list[tuple[Position, Position]] = field(default_factory=list)
    own_top: dict[str, int] = field(default_factory=dict)
    own: list[Sent] = field(default_factory=list)

    def was_told_of(self, place: Position) -> bool:
        """Whether a break that was announced to the member jumped over a place."""
        for start, end in self.breaks:
            above = place.epoch == start.epoch and place.seq > start.seq
            below = place.epoch == end.epoch and place.seq <= end.seq
            if (above and below) if start.epoch == end.epoch else (above or below):
                return True
        # An epoch of which the member saw nothing came and went within one break.
        epochs = {place.epoch for pair in self.breaks for place in pair}
        return bool(self.breaks) and place.epoch not in epochs


class Judge:
    """What all members have seen. `report` is called with each violation when it is found."""

    def __init__(self, report: Callable[[Violation], None] = lambda violation: None) -> None:
        self.violations: list[Violation] = []
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.sent: dict[str, Sent] = {}
        self.views: dict[tuple[str, str], View] = {}
        self._report = report
        self._at: dict[tuple[str, Position], str] = {}
        self._numbers: dict[tuple[str, str], int] = {}

    def view(self, member: str, room: str) -> View:
        return self.views.setdefault((member, room), View(member, room))

    def wrong(self, kind: Kind, view: View, place: Position | None, detail: str) -> None:
        violation = Violation(kind, view.room, place, view.member, detail)
        self.violations.append(violation)
        self._report(violation)

    # What a member does.

    def transmitted(self, view: View, id: str, content: Any, connection: int) -> None:
        """A message went out, for the first time or again, on the sender's nth connection."""
        if id not in self.sent:
            sent = Sent(id, view.room, view.member, content, floor=dict(view.own_top))
            self.sent[id] = sent
            view.own.append(sent)
        self.sent[id].connections.append(connection)

    # What a member is given.

    def joined(self, view: View, frame: dict[str, Any]) -> None:
        top, history, since = Position.of(frame), frame["history"], view.cursor
        recovered, reason = frame["recovered"], frame.get("reason")
        first = Position.of(history[0]) if history else None
        start = Position(first.epoch, first.seq - 1) if first else top
        if since is None:
            if recovered or reason:
                detail = f"recovered:{recovered}, {reason} without since"
                self.wrong(Kind.PROTOCOL, view, top, detail)
            view.cursor = start
        elif recovered:
            if top.epoch != since.epoch or top.seq < since.seq:
                self.wrong(Kind.UNANNOUNCED, view, top, f"recovered:true from {since}")
        else:
            self.counts["recovered_false"] += 1
            self._break(view, start, reason, ("log_trimmed", "log_lost", "ahead"))
        for entry in history:
            self.message(view, entry, anew=not recovered)
        if not recovered and view.cursor != top:
            if view.cursor and view.cursor.seq == top.seq:
                self._former_epoch(view, top)
            else:
                self.wrong(Kind.HOLE, view, top, f"the history ends at {view.cursor}")
            view.cursor = top

    def reset(self, view: View, frame: dict[str, Any]) -> None:
        self.counts["resets"] += 1
        if view.cursor is None:
            self.wrong(Kind.PROTOCOL, view, Position.of(frame), "reset before joined")
        self._break(view, Position.of(frame), frame.get("reason"), ("log_lost", "log_trimmed"))

    def _break(self, view: View, to: Position, reason: Any, reasons: tuple[str, ...]) -> None:
        if reason not in reasons:
            self.wrong(Kind.PROTOCOL, view, to, f"a break with the reason {reason!r}")
        self.reasons[str(reason)] += 1
        if view.cursor is not None:
            view.breaks.append((view.cursor, to))
        view.cursor = to

    def message(self, view: View, frame: dict[str, Any], anew: bool = False) -> None:
        """An entry came; `anew` where the history is loaded again behind a break."""
        place, id = Position.of(frame), frame["id"]
        self.counts["delivered"] += 1
        self._step(view, place, id, anew)
        sent = self.sent.get(id)
        if sent is None:
            self.wrong(Kind.PROTOCOL, view, place, f"nobody sent {id}")
            return
        came = (view.room, frame["from"]["id"], frame["content"])
        if came != (sent.room, sent.sender, sent.content):
            self.wrong(Kind.DISAGREEMENT, view, place, f"{id} is not what was sent: {frame}")

    def ack(self, view: View, frame: dict[str, Any], in_stream: bool) -> None:
        """An own message was acknowledged; `in_stream` where that takes the place of its copy."""
        place, id = Position.of(frame), frame["id"]
        sent = self.sent.get(id)
        if sent is None or sent.sender != view.member or sent.room != view.room:
            self.wrong(Kind.PROTOCOL, view, place, f"an ack for {id}, which was not sent")
            return
        earlier = sent.acks.setdefault(place.epoch, place.seq)
        if earlier != place.seq:
            self.wrong(Kind.ACK_MOVED, view, place, f"{id} was acknowledged at {earlier} before")
        if in_stream:
            self.counts["delivered"] += 1
            self._step(view, place, id, anew=False)
        else:
            self._agree(view, place, id)
        self.taken(view, id, place)

    def taken(self, view: View, id: str, place: Position) -> None:
        """An own message counts as acknowledged."""
        sent = self.sent[id]
        if sent.acked_at is None:
            self.counts["acknowledged"] += 1
            sent.acked_at = place
        if place.seq <= sent.floor.get(place.epoch, 0):
            detail = f"{id} was sent when {sent.floor[place.epoch]} had been acknowledged"
            self.wrong(Kind.SENDER_ORDER, view, place, detail)
        view.own_top[place.epoch] = max(view.own_top.get(place.epoch, 0), place.seq)

    def _step(self, view: View, place: Position, id: str, anew: bool) -> None:
        """The stream of a member goes on to a place."""
        cursor = view.cursor
        if cursor is None:
            self.wrong(Kind.PROTOCOL, view, place, "before joined")
        elif anew and place.epoch != cursor.epoch and place.seq == cursor.seq + 1:
            self._former_epoch(view, place)
        elif place.epoch != cursor.epoch:
            self.wrong(Kind.UNANNOUNCED, view, place, f"behind {cursor}")
        elif place in view.had and not anew:
            self.wrong(Kind.DUPLICATED, view, place, f"came before; the stream is at {cursor}")
        elif place.seq <= cursor.seq:
            self.wrong(Kind.OUT_OF_ORDER, view, place, f"behind {cursor}")
        elif place.seq > cursor.seq + 1:
            self.wrong(Kind.HOLE, view, place, f"behind {cursor}")
        if cursor is None or place.epoch != cursor.epoch or place.seq > cursor.seq:
            view.cursor = place
        view.had.add(place)
        places = view.places.setdefault(id, {})
        number = places.setdefault(place.epoch, place.seq)
        if number != place.seq:
            self.wrong(Kind.DUPLICATED, view, place, f"{id} came as number {number} before")
        elif len(places) > 1:
            self.counts["again"] += 1
        self._agree(view, place, id)

    def _former_epoch(self, view: View, to: Position) -> None:
        """A history loaded anew began in an epoch that the one of `to` continues."""
        self.counts["histories_over_epochs"] += 1
        if view.cursor:
            view.breaks.append((view.cursor, Position(to.epoch, view.cursor.seq)))

    def _agree(self, view: View, place: Position, id: str) -> None:
        other = self._at.setdefault((view.room, place), id)
        if other != id:
            self.wrong(Kind.DISAGREEMENT, view, place, f"{id} here, {other} for another")
        number = self._numbers.setdefault((id, place.epoch), place.seq)
        if number != place.seq:
            self.wrong(Kind.DISAGREEMENT, view, place, f"{id} has number {number} for another")

    # The end.

    def has(self, view: View, id: str) -> bool:
        """Whether an id came to a member, or a break that it was told of jumped over it."""
        if id in view.places:
            return True
        sent = self.sent.get(id)
        return bool(sent and sent.acked_at and view.was_told_of(sent.acked_at))

    def finish(self) -> None:
        """When everything has come that will: what is missing, and the order of senders."""
        for sent in self.sent.values():
            if sent.acked_at is not None:
                self._reached_all(sent, sent.acked_at)
        for view in self.views.values():
            self._sending_order(view)

    def _reached_all(self, sent: Sent, at: Position) -> None:
        for view in self.views.values():
            if view.room != sent.room or sent.id in view.places:
                continue
            if view.was_told_of(at):
                self.counts["skipped"] += 1
            else:
                detail = f"{sent.id} of {sent.sender}, acknowledged, never came"
                self.wrong(Kind.LOST, view, at, detail)

    def _sending_order(self, view: View) -> None:
        tops: dict[tuple[int, str], int] = {}
        for sent in view.own:
            if len(sent.connections) != 1 or sent.acked_at is None:
                # What had to be sent again takes its place when it succeeds.
                continue
            stream = (sent.connections[0], sent.acked_at.epoch)
            top = tops.get(stream, 0)
            if sent.acked_at.seq <= top:
                detail = f"{sent.id} was sent behind what has number {top}"
                self.wrong(Kind.SENDER_ORDER, view, sent.acked_at, detail)
            tops[stream] = max(top, sent.acked_at.seq)
