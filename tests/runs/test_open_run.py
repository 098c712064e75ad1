"""A run is opened from its folder, without what trained it: its model, plugins and settings."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apt_core import GenerationRequest, hookimpl
from apt_core.errors import CheckpointError, ConfigError
from apt_core.inference import generate
from apt_core.modeling.modes import eval_mode
from apt_core.runs import checkpoint, open_run, opened, scores
from apt_core.runs.checkpoint import list_checkpoints
from apt_core.testing import TINY_PROFILE, tiny_run
from tests.training.curriculum.conftest import SETTINGS
from tests.training.curriculum.conftest import installed as installed  # a fixture

PARAMS = ("route_temp", "moe_capacity", "align_weight", "vote_threshold")
IDS = torch.arange(32).view(2, 16) % 251

COUNTS = """
from apt_core import PluginInfo, SectionSpec, hookimpl
from pydantic import BaseModel, SecretStr


class Settings(BaseModel):
    token: SecretStr
    password: str = ""
    words: list[str] = []


class Plugin:
    def __init__(self):
        self.steps, self.trainer = 0, None

    @hookimpl
    def apt_register_config(self):
        return [SectionSpec("counts", Settings)]

    @hookimpl
    def apt_configure(self, config):
        self.settings = config.section("counts")

    @hookimpl
    def on_step_end(self):
        self.steps += 1

    @hookimpl
    def apt_state_dict(self):
        return {"steps": self.steps}

    @hookimpl
    def apt_load_state_dict(self, state):
        self.steps = state["steps"]
"""
"""A plugin with secrets and a state of its own."""

WAITS = COUNTS.replace("self, state)", "self, state, trainer)").replace('"counts"', '"waits"')
"""One whose state is for training."""


class Keeps:
    """What the trainer had at the end of the run."""

    @hookimpl
    def on_training_end(self, trainer: Any) -> None:
        with eval_mode(trainer.model), torch.no_grad(), trainer.autocast():
            self.logits = trainer.model(IDS).logits.clone()
        self.params = {name: trainer.param(name) for name in PARAMS}
        self.position = trainer.step, trainer.epoch, trainer.tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A curriculum with a switch to experts, whose text is gone."""
    folder = tmp_path_factory.mktemp("curriculum")
    for name, code in (("counts", COUNTS), ("waits", WAITS)):
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    keeps = Keeps()
    secrets = {"token": "sesame-open", "password": "open-sesame", "words": ["https://a:b@c.d/"]}
    changes = {
        **SETTINGS,
        "training.ema_decay": 0.9,
        "training.save_every_steps": 3,
        "training.mixed_precision": True,
        "counts": secrets,
        "waits": secrets,
    }
    plugins = [f"apt_plugins.{name}.plugin" for name in ("moe", "align", "routing", "voter")]
    own = (folder / "counts.py", folder / "waits.py", keeps)
    made = tiny_run(*plugins, *own, overrides=changes, output=folder / "run")
    (folder / "run.txt").unlink()
    return SimpleNamespace(keeps=keeps, result=made.result, folder=folder / "run")


def without(run: SimpleNamespace, **options: Any) -> Any:
    """The run without the plugin that is an object, which no reference names."""
    return open_run(run.folder, plugins="no:keeps", **options)


def states(session: Any) -> dict[str, str]:
    records = session.manager.records.values()
    return {r.name.split(".")[0]: r.state for r in records if r.state != "blocked"}


def test_a_run_past_its_switch_has_the_bits_the_trainer_had(run):
    keeps, before = run.keeps, torch.get_rng_state()
    session = without(run)
    with session.computing(), session.autocast():
        logits = session.model(IDS).logits
    assert logits.equal(keeps.logits) and not logits.requires_grad
    assert {name: session.param(name) for name in PARAMS} == keeps.params
    assert session.param("nothing", 3) == 3
    at = session.position
    assert (at.step, at.epoch, at.tokens) == keeps.position
    assert any(name.endswith("router.weight") for name, _ in session.model.named_parameters())
    assert not session.model.training and session.dtype == torch.bfloat16
    assert set(states(session).values()) == {"active"}
    assert torch.get_rng_state().equal(before)


def test_it_generates_what_the_run_did(run):
    session = without(run, weights="average")
    settings = session.config.evaluation
    request = GenerationRequest(
        settings.sample_prompt,
        max_new_tokens=settings.sample_tokens,
        temperature=settings.sample_temperature,
        seed=session.config.training.seed,
    )
    assert generate(session, request).text == run.result.sample


def test_plugins_are_as_they_were_and_have_what_they_kept(run):
    late, early = without(run), open_run(run.folder, step=3, plugins=[Keeps()])
    assert states(late) == dict.fromkeys(states(late), "active")
    waiting = {name for name, state in states(early).items() if state == "dormant"}
    assert waiting == {"moe", "align", "voter"} and states(early)["keeps"] == "active"
    assert [s.manager.get_plugin("counts").steps for s in (early, late)] == [3, run.result.step]
    assert late.manager.get_plugin("waits").steps == 0  # what it loads needs a trainer
    assert not any(r.failures for r in late.manager.records.values())
    assert early.position.step == 3 and late.param("route_temp") != early.param("route_temp")


def test_secrets_are_not_needed_and_no_plugin_is_shown_a_mask(run):
    settings = without(run).manager.get_plugin("counts").settings
    assert settings.password == "" and settings.token.get_secret_value() == opened.NOT_KEPT
    assert settings.words == []


def test_weights_are_the_last_the_average_or_the_best(run):
    def weights(path: Path, name: str) -> dict[str, torch.Tensor]:
        saved = checkpoint.load(path).tensors(name)
        targets = {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in saved.shapes.items()}
        saved.read_into(targets, name)
        return targets

    root = run.folder / "checkpoints"
    losses = {path: evaluated.loss for path, evaluated in scores.evaluations(root)}
    best = min(losses, key=losses.__getitem__)
    cases = (
        ("last", list_checkpoints(root)[-1], "model"),
        ("average", list_checkpoints(root)[-1], "ema"),
        ("best", best, "ema"),
    )
    for kind, path, name in cases:
        session = without(run, weights=kind)
        assert session.checkpoint == path
        expected = weights(path, name)
        for parameter, value in session.model.named_parameters():
            assert value.equal(expected[parameter]), (kind, parameter)


def test_the_one_average_of_a_plugin_is_taken_and_without_any_it_says_so(tmp_path):
    class Averages:
        def __init__(self, *names: str) -> None:
            self.names = names

        @hookimpl
        def on_training_start(self, trainer: Any) -> None:
            for name in self.names:
                trainer.average(name, 0.5)

    def trained(*names: str) -> Path:
        folder = tmp_path / f"run{len(names)}"
        for number in range(2):
            (tmp_path / f"p{number}.py").write_text("", encoding="utf-8")
        files = [tmp_path / f"p{number}.py" for number in range(2)]
        tiny_run(*files, Averages(*names), steps=2, output=folder)
        return folder

    plugins = ["no:p0", "no:p1", "no:averages"]
    session = open_run(trained("p1"), weights="average", plugins=plugins)
    last = open_run(tmp_path / "run1", plugins=plugins)
    pairs = zip(session.model.parameters(), last.model.parameters(), strict=True)
    assert not all(average.equal(weight) for average, weight in pairs)
    with pytest.raises(ConfigError, match=r"averages of plugins p0, p1 \(training\.ema_decay"):
        open_run(trained("p0", "p1"), weights="average", plugins=plugins)
    with pytest.raises(ConfigError, match="it has no average"):
        open_run(trained(), weights="average", plugins=plugins)


def test_what_is_not_there_is_said(run, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    root = run.folder / "checkpoints"
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (run.folder, {"step": 4}, r"no checkpoint of step 4 \(there are those of steps 3, 5, 6, 9"),
        (run.folder, {"weights": "first"}, r"weights: is 'first' \(one of last, best, average\)"),
        (run.folder, {"weights": "best", "step": 3}, "the best weights are of a step of their own"),
        (run.folder, {"device": "gpu"}, "hardware.device"),
        (run.folder, {"device": "cuda:99"}, "device: cuda:99 is not usable"),
        (run.folder, {"plugins": ["no:keeps", "no:moe"]}, "plugin moe has changed the structure"),
        (run.folder, {"plugins": ["no:keeps", "nix.py"]}, "nix.py"),
        (root / "step-00000003", {"step": 4}, "is the checkpoint of step 3, not of 4"),
        (root / "step-00000003", {"weights": "best"}, "is one checkpoint: it has no best"),
        (tmp_path / "nix", {}, "there is no such checkpoint or run folder"),
        (tmp_path / "file", {}, "is a file"),
    ]
    for path, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            open_run(path, **{"plugins": ["no:keeps"], **options})
    with pytest.raises(CheckpointError, match=r"no intact checkpoint in .*: there are none"):
        open_run(tmp_path / "empty")


def test_a_path_may_be_of_the_run_its_checkpoints_or_one_of_them(run, tmp_path):
    root = run.folder / "checkpoints"
    moved = Path(shutil.copytree(root / "step-00000003", tmp_path / "taken"))
    for path, step in ((root, run.result.step), (root / "step-00000003", 3), (moved, 3)):
        session = open_run(path, plugins="no:keeps")
        assert session.position.step == step
        assert session.schedule.horizon.last("step") == run.result.step
    # Beside the run, where training.checkpoint_dir said.
    away = tmp_path / "away"
    shutil.copytree(run.folder, away / "run")
    (away / "run" / "checkpoints").rename(away / "kept")
    for name, key in (("manifest.json", "checkpoint_dir"), ("profile.yaml", "")):
        file = away / "run" / name
        text = file.read_text(encoding="utf-8")
        if key:
            text = json.dumps({**json.loads(text), key: str(away / "kept")})
        else:
            text = text.replace("training:\n", f"training:\n  checkpoint_dir: {away}\n", 1)
        file.write_text(text, encoding="utf-8")
    assert open_run(away / "run", step=3, plugins="no:keeps").checkpoint.parent == away / "kept"


def test_a_run_that_was_shortened_from_the_command_line_opens(tmp_path):
    from apt_core.config import Override
    from apt_core.kernel import boot
    from apt_core.training import Trainer

    (tmp_path / "text.txt").write_text("A small text that is trained on.\n" * 20)
    keys = {
        "training.warmup_steps": 10,
        "training.max_steps": 2,
        "data.train_path": str(tmp_path / "text.txt"),
    }
    overrides = [Override(tuple(key.split(".")), value, f"--{key}") for key, value in keys.items()]
    Trainer(boot(TINY_PROFILE, overrides=overrides), output=tmp_path / "run").fit()
    assert open_run(tmp_path / "run").position.step == 2


def test_sessions_share_nothing(run):
    one, other = without(run), without(run)
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.zero_()
    one.manager.get_plugin("counts").steps = 0
    one.manager.set_state("voter", "quarantined", "here alone")
    with other.computing(), other.autocast():
        assert other.model(IDS).logits.equal(run.keeps.logits)
    assert states(other)["voter"] == "active"
    assert other.manager.get_plugin("counts").steps == run.result.step


# Small runs without a curriculum -----------------------------------------------------------------


WIDE = """
from apt_core import ProviderSpec, hookimpl
from apt_core.providers.ffn import FeedForwardProvider
from apt_core.modeling.layers import SwiGLU


class Wide(FeedForwardProvider):
    def create_layer(self, d_model, d_ff, dropout=0.0):
        return SwiGLU(d_model, 2 * d_ff, dropout)


@hookimpl
def apt_register_providers():
    return [ProviderSpec("ffn", "wide", Wide, requires=[])]


@hookimpl
def on_step_end(step):
    raise ValueError("no more")
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A run of four steps, two checkpoints, and a layer of a plugin that is quarantined."""
    (tmp_path / "wide.py").write_text(WIDE, encoding="utf-8")
    changes = {"model.ffn_name": "wide", "training.save_every_steps": 2, "evaluation.eval_freq": 0}
    file = str(tmp_path / "wide.py")
    tiny_run(file, steps=4, overrides=changes, output=tmp_path / "run", strict=False)
    (tmp_path / "run.txt").unlink()
    return tmp_path / "run"


def test_what_was_quarantined_stays_so_and_its_layers_are_used(small):
    session = open_run(small)
    assert states(session) == {"wide": "quarantined"}
    assert session.manager.records["wide"].failures[0].error == "ValueError: no more"
    assert session.model.blocks[0].ffn.down.weight.shape[1] == 2 * session.config.model.d_ff


def test_a_damaged_checkpoint_is_refused_as_by_a_resume(small):
    newest = list_checkpoints(small / "checkpoints")[-1]
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        file = newest / name
        data = file.read_bytes()
        file.write_bytes(data[:-9] + bytes(9))
        with pytest.raises(CheckpointError) as refused:
            tiny_run(small.parent / "wide.py", resume_from=newest, output=small.parent / "other")
        with pytest.raises(CheckpointError) as at_opening:
            open_run(newest)
        assert str(at_opening.value) == str(refused.value)
        assert open_run(small).position.step == 2
        file.write_bytes(data)
    (newest / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"there is no file 'state\.json' in it"):
        open_run(newest)


def test_another_implementation_and_weights_that_are_not_finite_are_refused(small, monkeypatch):
    with pytest.raises(ConfigError, match="wide"):
        open_run(small, plugins="no:wide")
    file = small.parent / "wide.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("requires=[]", 'requires=["not-there-at-all"]'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="ffn: the checkpoint was trained with 'wide', here"):
        open_run(small)
    file.write_text(text, encoding="utf-8")
    load = opened.model_tensors

    def spoilt(model: Any) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(
            opened, "call_buffers_loaded", lambda m: m.final_norm.weight.data.fill_(float("inf"))
        )
        return load(model)

    monkeypatch.setattr(opened, "model_tensors", spoilt)
    with pytest.raises(CheckpointError, match=r"its weights are not finite \(final_norm.weight\)"):
        open_run(small)


def test_a_checkpoint_that_is_deleted_meanwhile_gives_way_to_a_newer_one(small, monkeypatch):
    root, built = small / "checkpoints", opened._built
    gone: list[Path] = []

    def deleted(kernel: Any, found: Any, device: Any) -> Any:
        model = built(kernel, found, device)
        if not gone:
            gone.append(found.path)
            shutil.rmtree(found.path)
        return model

    monkeypatch.setattr(opened, "_built", deleted)
    kept = shutil.copytree(root / "step-00000004", small / "kept")
    assert open_run(small).position.step == 2
    assert gone == [root / "step-00000004"]
    shutil.copytree(kept, root / "step-00000004")
    gone.clear()
    for path, options in ((small, {"step": 4}), (root / "step-00000002", {})):
        with pytest.raises(CheckpointError, match="it was deleted while it was opened; a run that"):
            open_run(path, **options)
        gone.clear()


def test_a_folder_of_an_earlier_version_opens(small):
    """Its manifests say ``slot`` of providers, and only that of the run how long the text is."""
    for path in list_checkpoints(small / "checkpoints"):
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        del manifest["manifest_sha256"], manifest["data"]
        for row in manifest["providers"]:
            row["slot"] = row.pop("kind")
        whole = {**manifest, "manifest_sha256": scores.digest(manifest)}
        (path / "manifest.json").write_text(json.dumps(whole), encoding="utf-8")
    steps = open_run(small).schedule.horizon.steps
    assert steps is not None and steps.steps_per_epoch > 4
    (small / "manifest.json").unlink()
    session = open_run(small)
    assert session.schedule.horizon.steps is None and session.position.step == 4


def test_a_script_opens_a_run_without_the_trainer(small):
    script = f"""
    import sys
    from apt_core import GenerationRequest
    from apt_core.inference import generate
    from apt_core.runs import open_run

    session = open_run({str(small)!r})
    print(len(generate(session, GenerationRequest("The ", max_new_tokens=5)).token_ids))
    assert "apt_core.training.trainer" not in sys.modules
    """
    command = [sys.executable, "-c", dedent(script)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "5\n"
