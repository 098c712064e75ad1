"""The loop: loss, accumulation, the finite check, stopping, saving, hooks in their order."""

from __future__ import annotations

import errno
import json
import math
from unittest.mock import Mock

import pytest
import torch

from apt_core import StopTraining, hookimpl
from apt_core.config import Config
from apt_core.errors import ConfigError, PluginError, ProviderError, TrainingError
from apt_core.testing import TINY_PROFILE, Recorder, tiny_run
from apt_core.training import Trainer


def test_the_order_of_an_epoch():
    recorder = Recorder()
    tiny_run(recorder, steps=2, overrides={"training.max_epochs": 1})
    recorder.assert_order(
        "on_plugin_enabled", "on_training_start", "on_evaluation_start", "on_evaluation_end",
        "on_epoch_start", "on_step_start", "on_backward_end", "on_step_end", "on_step_start",
        "on_backward_end", "on_step_end", "on_metrics", "on_checkpoint_saved",
        "on_generation_start", "on_generation_end", "on_training_end",
    )  # fmt: skip


def test_steps_and_epochs_count_from_one_and_loss_is_a_0d_tensor():
    recorder = Recorder()
    run = tiny_run(recorder)
    steps = [a for name, a in recorder.calls if name == "on_step_end"]
    assert [a["step"] for a in steps] == list(range(1, run.result.step + 1))
    assert all(a["loss"].shape == () and not a["loss"].requires_grad for a in steps)
    assert [a["epoch"] for name, a in recorder.calls if name == "on_epoch_start"] == [1, 2]
    batches = [a["batch"] for name, a in recorder.calls if name == "on_step_start"]
    assert all(isinstance(batch, list) for batch in batches)


def test_the_loss_falls_and_the_figures_are_consistent():
    run = tiny_run(overrides={"training.max_epochs": 6, "training.learning_rate": 1e-2})
    figures = run.result.figures
    assert figures["val_loss"] < figures["val_loss_start"] - 0.5
    assert figures["val_ppl"] == pytest.approx(math.exp(figures["val_loss"]))
    # Of 85 bytes, and the end of the document.
    bits = figures["val_loss"] / math.log(2)
    assert figures["val_bpb"] == pytest.approx(bits * 86 / 85)
    rows = [row for row in run.metrics if "loss" in row]
    keys = {"step", "epoch", "tokens", "loss", "lr", "grad_norm", "tokens_per_s"}
    assert all(keys <= row.keys() for row in rows)


@pytest.mark.parametrize("steps", [0, 1])
def test_given_weights_take_the_place_of_the_initialisation(tmp_path, steps):
    def fill(model):
        for parameter in model.parameters():
            parameter.detach().fill_(0.25)

    trainer = Trainer(TINY_PROFILE, output=tmp_path / "run", weights=fill, stop_at_step=1)
    if not steps:
        trainer.request_stop("before the first step")
    result = trainer.fit()
    assert (result.status, result.step) == ("stopped", steps)
    first = {name: tensor for name, tensor in trainer.model.named_parameters()}
    alike = all(bool((tensor == 0.25).all()) for tensor in first.values())
    assert alike is (steps == 0)
    # With equal weights every token is as likely as each other.
    loss = result.figures["val_loss" if not steps else "val_loss_start"]
    assert loss == pytest.approx(math.log(256), abs=1e-4)
    assert ("val_loss_start" in result.figures) is (steps == 1)
    if not steps:
        again = Trainer(TINY_PROFILE, output=tmp_path / "run", resume=True, stop_at_step=1)
        assert again.fit().figures["val_loss_start"] == pytest.approx(math.log(256), abs=1e-4)


class Still:
    """Two modules are to train without dropout, from the start and from step 3 on; meanwhile an
    average of the weights computes something."""

    def __init__(self):
        self.seen = []

    @hookimpl
    def on_training_start(self, trainer):
        trainer.model.blocks[0].eval()

    @hookimpl
    def on_step_start(self, step, batch, trainer):
        if step == 3:
            trainer.model.blocks[0].attention.train()
            trainer.model.blocks[1].ffn.eval()
        trainer.average("still", 0.9).output(batch[0])
        self.look(trainer)

    @hookimpl
    def on_training_end(self, trainer):
        self.look(trainer)

    def look(self, trainer):
        modes = {name: module.training for name, module in trainer.model.named_modules()}
        self.seen.append({name for name, training in modes.items() if not training})


def test_every_module_keeps_its_own_mode_over_evaluations_averages_and_the_sample():
    settings = {"model.num_layers": 2, "model.dropout": 0.5, "training.ema_decay": 0.9}
    often, never = Still(), Still()
    runs = [
        tiny_run(still, steps=6, overrides={**settings, "evaluation.eval_freq": every})
        for still, every in ((often, 1), (never, 0))
    ]
    assert runs[0].same_weights(runs[1])
    assert often.seen == never.seen and len(often.seen) == 7
    assert all(name.startswith("blocks.0") for name in often.seen[0])
    assert {"blocks.0", "blocks.0.attention", "blocks.0.ffn"} <= often.seen[0]
    assert often.seen[2] == often.seen[-1] and {"blocks.1.ffn", "blocks.0.ffn"} <= often.seen[-1]
    assert not {"blocks.0.attention", "blocks.1"} & often.seen[-1]


class Gradients:
    """Keeps the gradients of the first step."""

    def __init__(self):
        self.seen = {}

    @hookimpl
    def on_backward_end(self, step, trainer):
        if step == 1:
            self.seen = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}


def first_gradients(batch_size, accumulate, **overrides):
    plugin = Gradients()
    changes = {"training.batch_size": batch_size, "training.grad_accum_steps": accumulate}
    tiny_run(plugin, steps=1, overrides={**changes, **overrides})
    return plugin.seen


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_gives_the_gradients_of_one_large_batch(batch_size, accumulate):
    """Windows of 100 tokens leave a ragged last one, which a mean of means would overweight."""
    ragged = {"model.max_seq_len": 100}
    whole = first_gradients(8, 1, **ragged)
    parts = first_gradients(batch_size, accumulate, **ragged)
    for name, gradient in whole.items():
        # Sums of fp32 in another order: an entry may be off by a rounding of the larger ones.
        largest = gradient.abs().max().item()
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-5 * largest)


class Scaled:
    """A constant multiple of the mean logit as a loss term."""

    def __init__(self, weight):
        self.weight = weight

    @hookimpl
    def apt_loss_terms(self, output):
        return {"term": self.weight * output.logits.square().mean()}


def test_a_loss_term_trains_and_is_logged():
    plain, term = tiny_run(steps=4), tiny_run(Scaled(0.1), steps=4)
    assert not plain.same_weights(term)
    assert any("loss/scaled.term" in row for row in term.metrics)


def test_a_loss_term_of_weight_zero_changes_nothing():
    assert tiny_run(steps=4).same_weights(tiny_run(Scaled(0.0), steps=4))


@pytest.mark.parametrize(
    "result",
    [5, {"term": 1.0}, {"term": torch.ones(2)}, [torch.tensor(1.0)]],
    ids=["no mapping", "no tensor", "no scalar", "a list"],
)
def test_a_loss_term_that_is_none_quarantines_its_plugin(result):
    class Wrong:
        @hookimpl
        def apt_loss_terms(self):
            return result

    run = tiny_run(Wrong(), steps=3, strict=False)
    assert run.manager.records["wrong"].state == "quarantined"
    assert len(run.manager.records["wrong"].failures) == 1
    assert run.same_weights(tiny_run(steps=3))


class Poison:
    """Makes the gradients of some steps not finite, and watches the weights."""

    def __init__(self, steps, value=float("nan")):
        self.steps, self.value, self.moved = steps, value, []

    @hookimpl
    def on_backward_end(self, step, trainer):
        parameter = next(trainer.model.parameters())
        self.before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        self.moments = [
            tensor.clone() for s in trainer.optimizer.state.values() for tensor in s.values()
        ]
        if step in self.steps:
            parameter.grad[0, 0] = self.value

    @hookimpl
    def on_step_end(self, step, trainer):
        same = all(p.equal(self.before[n]) for n, p in trainer.model.named_parameters())
        after = [t for s in trainer.optimizer.state.values() for t in s.values()]
        if self.moments:
            same = same and all(a.equal(b) for a, b in zip(self.moments, after, strict=True))
        if not same:
            self.moved.append(step)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(value):
    poison = Poison({3, 4}, value)
    run = tiny_run(poison, steps=6)
    assert poison.moved == [1, 2, 5, 6]
    assert run.metrics[-2]["skipped_steps"] == 2


def test_too_many_such_steps_in_a_row_end_the_run():
    with pytest.raises(TrainingError, match="learning_rate"):
        tiny_run(Poison(set(range(3, 20))), overrides={"training.max_nonfinite_steps": 4})


def test_single_bad_steps_do_not_end_the_run():
    run = tiny_run(Poison({2, 4, 6, 8}), steps=9, overrides={"training.max_nonfinite_steps": 2})
    assert run.result.status == "finished"


HOOKS = ["on_training_start", "on_epoch_start", "on_step_start", "on_backward_end", "on_step_end",
         "on_metrics", "on_evaluation_end", "on_checkpoint_saved", "on_epoch_end",
         "on_training_end", "on_generation_start"]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
def test_stop_training_ends_cleanly_from_any_hook(hook):
    def stop():
        raise StopTraining("seen enough")

    class Stopper:
        pass

    stopper = Stopper()
    setattr(stopper, hook, hookimpl(specname=hook)(stop))
    run = tiny_run(stopper)
    assert run.result.exit_code == 0
    assert run.manifest["status"] in ("stopped", "finished")
    assert run.manager.records["stopper"].failures == []


def test_max_steps_ends_in_mid_epoch_with_a_whole_evaluation():
    run = tiny_run(steps=5)
    assert (run.result.step, run.result.status) == (5, "finished")
    assert "val_loss" in run.result.figures


def test_checkpoints_are_kept_and_pruned_as_asked(tmp_path):
    tiny_run(
        output=tmp_path / "run",
        overrides={"training.save_every_steps": 3, "training.keep_last": 2},
    )
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000021", "step-00000024"]


def test_the_best_checkpoint_is_kept(tmp_path):
    """The rate is so high that the first epoch stays the best."""
    tiny_run(
        output=tmp_path / "run",
        overrides={
            "training.max_epochs": 4, "training.keep_last": 1, "training.learning_rate": 1e-3,
            "evaluation.save_best": True,
        },
    )  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert "step-00000048" in names


def test_a_full_disk_costs_one_checkpoint(tmp_path, monkeypatch, caplog):
    from apt_core.runs import checkpoint

    write, calls = checkpoint.write_whole, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "write_whole", full)
    run = tiny_run(output=tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000024"]
    assert "No space left" in run.manifest["failed_checkpoints"][0]


def test_a_final_checkpoint_that_cannot_be_written_fails_the_run(tmp_path, monkeypatch):
    from apt_core.runs import checkpoint

    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_whole", full)
    with pytest.raises(TrainingError, match="No space left"):
        tiny_run(output=tmp_path / "run", steps=2)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_provider_that_fails_in_training_is_named(tmp_path):
    path = tmp_path / "fragile.py"
    path.write_text(
        "from torch import nn\nfrom apt_core import ProviderSpec, hookimpl\n\n"
        "class Layer(nn.Module):\n"
        "    def __init__(self, d):\n        super().__init__()\n"
        "        self.linear, self.calls = nn.Linear(d, d), 0\n"
        "    def forward(self, x):\n        self.calls += 1\n"
        "        if self.calls > 5:\n            raise RuntimeError('kernel died')\n"
        "        return self.linear(x)\n\n"
        "class Provider:\n"
        "    def __init__(self, config): pass\n"
        "    def create_layer(self, d_model, d_ff, dropout=0.0): return Layer(d_model)\n\n"
        "@hookimpl\ndef apt_register_providers():\n"
        "    return [ProviderSpec('ffn', 'fragile', Provider)]\n",
        encoding="utf-8",
    )
    with pytest.raises(ProviderError, match=r"ffn:fragile of plugin fragile .*fragile\.py:11"):
        tiny_run(str(path), overrides={"model.ffn_name": "fragile"})


def test_a_trainer_takes_a_plain_dict(tmp_path, monkeypatch):
    from apt_core.training import Trainer

    monkeypatch.chdir(tmp_path)
    result = Trainer(
        {
            "name": "from a dict",
            "model": {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 16},
            "training": {"max_steps": 2, "batch_size": 2},
            "evaluation": {"sample_tokens": 0, "eval_batches": 1},
        }
    ).fit()
    assert result.step == 2
    assert result.folder.parent.name == "from_a_dict"
    assert (result.folder / "manifest.json").exists()


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        tiny_run(overrides={"model.vocab_size": 100})


def test_the_plugins_generator_is_a_function_of_seed_plugin_and_step():
    class Draws:
        drawn = None

        @hookimpl
        def on_step_end(self, step, trainer):
            if step == 2:
                self.drawn = torch.rand(3, generator=trainer.rng("draws"))

    first, second = Draws(), Draws()
    tiny_run(first, steps=2)
    torch.manual_seed(99)
    tiny_run(second, steps=4, overrides={"training.min_lr_ratio": 1.0})
    assert first.drawn.equal(second.drawn)


def test_what_loggers_are_given_is_theirs_to_change():
    class Greedy:
        @hookimpl
        def on_metrics(self, metrics):
            metrics.pop("loss", None)

        @hookimpl
        def on_evaluation_end(self, metrics):
            metrics.clear()

        @hookimpl
        def on_step_start(self, batch):
            batch.clear()

    run = tiny_run(Greedy())
    assert run.same_weights(tiny_run())
    assert run.result.figures["val_loss"] > 0


def test_a_stop_in_the_final_evaluation_leaves_the_rest_of_the_end():
    class EarlyStopping(Recorder):
        @hookimpl
        def on_evaluation_end(self, trainer):
            if trainer.step:
                raise StopTraining("no better")

    recorder = EarlyStopping(["on_training_end", "on_metrics", "on_generation_end"])
    run = tiny_run(recorder)
    assert run.manifest["status"] == "stopped"
    assert recorder.count("on_training_end") == recorder.count("on_generation_end") == 1
    rows = [row for row in run.metrics if "val_loss" in row]
    assert [row["step"] for row in rows] == [0, 4, 4]
    assert recorder.count("on_metrics") == len(run.metrics)


def test_a_trainer_takes_strict_from_its_arguments_and_not_beside_a_kernel(tmp_path):
    from apt_core.kernel import boot
    from apt_core.plugin_manager import PluginManager
    from apt_core.training import Trainer

    class Fails:
        @hookimpl
        def on_training_start(self):
            raise ValueError("boom")

    manager = PluginManager()
    manager.register(Fails())
    profile = {**TINY_PROFILE, "data": {"source": "pydoc"}}
    with pytest.raises(PluginError, match="boom"):
        Trainer(profile, manager, strict=True, output=tmp_path / "run").fit()
    with pytest.raises(ValueError, match="boot"):
        Trainer(boot(profile), strict=True)


def test_a_term_that_is_not_finite_is_named_when_the_run_ends():
    with pytest.raises(TrainingError, match=r"loss/scaled\.term"):
        tiny_run(Scaled(float("nan")), overrides={"training.max_nonfinite_steps": 3})


class FailsBackwards(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError("no way back")


def test_a_term_that_fails_in_the_backward_pass_is_named():
    class Term:
        @hookimpl
        def apt_loss_terms(self, output):
            return {"bad": FailsBackwards.apply(output.logits.mean())}

    with pytest.raises(PluginError, match=r"plugin term failed in backward .*no way back"):
        tiny_run(Term())


def test_terms_are_not_blamed_for_what_fails_after_the_backward_pass(monkeypatch):
    broken = Mock(side_effect=RuntimeError("the evaluation broke"))  # raised by another file

    class Breaks(Scaled):
        @hookimpl
        def on_step_end(self):
            monkeypatch.setattr("apt_core.training.evaluating.score_batches", broken)

    with pytest.raises(RuntimeError, match=r"^the evaluation broke$"):
        tiny_run(Breaks(0.1))


def test_figures_that_are_not_finite_are_valid_json(tmp_path):
    def no_constants(text):
        raise AssertionError(f"{text} is not JSON")

    class Metrics:
        @hookimpl
        def apt_metrics(self):
            return {"nan": float("nan"), "inf": float("inf")}

    tiny_run(Metrics(), output=tmp_path / "run", steps=4)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constants)
    json.loads((tmp_path / "run" / "manifest.json").read_text(), parse_constant=no_constants)


def test_a_schedule_enables_a_plugin_at_its_moment():
    class Late:
        def __init__(self):
            self.epochs, self.told = [], []

        @hookimpl
        def on_epoch_start(self, epoch):
            self.epochs.append(epoch)

        @hookimpl
        def on_plugin_enabled(self, plugin, trainer):
            self.told.append((plugin, trainer.epoch, trainer.step))

    late = Late()
    run = tiny_run(late, overrides={"schedules": {"enable_late_at_epoch": 2}})
    assert late.epochs == [2]
    assert late.told == [("late", 2, run.result.step // 2)]
    assert run.manifest["plugins"][0]["state"] == "active"


def test_the_resolved_profile_in_the_folder_gives_the_same_run(tmp_path):
    from apt_core.config import read_profile, validate

    tiny_run(output=tmp_path / "run", steps=2, overrides={"model.tva.s": 0})
    source = read_profile(tmp_path / "run" / "profile.yaml")
    config = validate(source).require()
    assert isinstance(config, Config)
    assert (config.model.tva.s, config.training.max_steps) == (0, 2)


@pytest.mark.parametrize("replaces", [False, True])
def test_parameters_that_no_optimizer_has_end_the_run_and_cost_no_checkpoint(tmp_path, replaces):
    class Adds:
        def __init__(self, at):
            self.at = at

        @hookimpl
        def on_training_start(self, trainer):
            self.put(trainer, 0)

        @hookimpl
        def on_step_end(self, step, trainer):
            self.put(trainer, step)

        def put(self, trainer, step):
            if step == self.at and replaces:
                old = trainer.model.embedding.weight
                trainer.model.embedding.weight = torch.nn.Parameter(old.detach().clone())
            elif step == self.at:
                trainer.model.extra = torch.nn.Linear(2, 2)

    name = r"embedding\.weight" if replaces else r"extra\.weight, extra\.bias"
    with pytest.raises(TrainingError, match=f"the optimizer does not have {name}"):
        tiny_run(Adds(0))
    saving = {"training.save_every_steps": 2}
    with pytest.raises(TrainingError, match=f"the optimizer does not have {name}"):
        tiny_run(Adds(3), output=tmp_path / "run", overrides=saving)
    names = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names == ["step-00000002"]
    resumed = tiny_run(Adds(None), output=tmp_path / "run", overrides=saving, resume=True)
    assert resumed.same_weights(tiny_run(Adds(None), overrides=saving))
