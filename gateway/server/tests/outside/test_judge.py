"""The judge sees what it is there to see: each wrong, shown to it, is counted.

python3 -m unittest discover -s gateway/server/tests/outside
"""

from __future__ import annotations

import asyncio
import unittest
from typing import Any

import websocket
from judge import Judge, Kind

ANN, BOB, ROOM = "ann", "bob", "lobby"


def entry(epoch: str, seq: int, id: str, sender: str = ANN, content: str = "") -> dict[str, Any]:
    place = {"room": ROOM, "epoch": epoch, "seq": seq}
    return {"type": "message", "id": id, "from": {"id": sender}, "content": content or id} | place


def ack(epoch: str, seq: int, id: str, duplicate: bool = False) -> dict[str, Any]:
    place = {"room": ROOM, "epoch": epoch, "seq": seq}
    return {"type": "ack", "id": id, "duplicate": duplicate} | place


def joined(
    epoch: str, seq: int, recovered: bool = False, reason: str | None = None, *history: Any
) -> dict[str, Any]:
    outcome = {"recovered": recovered, "reason": reason, "history": list(history)}
    return {"type": "joined", "room": ROOM, "epoch": epoch, "seq": seq} | outcome


def reset(epoch: str, seq: int, reason: str = "log_lost") -> dict[str, Any]:
    return {"type": "reset", "room": ROOM, "epoch": epoch, "seq": seq, "reason": reason}


class Trace(unittest.TestCase):
    """Ann sends m1, m2 … m6 on her first connection; Ann and Bob have joined the empty room."""

    def setUp(self) -> None:
        self.judge = Judge()
        for member in (ANN, BOB):
            self.judge.joined(self.judge.view(member, ROOM), joined("a", 0))
        for number in range(1, 7):
            self.send(f"m{number}")

    def send(self, id: str, connection: int = 1) -> None:
        self.judge.transmitted(self.judge.view(ANN, ROOM), id, id, connection)

    def show(self, member: str, *frames: dict[str, Any], in_stream: bool = False) -> None:
        view = self.judge.view(member, ROOM)
        for frame in frames:
            match frame["type"]:
                case "joined":
                    self.judge.joined(view, frame)
                case "message":
                    self.judge.message(view, frame)
                case "reset":
                    self.judge.reset(view, frame)
                case "ack":
                    self.judge.ack(view, frame, in_stream)

    def verdict(self, *kinds: Kind) -> None:
        self.judge.finish()
        found = {violation.kind for violation in self.judge.violations}
        self.assertEqual(found, set(kinds), [str(violation) for violation in self.judge.violations])

    # What is right.

    def test_order_is_right(self) -> None:
        both = [entry("a", 1, "m1"), entry("a", 2, "m2")]
        self.show(ANN, ack("a", 1, "m1"), *both, ack("a", 2, "m2"))
        self.show(BOB, *both)
        self.verdict()
        self.assertEqual(self.judge.counts["delivered"], 4)

    def test_an_ack_without_echo_takes_the_place_of_the_copy(self) -> None:
        self.show(ANN, entry("a", 1, "m1"))
        self.show(ANN, ack("a", 2, "m2"), in_stream=True)
        self.show(ANN, entry("a", 3, "m3"))
        self.show(BOB, entry("a", 1, "m1"), entry("a", 2, "m2"), entry("a", 3, "m3"))
        self.verdict()

    def test_a_recovery_goes_on_where_it_was(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), joined("a", 2, True, None, entry("a", 2, "m2")))
        self.show(BOB, entry("a", 3, "m3"))
        self.verdict()

    def test_what_a_break_jumped_over_was_announced(self) -> None:
        self.show(ANN, *(entry("a", seq, f"m{seq}") for seq in (1, 2, 3)))
        self.show(ANN, *(ack("a", seq, f"m{seq}") for seq in (1, 2, 3)))
        self.show(BOB, entry("a", 1, "m1"), joined("b", 5, False, "log_lost", entry("b", 5, "m5")))
        self.verdict()
        self.assertEqual(self.judge.counts["skipped"], 2)

    def test_a_known_id_may_come_again_behind_a_reset(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), reset("b", 0), entry("b", 1, "m1"))
        self.verdict()
        self.assertEqual(self.judge.counts["again"], 1)

    def test_what_had_to_be_sent_again_takes_its_place_late(self) -> None:
        self.send("m1", connection=2)
        both = [entry("a", 1, "m2"), entry("a", 2, "m1")]
        self.show(ANN, *both, ack("a", 1, "m2"), ack("a", 2, "m1"))
        self.show(BOB, *both)
        self.verdict()

    def test_a_history_loaded_anew_may_begin_in_a_former_epoch(self) -> None:
        history = [entry("b", 8, "m1"), entry("c", 9, "m2")]
        self.show(BOB, joined("c", 9, False, "log_lost", *history), entry("c", 10, "m3"))
        self.verdict()
        history = [entry("c", 9, "m2"), entry("c", 10, "m3")]
        self.show(ANN, joined("d", 10, False, "log_lost", *history), entry("d", 11, "m4"))
        self.verdict()
        self.assertEqual(self.judge.counts["histories_over_epochs"], 2)

    # What is wrong.

    def test_lost(self) -> None:
        self.show(ANN, entry("a", 1, "m1"), ack("a", 1, "m1"))
        self.verdict(Kind.LOST)

    def test_lost_behind_a_break_that_does_not_reach_so_far(self) -> None:
        self.show(ANN, *(entry("a", seq, f"m{seq}") for seq in (1, 2, 3)), ack("a", 3, "m3"))
        self.show(BOB, entry("a", 1, "m1"), reset("a", 2, "log_trimmed"))
        self.verdict(Kind.LOST)

    def test_a_position_twice(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), entry("a", 1, "m1"))
        self.verdict(Kind.DUPLICATED)

    def test_a_position_again_after_a_resume(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), joined("a", 1, True, None, entry("a", 1, "m1")))
        self.verdict(Kind.DUPLICATED)

    def test_a_copy_and_an_ack_without_echo(self) -> None:
        self.show(ANN, entry("a", 1, "m1"))
        self.show(ANN, ack("a", 1, "m1"), in_stream=True)
        self.show(BOB, entry("a", 1, "m1"))
        self.verdict(Kind.DUPLICATED)

    def test_an_id_with_two_numbers(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), entry("a", 2, "m1"))
        self.verdict(Kind.DUPLICATED, Kind.DISAGREEMENT)

    def test_out_of_order(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), entry("a", 3, "m3"), entry("a", 2, "m2"))
        self.verdict(Kind.HOLE, Kind.OUT_OF_ORDER)

    def test_hole(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), entry("a", 3, "m3"))
        self.verdict(Kind.HOLE)

    def test_a_hole_in_a_history(self) -> None:
        self.show(BOB, joined("a", 3, True, None, entry("a", 1, "m1"), entry("a", 3, "m3")))
        self.verdict(Kind.HOLE)

    def test_a_history_that_ends_too_soon(self) -> None:
        self.show(BOB, joined("b", 9, False, "log_lost", entry("b", 8, "m1")))
        self.verdict(Kind.HOLE)

    def test_another_epoch_without_a_word(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), entry("b", 2, "m2"))
        self.verdict(Kind.UNANNOUNCED)

    def test_another_epoch_within_a_recovery(self) -> None:
        self.show(BOB, joined("a", 2, True, None, entry("a", 1, "m1"), entry("b", 2, "m2")))
        self.verdict(Kind.UNANNOUNCED)

    def test_a_recovery_in_another_epoch(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), joined("b", 1, True))
        self.verdict(Kind.UNANNOUNCED)

    def test_a_recovery_that_goes_back(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), entry("a", 2, "m2"), joined("a", 1, True))
        self.verdict(Kind.UNANNOUNCED)

    def test_an_ack_with_two_positions(self) -> None:
        both = [entry("a", 1, "m1"), entry("a", 2, "m2")]
        self.show(ANN, *both, ack("a", 1, "m1"), ack("a", 2, "m1", duplicate=True))
        self.show(BOB, *both)
        self.verdict(Kind.ACK_MOVED, Kind.DISAGREEMENT)

    def test_two_ids_at_one_position(self) -> None:
        self.show(ANN, entry("a", 1, "m1"))
        self.show(BOB, entry("a", 1, "m2"))
        self.verdict(Kind.DISAGREEMENT)

    def test_an_ack_that_disagrees_with_the_others(self) -> None:
        self.show(BOB, entry("a", 1, "m1"))
        self.show(ANN, entry("a", 1, "m1"), entry("a", 2, "m2"), ack("a", 2, "m1"))
        self.verdict(Kind.DISAGREEMENT)

    def test_another_content_or_sender(self) -> None:
        self.show(BOB, entry("a", 1, "m1", content="another"))
        self.verdict(Kind.DISAGREEMENT)
        self.show(ANN, entry("a", 1, "m1", sender=BOB))
        self.verdict(Kind.DISAGREEMENT)

    def test_a_sender_s_messages_swapped(self) -> None:
        both = [entry("a", 1, "m2"), entry("a", 2, "m1")]
        self.show(ANN, *both, ack("a", 2, "m1"), ack("a", 1, "m2"))
        self.show(BOB, *both)
        self.verdict(Kind.SENDER_ORDER)

    def test_a_number_below_one_that_was_acknowledged_before_it_was_sent(self) -> None:
        self.show(ANN, ack("a", 2, "m1"))
        self.send("m7", connection=2)
        self.show(ANN, ack("a", 1, "m7"), entry("a", 1, "m7"), entry("a", 2, "m1"))
        self.show(BOB, entry("a", 1, "m7"), entry("a", 2, "m1"))
        self.verdict(Kind.SENDER_ORDER)

    def test_what_the_protocol_does_not_have(self) -> None:
        wrongs = [entry("a", 1, "nobody's"), ack("a", 1, "nobody's"), joined("b", 5, False)]
        for wrong in [*wrongs, reset("b", 5, "because")]:
            with self.subTest(wrong=wrong["type"]):
                self.setUp()
                self.show(BOB, wrong)
                self.verdict(Kind.PROTOCOL)


class Framing(unittest.TestCase):
    """Frames of RFC 6455, section 5.7, and what a server must not send."""

    def read(self, raw: bytes) -> Any:
        async def read() -> Any:
            reader = asyncio.StreamReader()
            reader.feed_data(raw)
            reader.feed_eof()
            return await websocket.read_frame(reader)

        return asyncio.run(read())

    def test_a_masked_hello(self) -> None:
        hello = bytes.fromhex("818537fa213d7f9f4d5158")
        self.assertEqual(websocket.encode(websocket.TEXT, b"Hello", hello[2:6]), hello)

    def test_lengths(self) -> None:
        for length in (0, 125, 126, 65535, 65536):
            frame = bytearray(websocket.encode(websocket.BINARY, bytes(length), bytes(4)))
            # As a server sends it: no mask, no key.
            frame[1] &= 0x7F
            key_at = {125: 2, 126: 4, 127: 10}[max(frame[1], 125)]
            del frame[key_at : key_at + 4]
            self.assertEqual(self.read(bytes(frame)), (True, websocket.BINARY, bytes(length)))

    def test_what_a_server_must_not_send(self) -> None:
        masked, reserved, split_ping = "818537fa213d7f9f4d5158", "c10548656c6c6f", "0900"
        for raw in (masked, reserved, split_ping, "897e007e"):
            with self.assertRaises(websocket.Broken):
                self.read(bytes.fromhex(raw))


if __name__ == "__main__":
    unittest.main()
