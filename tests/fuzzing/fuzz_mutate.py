"""Seeded mutations: of bytes, of plain data, and the odd values and words that both draw from."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

WORDS = [
    "", " ", ".", "..", "/", "~", "no:", "null", "yes", "on", "1e400", "nan", "-inf", "0x1F", "1_0",
    "a" * 5000, "0" * 5000, "1" * 5000, "数据", "Ünï", "İ", "ﬁ", "\u202e", "\x00", "\x1b[2J",
    "\ud800", "a\nb", "a.b", "[0]", "<<", "*a", "&a", "!!int x", "../../x", "%s", "{0}", "cuda",
    "cpu", "auto", "mha", "epoch", "step", "token", "moe", "rope", "pydoc", "__class__",
    "enable_moe_at_epoch", "enable__at_step", "disable_x_at_token", "extends", "plugins", "$(id)",
]  # fmt: skip

NUMBERS = [
    0, -1, 1, 2, 3, 7, 255, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**70), 10**400, 0.0, -0.0,
    0.5, 1e300, 1e-320, float("inf"), float("-inf"), float("nan"),
]  # fmt: skip

SNIPPETS = [
    b"\n", b"\t", b": ", b"- ", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"!!", b"!!python/name:os ",
    b"'", b'"', b"|\n", b">\n", b"<<: ", b"%", b"---\n", b"...\n", b"? ", b"\xef\xbb\xbf", b"\x00",
    b"\xff", b"\xfe\xff", b"\r", b"\r\n", b"#", b"\xc3\xa9", b"\xe2\x80\xa8", b"\xed\xa0\x80",
    b"\\", b"\\ud800", b"1e999", b"NaN", b"Infinity", b"null", b",", b"0" * 6000, b"[" * 3000,
]  # fmt: skip


def scalar(rng: random.Random) -> Any:
    """A value that is no list and no mapping."""
    match rng.randrange(6):
        case 0:
            return rng.choice([None, True, False])
        case 1 | 2:
            return rng.choice(NUMBERS)
        case 3:
            return rng.randrange(-10, 100)
        case 4:
            return rng.choice(WORDS)
        case _:
            return "".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.randrange(8)))


def value(rng: random.Random, depth: int = 3) -> Any:
    """Plain data."""
    kind = rng.randrange(5) if depth else 0
    if kind == 3:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 4:
        return {rng.choice(WORDS): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    return scalar(rng)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Each item of the lists and mappings in ``data``: what it stands in, and its key."""
    found: list[tuple[Any, Any]] = []
    keys: Sequence[Any] = ()
    if isinstance(data, dict):
        keys = list(data)
    elif isinstance(data, list):
        keys = range(len(data))
    for key in keys:
        found += [(data, key), *places(data[key])]
    return found


def mutated(
    rng: random.Random, data: Any, values: Callable[[random.Random], Any] = value, most: int = 5
) -> Any:
    """A copy of plain data with up to ``most`` items replaced, deleted, renamed, doubled, swapped
    or put in."""
    root = [copy.deepcopy(data)]
    for _ in range(rng.randint(1, most)):
        around, key = rng.choice(places(root))
        item = around[key]
        match rng.randrange(8):
            case 0 | 1 | 2:
                around[key] = values(rng)
            case 3 if around is not root:
                del around[key]
            case 4 if isinstance(around, dict):
                around[rng.choice(WORDS)] = around.pop(key)
            case 5:
                other, place = rng.choice(places(root))
                around[key] = copy.deepcopy(other[place])
            case 6 if isinstance(item, list):
                item.insert(rng.randint(0, len(item)), values(rng))
            case 6 if isinstance(item, dict):
                item[rng.choice([*WORDS, *item])] = values(rng)
            case 7 if isinstance(item, int | float):
                around[key] = rng.choice(NUMBERS)
            case 7 if rng.random() < 0.1:
                for _ in range(rng.choice([5, 36, 39, 200])):
                    item = {"model": item} if rng.random() < 0.5 else [item]
                around[key] = item
    return root[0]


def damaged(rng: random.Random, text: bytes) -> bytes:
    """``text`` with bits flipped, cut off, pieces put in, taken out, doubled or moved."""
    for _ in range(rng.randint(1, 5)):
        at = rng.randint(0, len(text))
        end = min(len(text), at + rng.choice([0, 1, 1, 2, 5, 40]))
        match rng.randrange(7):
            case 0 | 1:
                text = text[:at] + rng.choice(SNIPPETS) + text[end:]
            case 2 if text:
                at %= len(text)
                text = text[:at] + bytes([text[at] ^ (1 << rng.randrange(8))]) + text[at + 1 :]
            case 3:
                text = text[:at] if rng.random() < 0.3 else text[:at] + text[end:]
            case 4:
                piece = text[at : at + rng.choice([1, 8, 100])]
                text = text[:at] + piece * rng.choice([2, 3, 50]) + text[at:]
            case 5:
                text = text[:at] + rng.randbytes(rng.randrange(9)) + text[end:]
            case 6:
                words = rng.choice(WORDS).encode("utf-8", "surrogatepass")
                text = text[:at] + words + text[end:]
    return text
