"""Every hook: as the table of the design has it, with an example that works, documented, tested."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from apt_core import hookspecs
from apt_core.hookspecs import POLICIES, hooks_where
from apt_core.inspect.hook_reference import hook_reference
from apt_core.inspect.listing import hook_facts
from apt_core.markers import Stage, hookspec
from apt_core.plugin_manager import PluginManager

ROOT = Path(__file__).parents[2]

DORMANT = """
    apt_register_providers() apt_register_config() apt_configure(config)
    apt_build_provider(spec, config) apt_param_groups(model)
    apt_transform_model(model, config, registry, trains) apt_trainable(config) apt_costs(config)
    apt_state_dict(trainer) apt_load_state_dict(trainer, state)
"""
ENABLED = """
    apt_loss_terms(trainer, batch, output) apt_metrics(trainer) apt_rewrite_prompt(request, session)
    apt_logits_processors(request, session) apt_decoder(request, session)
    on_plugin_enabled(plugin, trainer)
    on_resume(step, from_step, run) on_training_start(trainer, run)
    on_training_end(trainer, run) on_epoch_start(epoch, trainer)
    on_epoch_end(epoch, trainer) on_step_start(step, batch, trainer) on_backward_end(step, trainer)
    on_step_end(step, loss, trainer) on_evaluation_start(trainer)
    on_evaluation_end(trainer, metrics) on_metrics(metrics, step)
    on_checkpoint_saved(path, trainer) on_provider_fallback(event) on_plugin_failure(failure)
    on_exception(error, trainer, run) on_generation_start(request, session)
    on_generation_end(request, result, session)
"""
STAGES = {
    Stage.LOADING: "apt_register_providers apt_register_config",
    Stage.BUILDING: "apt_configure apt_build_provider apt_param_groups apt_transform_model "
    "apt_trainable apt_costs",
    Stage.STEP: "on_step_start on_backward_end on_step_end",
    Stage.MICRO_BATCH: "apt_loss_terms",
    Stage.ENDING: "on_training_end apt_rewrite_prompt on_generation_start apt_logits_processors "
    "apt_decoder on_generation_end",
}
"""All others are called in the run, outside of its steps."""
APPLIES = {
    "firstresult": "apt_build_provider apt_decoder",
    "chained": "apt_rewrite_prompt",
    "alone": "apt_register_providers apt_register_config apt_configure apt_transform_model "
    "apt_trainable apt_costs apt_load_state_dict",
    "changes_weights": "apt_register_providers apt_build_provider apt_param_groups "
    "apt_transform_model apt_trainable apt_loss_terms",
    "edits_gradients": "on_backward_end",
    "trains": "apt_build_provider apt_param_groups apt_transform_model apt_trainable "
    "apt_loss_terms on_backward_end",
    "judges_input": "apt_configure apt_transform_model apt_trainable",
    "fatal_among_processes": "apt_loss_terms",
    "sets_modes": "on_plugin_enabled on_training_start on_epoch_start on_step_start "
    "apt_load_state_dict",
    "permanent": "apt_transform_model",
    "replayed": "on_epoch_start on_step_start apt_loss_terms on_backward_end on_step_end",
    "background": "on_plugin_enabled on_resume on_training_start on_metrics on_evaluation_end "
    "on_epoch_end on_training_end on_checkpoint_saved on_provider_fallback on_plugin_failure "
    "on_exception on_generation_end",
    "in_step": "on_step_start apt_loss_terms on_backward_end on_step_end",
}
HOOKS = list(POLICIES)


def test_the_hooks_are_those_of_the_design() -> None:
    facts = [hook_facts(name) for name in HOOKS]
    signatures = re.compile(r"\w+\([^)]*\)")
    assert {f["signature"] for f in facts if f["dormant"]} == set(signatures.findall(DORMANT))
    assert {f["signature"] for f in facts if not f["dormant"]} == set(signatures.findall(ENABLED))
    assert {f["failure_limit"] for f in facts} == {1, 3}


def test_the_policy_of_a_hook_is_as_designed_and_each_states_one() -> None:
    marked = {name for name in vars(hookspecs) if re.match(r"(apt|on)_", name)}
    assert marked == POLICIES.keys()
    stages = {stage: set(hooks_where(lambda p, s=stage: p.stage is s)) for stage in Stage}
    assert stages.pop(Stage.RUN) == marked - {h for hooks in STAGES.values() for h in hooks.split()}
    assert stages == {stage: set(hooks.split()) for stage, hooks in STAGES.items()}
    for what, hooks in APPLIES.items():
        assert set(hooks_where(lambda p, w=what: getattr(p, w))) == set(hooks.split()), what
    with pytest.raises(TypeError, match="stage"):
        hookspec()  # type: ignore[call-arg]


def spelled(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Where code tells hooks apart by their names: in a comparison, a case, or a collection."""
    for node in ast.walk(tree):
        parts: Sequence[Any] = ()
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            parts = node.elts
        elif isinstance(node, ast.Dict):
            parts = node.keys
        elif isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        for part in parts:
            if isinstance(part, ast.Constant) and part.value in POLICIES:
                yield part.lineno, part.value


@pytest.mark.parametrize("folder", ["apt_core", "apt_plugins"])
def test_what_is_decided_by_hook_is_spelled_in_the_specifications_alone(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {hook}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, hook in spelled(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def example(hook: str) -> str:
    doc = inspect.getdoc(getattr(hookspecs, hook)) or ""
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


@pytest.mark.parametrize("hook", HOOKS)
def test_the_reference_has_signature_and_example(hook: str) -> None:
    reference = hook_reference()
    facts = hook_facts(hook)
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
