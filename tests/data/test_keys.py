"""Keys of ``data`` that have no effect are told, and those that contradict each other refused."""

from __future__ import annotations

from typing import Any

import pytest

from apt_core.data.loading import load_data
from apt_core.errors import ConfigError
from apt_core.kernel import Kernel, boot

MIXTURE = [{"name": "docs", "source": "pydoc"}, {"name": "code", "source": "python_source"}]


def start(data: dict[str, Any], **sections: Any) -> Kernel:
    return boot({"data": data, "hardware": {"device": "cpu"}, **sections})


@pytest.mark.parametrize(
    ("data", "key", "reason"),
    [
        ({"truncation": True}, "data.truncation", "documents fill whole sequences"),
        ({"packing": "concat", "padding": "longest"}, "data.padding", "data.packing is concat"),
        ({"packing": "documents", "truncation": True}, "data.truncation", "is documents"),
        ({"columns": {"text": "body"}}, "data.columns.text", "plain text has no columns"),
        ({"near_threshold": 0.5}, "data.near_threshold", "data.deduplicate is none"),
        ({"val_path": __file__, "val_fraction": 0.2}, "data.val_fraction", "data.val_path is what"),
    ],
)
def test_a_key_that_does_nothing_is_told(data, key, reason):
    (inactive,) = start(data).inactive
    assert inactive.key == key and reason in inactive.reason


@pytest.mark.parametrize(
    "data", [{"padding": "max_length", "truncation": True}, {"packing": "pad", "truncation": True}]
)
def test_what_pads_reads_truncation(data):
    assert start(data).inactive == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"packing": "pad", "padding": "do_not_pad"}, r"data\.padding.*says not to pad"),
        ({"min_chars": 9, "max_chars": 3}, r"data\.min_chars: no document is longer than 9"),
        ({"mixture": []}, r"data\.mixture: names no source"),
        ({"mixture": MIXTURE, "source": "pydoc"}, r"data\.source: nothing reads it beside"),
        ({"mixture": MIXTURE, "errors": "replace"}, r"data\.errors: nothing reads it beside"),
        ({"mixture": [MIXTURE[0], MIXTURE[0]]}, r"mixture\[1\]\.name: 'docs' names two sources"),
        ({"mixture": [{**m, "weight": 0} for m in MIXTURE]}, r"data\.mixture: all weights are 0"),
        ({"mixture": [{**MIXTURE[0], "weight": -1}]}, r"data\.mixture.*weight"),
        ({"mixture": [{**MIXTURE[0], "name": "Docs"}]}, r"data\.mixture.*name"),
        ({"mixture": [{"name": "x", "source": "pydok"}]}, r"mixture\[0\]\.source.*'pydoc'"),
    ],
)
def test_what_cannot_be_meant_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        start(data)


def test_a_source_of_a_mixture_is_named_by_one_key_wherever_something_is_wrong(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "bad.jsonl").write_text("{}")
    items = [
        ({"train_path": str(tmp_path / "empty.txt")}, r"data\.mixture\[1\]\.train_path: holds no"),
        ({"train_path": str(tmp_path / "short.txt")}, r"data\.mixture\[1\]\.train_path: the train"),
        ({"train_path": str(tmp_path / "bad.jsonl")}, r"data\.mixture\[1\]\.train_path: has no"),
        ({"train_path": str(tmp_path / "none")}, r"data\.mixture\[1\]\.train_path: there is no"),
        ({"weight": "3"}, r"data\.mixture\[1\]\.weight: must be"),
        ({"settings": {"x": 1}}, r"data\.mixture\[1\]\.settings: nothing reads it"),
    ]
    for item, message in items:
        with pytest.raises(ConfigError, match=message):
            load_data(start({"mixture": [MIXTURE[0], {"name": "given", **item}]}))


def test_schedules_of_a_mixture_are_checked_by_its_names():
    with pytest.raises(ConfigError, match=r"mixture_dogs.*did you mean 'mixture_docs'"):
        start({"mixture": MIXTURE}, schedules={"mixture_dogs": 2})
    with pytest.raises(ConfigError, match=r"enable_docz_at_step.*did you mean 'docs'"):
        start({"mixture": MIXTURE}, schedules={"enable_docz_at_step": 2})
    kernel = start({"mixture": MIXTURE}, schedules={"mixture_docs": 2, "enable_code_at_step": 3})
    assert kernel.inactive == [] and kernel.schedule.boundaries() == []
    assert {kind_name for kind_name in kernel.providers if kind_name[0] == "dataset"} == {
        ("dataset", "pydoc"),
        ("dataset", "python_source"),
    }


def test_a_source_of_a_mixture_may_not_be_named_as_a_plugin(tmp_path):
    plugin = tmp_path / "docs.py"
    plugin.write_text("")
    with pytest.raises(ConfigError, match=r"'docs' is an active plugin too"):
        start({"mixture": MIXTURE}, plugins=[str(plugin)])
