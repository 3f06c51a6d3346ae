#!/usr/bin/env python3
"""Checks gateways from outside: members talk in rooms, and every frame is held against `chat.v1`.

A client of its own, which shares no code with the project's: Python 3.11, standard library only.
All members join all rooms, each over one connection to any of the URLs. They talk at a rate for a
time, come back from whatever happens to their connections, resume, and send again what was not
acknowledged. When they are done it waits until everybody has everything, and judges.

Each violation goes to standard error as it is found, with room, position and member. The last line
of standard output is one JSON object with the counts.

exit status:
  0  clean
  1  a violation, or not settled in time
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

from judge import Judge, Kind, Violation
from member import Manner, Member, Stats


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


def share(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return number


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("urls", nargs="+", type=is_ws_url, metavar="URL", help="ws://host:port/ws of a gateway")
    add("--members", type=at_least_one, default=6, help="how many (default 6)")
    add("--rooms", type=at_least_one, default=3, help="how many (default 3)")
    add("--prefix", default="outside", help="of the names of members and rooms (default outside)")
    add("--rate", type=above_zero, default=100, help="messages a second (default 100)")
    add("--seconds", type=above_zero, default=10, help="for how long they talk (default 10)")
    add("--until-eof", action="store_true", help="they talk until standard input ends instead")
    add("--settle", type=above_zero, default=60, help="seconds to wait at the end (default 60)")
    add("--patience", type=above_zero, default=Manner.patience,
        help="seconds of silence after which a connection is given up (default 3)")  # fmt: skip
    add("--stay", type=int, default=0, help="so many members never give up a silent connection")
    add("--roam", type=float, default=0, metavar="SECONDS",
        help="mean time until a member leaves and comes back (default: never)")  # fmt: skip
    add("--no-echo", type=share, default=Manner.no_echo, help="share with echo:false (default 0.2)")
    add("--binary", type=share, default=Manner.binary, help="share as binary frames (default 0.1)")
    add("--content-bytes", type=int, default=Manner.content_bytes, help="of a text (default 40)")
    add("--seed", type=int, help="of everything that is random here (default: another each time)")
    add("--progress", action="store_true", help="print the counts so far every 50 ms as well")
    add("--trace", metavar="FILE", help="write every frame of every member there")
    return parser.parse_args()


class Checker:
    """All members of a run."""

    def __init__(self, options: argparse.Namespace, trace: Callable[[str, str, Any], None]) -> None:
        self.options = options
        self.judge = Judge(lambda violation: print(violation, file=sys.stderr, flush=True))
        self.stats = Stats()
        self.started = time.monotonic()
        self.rng = random.Random(options.seed)
        self._change = asyncio.Event()
        manner = Manner(
            patience=options.patience,
            no_echo=options.no_echo,
            binary=options.binary,
            content_bytes=options.content_bytes,
            roam=options.roam,
        )
        self.rooms = [f"{options.prefix}-{number}" for number in range(options.rooms)]
        self.members = []
        for number in range(options.members):
            at = number % len(options.urls)
            stays = number < options.stay
            self.members.append(
                Member(
                    f"{options.prefix}-member-{number}",
                    options.urls[at:] + options.urls[:at],
                    self.rooms,
                    self.judge,
                    self.stats,
                    replace(manner, patience=3600.0) if stays else manner,
                    random.Random(self.rng.random()),
                    self._change.set,
                    trace,
                )
            )

    async def until(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Waits for something to hold, so long at most. Whether it does."""
        try:
            async with asyncio.timeout(seconds):
                while not holds():
                    self._change.clear()
                    await self._change.wait()
            return True
        except TimeoutError:
            return False

    async def run(self) -> bool:
        """The whole run. Whether it was clean."""
        tasks = [asyncio.create_task(member.run()) for member in self.members]
        if self.options.progress:
            tasks.append(asyncio.create_task(self._progress()))
        views = self.judge.views.values()
        if await self.until(lambda: all(view.cursor for view in views), self.options.settle):
            await self._talk()
            await self._settle()
        else:
            self._unsettled(lambda view: view.cursor is None, "never joined")
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        self.judge.finish()
        return not self.judge.violations

    async def _talk(self) -> None:
        """Messages at the rate, in whichever room by whomever."""
        end = asyncio.create_task(self._end_of_talk())
        loop, number = asyncio.get_running_loop(), 0
        due = loop.time()
        while not end.done():
            self.rng.choice(self.members).say(self.rng.choice(self.rooms), f"number {number}")
            number += 1
            # Who was held up does not make up for more than a second.
            due = max(due + 1 / self.options.rate, loop.time() - 1)
            await asyncio.sleep(due - loop.time())

    async def _end_of_talk(self) -> None:
        if not self.options.until_eof:
            await asyncio.sleep(self.options.seconds)
            return
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        await reader.read()

    async def _settle(self) -> None:
        """What was begun is acknowledged; then a last message shows that all are at the end."""
        if not await self.until(self._is_answered, self.options.settle):
            rooms = {(m.name, name): room for m in self.members for name, room in m.rooms.items()}
            self._unsettled(lambda view: bool(rooms[view.member, view.room].pending), "no ack")
            return
        last = [(room, self.members[0].say(room, "last")) for room in self.rooms]

        def has_last() -> bool:
            return self._is_answered() and all(
                self.judge.has(view, id)
                for room, id in last
                for view in self.judge.views.values()
                if id and view.room == room
            )

        if not await self.until(has_last, self.options.settle):
            ids = {room: id or "" for room, id in last}
            self._unsettled(lambda view: not self.judge.has(view, ids[view.room]), "not at the end")

    def _is_answered(self) -> bool:
        return all(member.pending() == 0 for member in self.members)

    def _unsettled(self, concerns: Callable[[Any], bool], what: str) -> None:
        for view in self.judge.views.values():
            if concerns(view):
                detail = f"{what} within {self.options.settle} s"
                self.judge.wrong(Kind.UNSETTLED, view, view.cursor, detail)

    async def _progress(self) -> None:
        while True:
            joined = all(view.cursor for view in self.judge.views.values())
            counts = {"joined": joined} | self.counts()
            print(json.dumps(counts), flush=True)
            await asyncio.sleep(0.05)

    def counts(self) -> dict[str, Any]:
        judge, stats = self.judge, self.stats
        kinds = {kind.value: 0 for kind in Kind}
        for violation in judge.violations:
            kinds[violation.kind.value] += 1
        names = ["acknowledged", "delivered", "resets", "recovered_false", "skipped", "again"]
        names.append("histories_over_epochs")
        return {
            "members": len(self.members),
            "rooms": len(self.rooms),
            **{name: judge.counts[name] for name in names},
            "reasons": dict(judge.reasons),
            **kinds,
            "violations": len(judge.violations),
            "connections": stats.counts["connections"],
            **{name: count for name, count in stats.counts.items() if name != "connections"},
            "ack_slowest_ms": round(stats.ack_slowest * 1000),
            "quiet_longest_ms": round(stats.quiet_longest * 1000),
            "seconds": round(time.monotonic() - self.started, 1),
        }


def tracer(path: str | None) -> Callable[[str, str, Any], None]:
    if path is None:
        return lambda member, direction, what: None
    file = open(path, "w", encoding="utf-8", buffering=1)
    start = time.monotonic()

    def trace(member: str, direction: str, what: Any) -> None:
        text = what if isinstance(what, str) else json.dumps(what, default=repr)
        file.write(f"{time.monotonic() - start:.3f} {member} {direction} {text}\n")

    return trace


async def main() -> int:
    options = arguments()
    checker = Checker(options, tracer(options.trace))
    clean = await checker.run()
    print(json.dumps(checker.counts()), flush=True)
    return 0 if clean else 1


if __name__ == "__main__":
    if sys.version_info < (3, 11):
        print("checker.py: needs Python 3.11 or later", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
