"""Which final answer a text states."""

from __future__ import annotations

import pytest

from apt_core.evaluation.final_answers import final_answer

EQUAL = {
    "42": (
        "42",
        "The answer is 42.",
        "so 6 * 7 = 42",
        "It is 7.\n#### 42",
        "Answer: 42 pears, not 41",
        "the ANSWER IS: 42.00\nas 1 + 41 is 42 too",
        r"first \boxed{7}, then \boxed{42.0}. The answer is 7",
        r"\boxed{$42$}",
        "٤٢",
        "$42",
    ),
    "1234.5": ("1,234.50", "12 and 1234.5"),
    "-3": ("2 - 5 = -3", "2 \N{MINUS SIGN} 5 = \N{MINUS SIGN}3"),
    "3": ("answer is 3", "5-3", "f(3)-3", "8 -5 = 3"),
    "0": ("-0.0", "0"),
    "3/4": ("the answer is 3/4",),
    "yes": ("Yes!", "The answer is  YES.", "yes"),
    "ünal lief": ("  Ünal  lief.", "Answer: ünal\tlief\nor so"),
    r"\frac{1}{2}": (r"\boxed{\frac{1}{2}}",),
    "": ("", "...", "3 and 4. The answer is"),
    "4": (r"\boxed{4", "4"),
    "1" * 5000: ("1" * 5000,),
}


@pytest.mark.parametrize("expected", EQUAL)
def test_final_answers_have_one_form(expected: str) -> None:
    assert [final_answer(text) for text in EQUAL[expected]] == [expected] * len(EQUAL[expected])
