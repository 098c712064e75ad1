"""Messages between the process that builds a store and its workers: JSON with blocks of bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, BinaryIO

PREFIX = 8
"""Bytes of each number that says a length."""


def pack(header: dict[str, Any], blocks: Sequence[Any] = ()) -> bytes:
    """A message of a header and blocks (anything with the buffer protocol)."""
    views = [memoryview(block).cast("B") for block in blocks]
    head = json.dumps([header, [len(view) for view in views]], separators=(",", ":")).encode()
    return b"".join([len(head).to_bytes(PREFIX, "little"), head, *views])


def unpack(message: bytes) -> tuple[dict[str, Any], list[memoryview]]:
    """The header and the blocks of a message."""
    start = PREFIX + int.from_bytes(message[:PREFIX], "little")
    header, sizes = json.loads(message[PREFIX:start])
    blocks, view = [], memoryview(message)
    for size in sizes:
        blocks.append(view[start : start + size])
        start += size
    return header, blocks


def send(stream: BinaryIO, message: bytes) -> None:
    """Write a message to a pipe. Raises OSError where nobody reads it."""
    stream.write(len(message).to_bytes(PREFIX, "little"))
    stream.write(message)
    stream.flush()


def receive(stream: BinaryIO) -> bytes | None:
    """The next message of a pipe, or None at its end."""
    prefix = stream.read(PREFIX)
    if len(prefix) < PREFIX:
        return None
    size = int.from_bytes(prefix, "little")
    message = stream.read(size)
    return message if len(message) == size else None
