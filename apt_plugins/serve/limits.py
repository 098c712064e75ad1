"""What one server takes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """``max_batch`` answers are worked on at once, ``max_queue`` more wait. An answer has at most
    ``max_tokens`` tokens and takes ``request_timeout`` seconds. A request's body has at most
    ``max_body`` bytes; its head and its body arrive within ``read_timeout`` seconds each. Answers
    have ``shutdown_timeout`` seconds to end when the server is told to.
    """

    max_batch: int = 16
    max_queue: int = 64
    max_tokens: int = 4096
    max_body: int = 1 << 20
    request_timeout: float = 300.0
    read_timeout: float = 10.0
    shutdown_timeout: float = 10.0
    max_connections: int = 256

    @property
    def max_answers(self) -> int:
        """The answers that are worked on or wait."""
        return self.max_batch + self.max_queue
