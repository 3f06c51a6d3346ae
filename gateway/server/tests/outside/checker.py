#!/usr/bin/env python3
"""Checks gateways independently: members send messages, and every frame is checked by `chat.v1`.

It shares no code with the project: Python 3.11, standard library only. All members join all rooms,
each over one connection to one of the URLs. They send at a rate for a time, reconnect whenever a
connection ends, resume, and send unacknowledged messages again. At the end the checker waits until
every member has received every message, and checks for losses.

Each violation is printed to standard error as it is found, with room, position and member. The last
line of standard output is one JSON object with the counts.

exit status:
  0  clean
  1  a violation, or messages outstanding after the time limit
  2  usage
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from delivery import DeliveryChecker, Kind, MemberView, Violation
from member import Member, Profile, Stats


def is_ws_url(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    if parts.scheme != "ws" or not parts.hostname or parts.query:
        raise argparse.ArgumentTypeError(f"not a ws:// URL without query: {text}")
    return text


def at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def above_zero(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def fraction(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return number


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("urls", nargs="+", type=is_ws_url, metavar="URL", help="ws://host:port/ws of a gateway")
    add("--members", type=at_least_one, default=6, help="number of members (default 6)")
    add("--rooms", type=at_least_one, default=3, help="number of rooms (default 3)")
    add("--prefix", default="outside", help="prefix of all ids (default outside)")
    add("--rate", type=above_zero, default=100, help="messages per second (default 100)")
    add("--seconds", type=above_zero, default=10, help="duration of sending (default 10)")
    add("--until-eof", action="store_true", help="send until standard input ends")
    add("--settle", type=above_zero, default=60, help="time limit of the end (default 60)")
    add("--idle-timeout", type=above_zero, default=Profile.idle_timeout,
        help="seconds without a frame after which a member reconnects (default 3)")  # fmt: skip
    add("--patient", type=int, default=0, help="number of members without an idle timeout")
    add("--reconnect-interval", type=float, default=0, metavar="SECONDS",
        help="mean time until a member disconnects and reconnects (default: never)")  # fmt: skip
    add("--no-echo", type=fraction, default=Profile.no_echo,
        help="fraction of messages with echo:false (default 0.2)")  # fmt: skip
    add("--binary", type=fraction, default=Profile.binary,
        help="fraction of messages as binary frames (default 0.1)")  # fmt: skip
    add("--content-bytes", type=int, default=Profile.content_bytes,
        help="minimum length of a text (default 40)")  # fmt: skip
    add("--seed", type=int, help="seed of the random numbers (default: random)")
    add("--progress", action="store_true", help="also print the counts every 50 ms")
    add("--trace", metavar="FILE", help="write every frame of every member to this file")
    return parser.parse_args()


def print_violation(violation: Violation) -> None:
    print(violation, file=sys.stderr, flush=True)


class Run:
    """A run with all its members."""

    def __init__(self, options: argparse.Namespace, trace: Callable[[str, str, Any], None]) -> None:
        self.options = options
        self.checker = DeliveryChecker(print_violation)
        self.stats = Stats()
        self.started = time.monotonic()
        self.rng = random.Random(options.seed)
        self._change = asyncio.Event()
        profile = Profile(
            idle_timeout=options.idle_timeout,
            no_echo=options.no_echo,
            binary=options.binary,
            content_bytes=options.content_bytes,
            reconnect_interval=options.reconnect_interval,
        )
        self.rooms = [f"{options.prefix}-{number}" for number in range(options.rooms)]
        self.members = []
        for number in range(options.members):
            at = number % len(options.urls)
            is_patient = number < options.patient
            self.members.append(
                Member(
                    f"{options.prefix}-member-{number}",
                    options.urls[at:] + options.urls[:at],
                    self.rooms,
                    self.checker,
                    self.stats,
                    replace(profile, idle_timeout=3600.0) if is_patient else profile,
                    random.Random(self.rng.random()),
                    self._change.set,
                    trace,
                )
            )

    async def until(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Waits until a condition holds, or for `seconds`. Returns whether it holds."""
        try:
            async with asyncio.timeout(seconds):
                while not holds():
                    self._change.clear()
                    await self._change.wait()
            return True
        except TimeoutError:
            return False

    async def run(self) -> bool:
        """Runs to the end. Returns whether there was no violation."""
        tasks = [asyncio.create_task(member.run()) for member in self.members]
        if self.options.progress:
            tasks.append(asyncio.create_task(self._progress()))
        views = self.checker.views.values()
        if await self.until(lambda: all(view.cursor for view in views), self.options.settle):
            await self._send_messages()
            await self._settle()
        else:
            self._unsettled(lambda view: view.cursor is None, "never joined")
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        self.checker.finish()
        return not self.checker.violations

    async def _send_messages(self) -> None:
        """Sends messages at the rate, from random members to random rooms."""
        end = asyncio.create_task(self._end_of_sending())
        loop, number = asyncio.get_running_loop(), 0
        due = loop.time()
        while not end.done():
            self.rng.choice(self.members).send(self.rng.choice(self.rooms), f"number {number}")
            number += 1
            # After a delay, at most one second of messages is sent at once.
            due = max(due + 1 / self.options.rate, loop.time() - 1)
            await asyncio.sleep(due - loop.time())

    async def _end_of_sending(self) -> None:
        if not self.options.until_eof:
            await asyncio.sleep(self.options.seconds)
            return
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        await reader.read()

    async def _settle(self) -> None:
        """Waits for all acks. A last message per room then shows that every member is done."""
        if not await self.until(self._all_acknowledged, self.options.settle):
            rooms = {(m.name, name): room for m in self.members for name, room in m.rooms.items()}
            self._unsettled(lambda view: bool(rooms[view.member, view.room].pending), "no ack")
            return
        last = [(room, self.members[0].send(room, "last")) for room in self.rooms]

        def all_have_last() -> bool:
            return self._all_acknowledged() and all(
                self.checker.has_received(view, id)
                for room, id in last
                for view in self.checker.views.values()
                if id and view.room == room
            )

        if not await self.until(all_have_last, self.options.settle):
            ids = {room: id or "" for room, id in last}
            self._unsettled(
                lambda view: not self.checker.has_received(view, ids[view.room]),
                "last message not received",
            )

    def _all_acknowledged(self) -> bool:
        return all(member.pending() == 0 for member in self.members)

    def _unsettled(self, concerns: Callable[[MemberView], bool], fault: str) -> None:
        for view in self.checker.views.values():
            if concerns(view):
                detail = f"{fault} within {self.options.settle} s"
                self.checker.violation(Kind.UNSETTLED, view, view.cursor, detail)

    async def _progress(self) -> None:
        while True:
            joined = all(view.cursor for view in self.checker.views.values())
            counts = {"joined": joined} | self.counts()
            print(json.dumps(counts), flush=True)
            await asyncio.sleep(0.05)

    def counts(self) -> dict[str, Any]:
        checker, stats = self.checker, self.stats
        kinds = {kind.value: 0 for kind in Kind}
        for violation in checker.violations:
            kinds[violation.kind.value] += 1
        names = ["acknowledged", "delivered", "resets", "recovered_false", "skipped", "reappended"]
        names.append("histories_over_epochs")
        return {
            "members": len(self.members),
            "rooms": len(self.rooms),
            **{name: checker.counts[name] for name in names},
            "reasons": dict(checker.reasons),
            **kinds,
            "violations": len(checker.violations),
            "connections": stats.counts["connections"],
            **{name: count for name, count in stats.counts.items() if name != "connections"},
            "ack_latency_max_ms": round(stats.ack_latency_max * 1000),
            "delivery_pause_max_ms": round(stats.delivery_pause_max * 1000),
            "seconds": round(time.monotonic() - self.started, 1),
        }


def tracer(path: str | None) -> Callable[[str, str, Any], None]:
    if path is None:
        return lambda member, direction, frame: None
    file = open(path, "w", encoding="utf-8", buffering=1)
    start = time.monotonic()

    def trace(member: str, direction: str, frame: Any) -> None:
        text = frame if isinstance(frame, str) else json.dumps(frame, default=repr)
        file.write(f"{time.monotonic() - start:.3f} {member} {direction} {text}\n")

    return trace


async def main() -> int:
    options = arguments()
    run = Run(options, tracer(options.trace))
    clean = await run.run()
    print(json.dumps(run.counts()), flush=True)
    return 0 if clean else 1


if __name__ == "__main__":
    if sys.version_info < (3, 11):
        print("checker.py: needs Python 3.11 or later", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
