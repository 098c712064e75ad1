"""Growing texts, and the part of them that the model sees."""

from __future__ import annotations

from collections.abc import Sequence


def window_start(length: int, max_seq_len: int) -> int:
    """The first position of the window that the model sees of a text of ``length`` tokens: 0 while
    the text fits into ``max_seq_len``. Later the window moves by half its size at a time, so that
    a cache can be used for many tokens.

    >>> [window_start(length, 8) for length in (1, 8, 9, 12, 13)]
    [0, 0, 4, 4, 8]
    """
    if length <= max_seq_len:
        return 0
    stride = max(1, max_seq_len // 2)
    return -(-(length - max_seq_len) // stride) * stride


class Text:
    """The tokens ``ids`` of a text, of which the first ``start`` are the prompt; it may get as long
    as ``most``."""

    def __init__(self, ids: Sequence[int], max_new_tokens: int) -> None:
        self.ids, self.start = list(ids), len(ids)
        self.most = len(ids) + max_new_tokens


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists begin with in common.

    >>> common_length([1, 2, 3, 4], [1, 2, 9])
    2
    """
    shared, beyond = 0, min(len(one), len(other)) + 1
    while beyond - shared > 1:
        middle = (shared + beyond) // 2
        if one[shared:middle] == other[shared:middle]:
            shared = middle
        else:
            beyond = middle
    return shared
