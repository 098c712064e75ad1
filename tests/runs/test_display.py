"""What a session and a comparison show of themselves, in a terminal and in a notebook."""

from __future__ import annotations

from apt_core.runs.compare import Comparison, Difference
from apt_core.testing import tiny_session


def test_a_session_shows_what_it_is_in_a_line_and_in_a_table() -> None:
    session = tiny_session(profile=None)
    shown, table = repr(session), session._repr_html_()
    assert "\n" not in shown and len(shown) < 500
    for fact in ("position step 0 in epoch 1", "device cpu", "precision float32", "parameters "):
        assert fact in shown
    assert "<th>device</th><td>cpu</td>" in table and "<script" not in table + shown


def test_a_comparison_shows_its_differences_and_what_was_compared() -> None:
    assert str(Comparison(["2 tensors of model"])) == "equal, bit for bit: 2 tensors of model"
    found = Comparison(["2 rows"], [Difference(3, "loss <b>", "1 here, 2 there")] * 60)
    assert str(found).splitlines()[:2] == ["60 differences: 2 rows", "loss <b>: 1 here, 2 there"]
    assert len(str(found).splitlines()) == 51
    table = found._repr_html_()
    assert table.count("<tr><td>") == 50 and "<td>loss &lt;b&gt;</td>" in table
