"""Checks the frames that members of rooms receive against the promises of protocol `chat.v1`.

Pure: no socket, no clock. Its methods take every send, and every `joined`, `message`, `reset` and
`ack` in the order in which a member received them. It checks these promises:

- within an epoch a member's numbers ascend by one: else a duplicate, disorder, or a gap;
- the epoch changes only by `reset` or `recovered:false`: else an unsignalled discontinuity;
- all members and acks agree on the entry at a position, and an id has one number in an epoch;
- every acknowledged message reaches every member, unless a discontinuity signalled to that member
  skipped its position;
- messages that one connection sent once are numbered in sending order, and no message gets a number
  below one that had been acknowledged to the same sender before.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Position(NamedTuple):
    """A position in a room's log. Epochs are compared for equality only."""

    epoch: str
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}:{self.seq}"

    @classmethod
    def of(cls, frame: dict[str, Any]) -> Position:
        return cls(frame["epoch"], frame["seq"])


class Kind(enum.Enum):
    """The violations that a server can commit. The value is the name of the count."""

    LOST = "lost"
    DUPLICATED = "duplicated"
    OUT_OF_ORDER = "out_of_order"
    GAP = "gaps"
    UNSIGNALLED = "unsignalled_discontinuities"
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
class SentMessage:
    """A message and its acknowledgements."""

    id: str
    room: str
    sender: str
    content: Any
    # The connections of the sender that it was sent on, one for each time.
    connections: list[int] = field(default_factory=list)
    # The highest number acknowledged to the sender before it was first sent, by epoch.
    acked_before: dict[str, int] = field(default_factory=dict)
    acks: dict[str, int] = field(default_factory=dict)
    # The position by which it is acknowledged: that of an ack, or in a recovery.
    acked_at: Position | None = None


@dataclass
class MemberView:
    """A room as one member received it."""

    member: str
    room: str
    cursor: Position | None = None
    received: set[Position] = field(default_factory=set)
    # The number at which each id was received, by epoch.
    numbers_of: dict[str, dict[str, int]] = field(default_factory=dict)
    # Signalled discontinuities: the positions before and after.
    discontinuities: list[tuple[Position, Position]] = field(default_factory=list)
    own_acked_top: dict[str, int] = field(default_factory=dict)
    own: list[SentMessage] = field(default_factory=list)

    def was_skipped(self, position: Position) -> bool:
        """Whether a discontinuity signalled to the member skipped a position."""
        for start, end in self.discontinuities:
            above = position.epoch == start.epoch and position.seq > start.seq
            below = position.epoch == end.epoch and position.seq <= end.seq
            if (above and below) if start.epoch == end.epoch else (above or below):
                return True
        # An epoch of which the member received nothing began and ended within a discontinuity.
        epochs = {position.epoch for pair in self.discontinuities for position in pair}
        return bool(self.discontinuities) and position.epoch not in epochs


class DeliveryChecker:
    """The frames of all members. `report` is called with each violation as it is found."""

    def __init__(self, report: Callable[[Violation], None] = lambda violation: None) -> None:
        self.violations: list[Violation] = []
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.sent: dict[str, SentMessage] = {}
        self.views: dict[tuple[str, str], MemberView] = {}
        self._report = report
        self._at: dict[tuple[str, Position], str] = {}
        self._numbers: dict[tuple[str, str], int] = {}

    def view(self, member: str, room: str) -> MemberView:
        return self.views.setdefault((member, room), MemberView(member, room))

    def violation(
        self, kind: Kind, view: MemberView, position: Position | None, detail: str
    ) -> None:
        violation = Violation(kind, view.room, position, view.member, detail)
        self.violations.append(violation)
        self._report(violation)

    # Frames that a member sends.

    def on_sent(self, view: MemberView, id: str, content: Any, connection: int) -> None:
        """A message was sent, for the first time or again, on the sender's nth connection."""
        if id not in self.sent:
            acked = dict(view.own_acked_top)
            sent = SentMessage(id, view.room, view.member, content, acked_before=acked)
            self.sent[id] = sent
            view.own.append(sent)
        self.sent[id].connections.append(connection)

    # Frames that a member receives.

    def joined(self, view: MemberView, frame: dict[str, Any]) -> None:
        top, history, since = Position.of(frame), frame["history"], view.cursor
        recovered, reason = frame["recovered"], frame.get("reason")
        first = Position.of(history[0]) if history else None
        start = Position(first.epoch, first.seq - 1) if first else top
        if since is None:
            if recovered or reason:
                detail = f"recovered:{recovered}, {reason} without since"
                self.violation(Kind.PROTOCOL, view, top, detail)
            view.cursor = start
        elif recovered:
            if top.epoch != since.epoch or top.seq < since.seq:
                self.violation(Kind.UNSIGNALLED, view, top, f"recovered:true from {since}")
        else:
            self.counts["recovered_false"] += 1
            self._discontinuity(view, start, reason, ("log_trimmed", "log_lost", "ahead"))
        for entry in history:
            self.message(view, entry, reloaded=not recovered)
        if not recovered and view.cursor != top:
            if view.cursor and view.cursor.seq == top.seq:
                self._history_over_epochs(view, top)
            else:
                self.violation(Kind.GAP, view, top, f"the history ends at {view.cursor}")
            view.cursor = top

    def reset(self, view: MemberView, frame: dict[str, Any]) -> None:
        self.counts["resets"] += 1
        if view.cursor is None:
            self.violation(Kind.PROTOCOL, view, Position.of(frame), "reset before joined")
        reasons = ("log_lost", "log_trimmed")
        self._discontinuity(view, Position.of(frame), frame.get("reason"), reasons)

    def _discontinuity(
        self, view: MemberView, to: Position, reason: Any, reasons: tuple[str, ...]
    ) -> None:
        if reason not in reasons:
            self.violation(Kind.PROTOCOL, view, to, f"a discontinuity with the reason {reason!r}")
        self.reasons[str(reason)] += 1
        if view.cursor is not None:
            view.discontinuities.append((view.cursor, to))
        view.cursor = to

    def message(self, view: MemberView, frame: dict[str, Any], reloaded: bool = False) -> None:
        """An entry was received; `reloaded` if it is of a history after a discontinuity."""
        position, id = Position.of(frame), frame["id"]
        self.counts["delivered"] += 1
        self._advance(view, position, id, reloaded)
        sent = self.sent.get(id)
        if sent is None:
            self.violation(Kind.PROTOCOL, view, position, f"no member sent {id}")
            return
        content = (view.room, frame["from"]["id"], frame["content"])
        if content != (sent.room, sent.sender, sent.content):
            detail = f"{id} differs from the message sent: {frame}"
            self.violation(Kind.DISAGREEMENT, view, position, detail)

    def ack(self, view: MemberView, frame: dict[str, Any], in_stream: bool) -> None:
        """An own message was acknowledged; `in_stream` if the ack takes the place of its copy."""
        position, id = Position.of(frame), frame["id"]
        sent = self.sent.get(id)
        if sent is None or sent.sender != view.member or sent.room != view.room:
            detail = f"an ack for {id}, which this member did not send"
            self.violation(Kind.PROTOCOL, view, position, detail)
            return
        earlier = sent.acks.setdefault(position.epoch, position.seq)
        if earlier != position.seq:
            detail = f"{id} was acknowledged at {earlier} before"
            self.violation(Kind.ACK_MOVED, view, position, detail)
        if in_stream:
            self.counts["delivered"] += 1
            self._advance(view, position, id, reloaded=False)
        else:
            self._check_agreement(view, position, id)
        self.mark_acknowledged(view, id, position)

    def mark_acknowledged(self, view: MemberView, id: str, position: Position) -> None:
        """An own message is acknowledged."""
        sent = self.sent[id]
        if sent.acked_at is None:
            self.counts["acknowledged"] += 1
            sent.acked_at = position
        if position.seq <= sent.acked_before.get(position.epoch, 0):
            earlier = sent.acked_before[position.epoch]
            detail = f"{id} was sent after {earlier} had been acknowledged"
            self.violation(Kind.SENDER_ORDER, view, position, detail)
        top = view.own_acked_top.get(position.epoch, 0)
        view.own_acked_top[position.epoch] = max(top, position.seq)

    def _advance(self, view: MemberView, position: Position, id: str, reloaded: bool) -> None:
        """Moves a member to a position, and checks that it is the next one."""
        cursor = view.cursor
        if cursor is None:
            self.violation(Kind.PROTOCOL, view, position, "before joined")
        elif reloaded and position.epoch != cursor.epoch and position.seq == cursor.seq + 1:
            self._history_over_epochs(view, position)
        elif position.epoch != cursor.epoch:
            self.violation(Kind.UNSIGNALLED, view, position, f"after {cursor}")
        elif position in view.received and not reloaded:
            detail = f"received before; the cursor is {cursor}"
            self.violation(Kind.DUPLICATED, view, position, detail)
        elif position.seq <= cursor.seq:
            self.violation(Kind.OUT_OF_ORDER, view, position, f"after {cursor}")
        elif position.seq > cursor.seq + 1:
            self.violation(Kind.GAP, view, position, f"after {cursor}")
        if cursor is None or position.epoch != cursor.epoch or position.seq > cursor.seq:
            view.cursor = position
        view.received.add(position)
        numbers = view.numbers_of.setdefault(id, {})
        number = numbers.setdefault(position.epoch, position.seq)
        if number != position.seq:
            detail = f"{id} was received as number {number} before"
            self.violation(Kind.DUPLICATED, view, position, detail)
        elif len(numbers) > 1:
            self.counts["reappended"] += 1
        self._check_agreement(view, position, id)

    def _history_over_epochs(self, view: MemberView, to: Position) -> None:
        """A reloaded history began in an epoch that the one of `to` continues."""
        self.counts["histories_over_epochs"] += 1
        if view.cursor:
            view.discontinuities.append((view.cursor, Position(to.epoch, view.cursor.seq)))

    def _check_agreement(self, view: MemberView, position: Position, id: str) -> None:
        other = self._at.setdefault((view.room, position), id)
        if other != id:
            detail = f"{id} here, {other} for another member"
            self.violation(Kind.DISAGREEMENT, view, position, detail)
        number = self._numbers.setdefault((id, position.epoch), position.seq)
        if number != position.seq:
            detail = f"{id} has number {number} for another member"
            self.violation(Kind.DISAGREEMENT, view, position, detail)

    # The end.

    def has_received(self, view: MemberView, id: str) -> bool:
        """Whether a member received an id, or a signalled discontinuity skipped it."""
        if id in view.numbers_of:
            return True
        sent = self.sent.get(id)
        return bool(sent and sent.acked_at and view.was_skipped(sent.acked_at))

    def finish(self) -> None:
        """After the last frame: checks for lost messages and for the order of senders."""
        for sent in self.sent.values():
            if sent.acked_at is not None:
                self._check_reached(sent, sent.acked_at)
        for view in self.views.values():
            self._check_sending_order(view)

    def _check_reached(self, sent: SentMessage, at: Position) -> None:
        for view in self.views.values():
            if view.room != sent.room or sent.id in view.numbers_of:
                continue
            if view.was_skipped(at):
                self.counts["skipped"] += 1
            else:
                detail = f"{sent.id} of {sent.sender}, acknowledged, was never received"
                self.violation(Kind.LOST, view, at, detail)

    def _check_sending_order(self, view: MemberView) -> None:
        tops: dict[tuple[int, str], int] = {}
        for sent in view.own:
            if len(sent.connections) != 1 or sent.acked_at is None:
                # A message that was sent again is numbered when that succeeds.
                continue
            stream = (sent.connections[0], sent.acked_at.epoch)
            top = tops.get(stream, 0)
            if sent.acked_at.seq <= top:
                detail = f"{sent.id} was sent after the message with number {top}"
                self.violation(Kind.SENDER_ORDER, view, sent.acked_at, detail)
            tops[stream] = max(top, sent.acked_at.seq)
