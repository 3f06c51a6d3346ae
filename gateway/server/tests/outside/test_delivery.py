"""Tests of the delivery checker: it counts each violation that it is shown.

python3 -m unittest discover -s gateway/server/tests/outside
"""

from __future__ import annotations

import asyncio
import unittest
from typing import Any

import websocket
from delivery import DeliveryChecker, Kind

ANN, BOB, ROOM = "ann", "bob", "lobby"


def entry(epoch: str, seq: int, id: str, sender: str = ANN, content: str = "") -> dict[str, Any]:
    position = {"room": ROOM, "epoch": epoch, "seq": seq}
    message = {"type": "message", "id": id, "from": {"id": sender}, "content": content or id}
    return message | position


def ack(epoch: str, seq: int, id: str, duplicate: bool = False) -> dict[str, Any]:
    position = {"room": ROOM, "epoch": epoch, "seq": seq}
    return {"type": "ack", "id": id, "duplicate": duplicate} | position


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
        self.checker = DeliveryChecker()
        for member in (ANN, BOB):
            self.checker.joined(self.checker.view(member, ROOM), joined("a", 0))
        for number in range(1, 7):
            self.send(f"m{number}")

    def send(self, id: str, connection: int = 1) -> None:
        self.checker.on_sent(self.checker.view(ANN, ROOM), id, id, connection)

    def show(self, member: str, *frames: dict[str, Any], in_stream: bool = False) -> None:
        view = self.checker.view(member, ROOM)
        for frame in frames:
            match frame["type"]:
                case "joined":
                    self.checker.joined(view, frame)
                case "message":
                    self.checker.message(view, frame)
                case "reset":
                    self.checker.reset(view, frame)
                case "ack":
                    self.checker.ack(view, frame, in_stream)

    def expect(self, *kinds: Kind) -> None:
        self.checker.finish()
        found = {violation.kind for violation in self.checker.violations}
        violations = [str(violation) for violation in self.checker.violations]
        self.assertEqual(found, set(kinds), violations)

    # Correct deliveries.

    def test_entries_in_order_are_correct(self) -> None:
        both = [entry("a", 1, "m1"), entry("a", 2, "m2")]
        self.show(ANN, ack("a", 1, "m1"), *both, ack("a", 2, "m2"))
        self.show(BOB, *both)
        self.expect()
        self.assertEqual(self.checker.counts["delivered"], 4)

    def test_an_ack_without_echo_takes_the_place_of_the_copy(self) -> None:
        self.show(ANN, entry("a", 1, "m1"))
        self.show(ANN, ack("a", 2, "m2"), in_stream=True)
        self.show(ANN, entry("a", 3, "m3"))
        self.show(BOB, entry("a", 1, "m1"), entry("a", 2, "m2"), entry("a", 3, "m3"))
        self.expect()

    def test_a_recovery_continues_at_the_cursor(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), joined("a", 2, True, None, entry("a", 2, "m2")))
        self.show(BOB, entry("a", 3, "m3"))
        self.expect()

    def test_a_signalled_discontinuity_may_skip_entries(self) -> None:
        self.show(ANN, *(entry("a", seq, f"m{seq}") for seq in (1, 2, 3)))
        self.show(ANN, *(ack("a", seq, f"m{seq}") for seq in (1, 2, 3)))
        self.show(BOB, entry("a", 1, "m1"), joined("b", 5, False, "log_lost", entry("b", 5, "m5")))
        self.expect()
        self.assertEqual(self.checker.counts["skipped"], 2)

    def test_a_known_id_may_be_reappended_after_a_reset(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), reset("b", 0), entry("b", 1, "m1"))
        self.expect()
        self.assertEqual(self.checker.counts["reappended"], 1)

    def test_a_message_sent_again_may_be_numbered_late(self) -> None:
        self.send("m1", connection=2)
        both = [entry("a", 1, "m2"), entry("a", 2, "m1")]
        self.show(ANN, *both, ack("a", 1, "m2"), ack("a", 2, "m1"))
        self.show(BOB, *both)
        self.expect()

    def test_a_reloaded_history_may_begin_in_an_earlier_epoch(self) -> None:
        history = [entry("b", 8, "m1"), entry("c", 9, "m2")]
        self.show(BOB, joined("c", 9, False, "log_lost", *history), entry("c", 10, "m3"))
        self.expect()
        history = [entry("c", 9, "m2"), entry("c", 10, "m3")]
        self.show(ANN, joined("d", 10, False, "log_lost", *history), entry("d", 11, "m4"))
        self.expect()
        self.assertEqual(self.checker.counts["histories_over_epochs"], 2)

    # Violations.

    def test_lost(self) -> None:
        self.show(ANN, entry("a", 1, "m1"), ack("a", 1, "m1"))
        self.expect(Kind.LOST)

    def test_lost_after_a_discontinuity_that_ends_earlier(self) -> None:
        self.show(ANN, *(entry("a", seq, f"m{seq}") for seq in (1, 2, 3)), ack("a", 3, "m3"))
        self.show(BOB, entry("a", 1, "m1"), reset("a", 2, "log_trimmed"))
        self.expect(Kind.LOST)

    def test_the_same_position_twice(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), entry("a", 1, "m1"))
        self.expect(Kind.DUPLICATED)

    def test_a_position_again_after_a_resume(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), joined("a", 1, True, None, entry("a", 1, "m1")))
        self.expect(Kind.DUPLICATED)

    def test_a_copy_and_an_ack_without_echo(self) -> None:
        self.show(ANN, entry("a", 1, "m1"))
        self.show(ANN, ack("a", 1, "m1"), in_stream=True)
        self.show(BOB, entry("a", 1, "m1"))
        self.expect(Kind.DUPLICATED)

    def test_an_id_with_two_numbers(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), entry("a", 2, "m1"))
        self.expect(Kind.DUPLICATED, Kind.DISAGREEMENT)

    def test_out_of_order(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), entry("a", 3, "m3"), entry("a", 2, "m2"))
        self.expect(Kind.GAP, Kind.OUT_OF_ORDER)

    def test_gap(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), entry("a", 3, "m3"))
        self.expect(Kind.GAP)

    def test_a_gap_in_a_history(self) -> None:
        self.show(BOB, joined("a", 3, True, None, entry("a", 1, "m1"), entry("a", 3, "m3")))
        self.expect(Kind.GAP)

    def test_a_history_that_ends_below_the_top(self) -> None:
        self.show(BOB, joined("b", 9, False, "log_lost", entry("b", 8, "m1")))
        self.expect(Kind.GAP)

    def test_another_epoch_without_a_signal(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), entry("b", 2, "m2"))
        self.expect(Kind.UNSIGNALLED)

    def test_another_epoch_within_a_recovery(self) -> None:
        self.show(BOB, joined("a", 2, True, None, entry("a", 1, "m1"), entry("b", 2, "m2")))
        self.expect(Kind.UNSIGNALLED)

    def test_a_recovery_in_another_epoch(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), joined("b", 1, True))
        self.expect(Kind.UNSIGNALLED)

    def test_a_recovery_that_goes_back(self) -> None:
        self.show(BOB, entry("a", 1, "m1"), entry("a", 2, "m2"), joined("a", 1, True))
        self.expect(Kind.UNSIGNALLED)

    def test_an_ack_with_two_positions(self) -> None:
        both = [entry("a", 1, "m1"), entry("a", 2, "m2")]
        self.show(ANN, *both, ack("a", 1, "m1"), ack("a", 2, "m1", duplicate=True))
        self.show(BOB, *both)
        self.expect(Kind.ACK_MOVED, Kind.DISAGREEMENT)

    def test_two_ids_at_one_position(self) -> None:
        self.show(ANN, entry("a", 1, "m1"))
        self.show(BOB, entry("a", 1, "m2"))
        self.expect(Kind.DISAGREEMENT)

    def test_an_ack_that_disagrees_with_the_others(self) -> None:
        self.show(BOB, entry("a", 1, "m1"))
        self.show(ANN, entry("a", 1, "m1"), entry("a", 2, "m2"), ack("a", 2, "m1"))
        self.expect(Kind.DISAGREEMENT)

    def test_another_content_or_sender(self) -> None:
        self.show(BOB, entry("a", 1, "m1", content="another"))
        self.expect(Kind.DISAGREEMENT)
        self.show(ANN, entry("a", 1, "m1", sender=BOB))
        self.expect(Kind.DISAGREEMENT)

    def test_messages_of_a_sender_out_of_sending_order(self) -> None:
        both = [entry("a", 1, "m2"), entry("a", 2, "m1")]
        self.show(ANN, *both, ack("a", 2, "m1"), ack("a", 1, "m2"))
        self.show(BOB, *both)
        self.expect(Kind.SENDER_ORDER)

    def test_a_number_below_one_acknowledged_before_sending(self) -> None:
        self.show(ANN, ack("a", 2, "m1"))
        self.send("m7", connection=2)
        self.show(ANN, ack("a", 1, "m7"), entry("a", 1, "m7"), entry("a", 2, "m1"))
        self.show(BOB, entry("a", 1, "m7"), entry("a", 2, "m1"))
        self.expect(Kind.SENDER_ORDER)

    def test_frames_that_violate_the_protocol(self) -> None:
        frames = [entry("a", 1, "unknown"), ack("a", 1, "unknown"), joined("b", 5, False)]
        for frame in [*frames, reset("b", 5, "because")]:
            with self.subTest(frame=frame["type"]):
                self.setUp()
                self.show(BOB, frame)
                self.expect(Kind.PROTOCOL)


class Framing(unittest.TestCase):
    """Frames of RFC 6455, section 5.7, and frames that a server must not send."""

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
            # As a server sends it, without mask and key.
            frame[1] &= 0x7F
            key_at = {125: 2, 126: 4, 127: 10}[max(frame[1], 125)]
            del frame[key_at : key_at + 4]
            self.assertEqual(self.read(bytes(frame)), (True, websocket.BINARY, bytes(length)))

    def test_frames_that_a_server_must_not_send(self) -> None:
        masked, reserved, split_ping = "818537fa213d7f9f4d5158", "c10548656c6c6f", "0900"
        for raw in (masked, reserved, split_ping, "897e007e"):
            with self.assertRaises(websocket.ProtocolError):
                self.read(bytes.fromhex(raw))


if __name__ == "__main__":
    unittest.main()
