"""Every hook: as the table of the design has it, with an example that works, documented, tested."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apt_core.inspect.hook_reference import hook_reference
from apt_core.inspect.listing import hook_facts, hook_names
from apt_core.plugin_manager import PluginManager

ROOT = Path(__file__).parents[2]

DORMANT = """
    apt_register_providers() apt_register_config() apt_configure(config)
    apt_build_provider(spec, config) apt_param_groups(model)
    apt_transform_model(model, config, registry) apt_costs(config) apt_state_dict(trainer)
    apt_load_state_dict(trainer, state)
"""
ENABLED = """
    apt_loss_terms(trainer, batch, output) apt_metrics(trainer) apt_rewrite_prompt(request)
    apt_logits_processors(request) apt_decoder(request) on_plugin_enabled(plugin, trainer)
    on_training_start(trainer) on_training_end(trainer) on_epoch_start(epoch, trainer)
    on_epoch_end(epoch, trainer) on_step_start(step, batch, trainer) on_backward_end(step, trainer)
    on_step_end(step, loss, trainer) on_evaluation_start(trainer)
    on_evaluation_end(trainer, metrics) on_metrics(metrics, step)
    on_checkpoint_saved(path, trainer) on_provider_fallback(event) on_plugin_failure(failure)
    on_exception(error, trainer) on_generation_start(request) on_generation_end(request, result)
"""
FIRST_RESULT = {"apt_build_provider", "apt_decoder"}
HOOKS = hook_names(PluginManager())


def test_the_hooks_are_those_of_the_design() -> None:
    manager = PluginManager()
    facts = [hook_facts(manager, name) for name in HOOKS]
    signatures = re.compile(r"\w+\([^)]*\)")
    assert {f["signature"] for f in facts if f["dormant"]} == set(signatures.findall(DORMANT))
    assert {f["signature"] for f in facts if not f["dormant"]} == set(signatures.findall(ENABLED))
    assert {f["hook"] for f in facts if f["firstresult"]} == FIRST_RESULT
    assert {f["failure_limit"] for f in facts} == {1, 3}


def example(hook: str) -> str:
    doc = inspect.getdoc(getattr(PluginManager().hook, hook).spec.function) or ""
    contract, _, code = doc.partition("Example::\n")
    assert contract.strip(), "no contract"
    return textwrap.dedent(code)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_of_a_hook_is_a_whole_plugin(
    hook: str, load_source: Callable[..., Any]
) -> None:
    manager = PluginManager(strict=True)
    manager.register(load_source("example", example(hook)), "example")
    assert manager.implements("example", hook)


def test_the_reference_is_up_to_date() -> None:
    """Written by ``apt-hooks docs > docs/hooks.md``."""
    assert (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8") == hook_reference()


@pytest.mark.parametrize("hook", HOOKS)
def test_the_reference_has_signature_and_example(hook: str) -> None:
    reference = hook_reference()
    facts = hook_facts(PluginManager(), hook)
    assert f"\n## {hook}\n\n`{facts['signature']}`\n" in reference
    assert f"```python\n{example(hook).strip()}\n```" in reference


def test_every_hook_is_named_in_a_test() -> None:
    texts = [
        path.read_text(encoding="utf-8")
        for path in (ROOT / "tests").rglob("test_*.py")
        if path.name != Path(__file__).name
    ]
    untested = [hook for hook in HOOKS if not any(hook in text for text in texts)]
    assert untested == []
