"""What the plugin promises, in runs of a second."""

from __future__ import annotations

from apt_core.testing import check_plugin, tiny_run

CHOSEN = {"model.ffn_name": "my_plugin"}


def test_it_keeps_what_every_feed_forward_promises() -> None:
    assert [finding for finding in check_plugin("my_plugin") if not finding.ok] == []


def test_naming_it_activates_the_plugin_and_its_settings_are_heeded() -> None:
    run = tiny_run(steps=4, overrides=CHOSEN)
    assert run.manager.has_plugin("my_plugin")
    sharper = tiny_run(steps=4, overrides={**CHOSEN, "my_plugin.sharpness": 2.0})
    assert not run.same_weights(sharper)
