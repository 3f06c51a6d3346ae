"""A WebSocket client (RFC 6455): handshake and framing. Strict about the frames of the server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import struct
import urllib.parse

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
ACCEPT_KEY = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
# Far above the largest server frame that `max_message_size` allows.
MESSAGE_BYTES_MAX = 8 << 20


class HandshakeRejected(Exception):
    """The response to the handshake was not 101."""

    def __init__(self, status: int, retry_after: float) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.retry_after = retry_after


class ConnectionClosed(Exception):
    """The connection has ended. 1006: no close frame; 1005: a close frame without a code."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"closed with {code} {reason}".rstrip())
        self.code = code
        self.reason = reason


class ProtocolError(Exception):
    """The server violated RFC 6455."""


def mask(payload: bytes, key: bytes) -> bytes:
    """XOR with the repeated key, which is its own inverse."""
    length = len(payload)
    repeated = (key * (length // 4 + 1))[:length]
    return (int.from_bytes(payload) ^ int.from_bytes(repeated)).to_bytes(length)


def encode(opcode: int, payload: bytes, key: bytes) -> bytes:
    """One whole, masked frame of a client."""
    length = len(payload)
    if length < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | length)
    elif length < 1 << 16:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, length)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, length)
    return head + key + mask(payload, key)


async def read_frame(reader: asyncio.StreamReader) -> tuple[bool, int, bytes]:
    """The next frame of a server: whether it ends its message, opcode, payload."""
    first, second = await reader.readexactly(2)
    final, opcode, length = bool(first & 0x80), first & 0x0F, second & 0x7F
    if first & 0x70:
        raise ProtocolError("reserved bits are set")
    if second & 0x80:
        raise ProtocolError("a frame of the server is masked")
    if opcode >= CLOSE and (length > 125 or not final):
        raise ProtocolError("a control frame is too long or fragmented")
    if length == 126:
        (length,) = struct.unpack("!H", await reader.readexactly(2))
    elif length == 127:
        (length,) = struct.unpack("!Q", await reader.readexactly(8))
    if length > MESSAGE_BYTES_MAX:
        raise ProtocolError(f"a frame of {length} bytes")
    return final, opcode, await reader.readexactly(length)


class WebSocket:
    """An open connection. `received_at` is the time of the last frame, by the loop's clock."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._closed_here = False
        self.received_at = asyncio.get_running_loop().time()

    @classmethod
    async def open(cls, url: str, protocol: str) -> WebSocket:
        """Connects to a ws:// URL and performs the handshake."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "ws" or not parts.hostname:
            raise ValueError(f"not a ws:// URL: {url}")
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
        try:
            await cls._handshake(reader, writer, parts, protocol)
        except BaseException:
            writer.transport.abort()
            raise
        return cls(reader, writer)

    @staticmethod
    async def _handshake(
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        parts: urllib.parse.SplitResult,
        protocol: str,
    ) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        writer.write(
            f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Protocol: {protocol}\r\n\r\n".encode()
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = head.rstrip("\r\n").split("\r\n")
        status = int(status_line.split(" ")[1])
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if status != 101:
            raise HandshakeRejected(status, float(headers.get("retry-after", 0)))
        digest = hashlib.sha1((key + ACCEPT_KEY).encode()).digest()
        expected = {
            "upgrade": "websocket",
            "connection": "upgrade",
            "sec-websocket-accept": base64.b64encode(digest).decode(),
            "sec-websocket-protocol": protocol,
        }
        for name, value in expected.items():
            is_exact = name == "sec-websocket-accept"
            actual = headers.get(name, "")
            if actual != value and (is_exact or actual.lower() != value):
                raise ProtocolError(f"{name} is {actual!r}, not {value!r}")
        if "sec-websocket-extensions" in headers:
            raise ProtocolError("the server chose an extension that was not offered")

    async def receive(self) -> str | bytes:
        """The next message. Answers pings. Raises ConnectionClosed at the end of the connection."""
        fragments: list[bytes] = []
        kind = 0
        while True:
            try:
                final, opcode, payload = await read_frame(self._reader)
            except (asyncio.IncompleteReadError, OSError) as error:
                raise ConnectionClosed(1006, type(error).__name__) from error
            self.received_at = asyncio.get_running_loop().time()
            if opcode == PING:
                self._send(PONG, payload)
                continue
            if opcode == PONG:
                continue
            if opcode == CLOSE:
                raise self._answer_close(payload)
            if (opcode == 0) != bool(kind) or opcode not in (0, TEXT, BINARY):
                raise ProtocolError(f"opcode {opcode} is not allowed here")
            kind = kind or opcode
            fragments.append(payload)
            if sum(map(len, fragments)) > MESSAGE_BYTES_MAX:
                raise ProtocolError("a message of too many bytes")
            if final:
                whole = b"".join(fragments)
                try:
                    return whole.decode() if kind == TEXT else whole
                except UnicodeDecodeError as error:
                    raise ProtocolError("text that is not UTF-8") from error

    def _answer_close(self, payload: bytes) -> ConnectionClosed:
        """Answers the close frame of the server."""
        self._send(CLOSE, payload[:2])
        self._writer.close()
        if len(payload) < 2:
            return ConnectionClosed(1005)
        return ConnectionClosed(int.from_bytes(payload[:2]), payload[2:].decode(errors="replace"))

    def send(self, message: str | bytes) -> None:
        """Queues a message. On a dead connection it is lost, as on any network."""
        if isinstance(message, str):
            self._send(TEXT, message.encode())
        else:
            self._send(BINARY, message)

    def _send(self, opcode: int, payload: bytes) -> None:
        if not self._closed_here and not self._writer.is_closing():
            self._writer.write(encode(opcode, payload, os.urandom(4)))

    def closed_here(self) -> bool:
        """Whether this side ended the connection."""
        return self._closed_here

    def abort(self) -> None:
        """Ends the connection without a close frame; `receive` raises ConnectionClosed."""
        self._closed_here = True
        self._writer.transport.abort()

    def close(self) -> None:
        """Sends a close frame; `receive` raises ConnectionClosed once the server has answered."""
        self._send(CLOSE, (1000).to_bytes(2))
        self._closed_here = True
