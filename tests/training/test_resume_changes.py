"""What may differ on a resume is judged by what it comes to: the past must be that of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core import ProviderSpec, SectionSpec, hookimpl
from apt_core.errors import CheckpointError, ConfigError, ProviderError
from apt_core.providers.lr_schedule import LRScheduleProvider
from apt_core.providers.optimizer import OptimizerProvider
from apt_core.runs.resume_check import saved_config
from apt_core.testing import TINY_PROFILE, tiny_run
from apt_core.testing.tiny import TEXT

PROFILE = {
    **TINY_PROFILE,
    "training": {**TINY_PROFILE["training"], "save_freq": 0, "max_steps": 10},
    "evaluation": {"eval_freq": 0, "sample_tokens": 0},
}
"""Ten steps, of which an epoch has twelve."""


class Stair(LRScheduleProvider):
    """1, but a tenth in the third quarter of the run."""

    def factor(
        self, step: int, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0
    ) -> float:
        return 0.1 if 0.55 < step / total_steps < 0.9 else 1.0


class Pulling:
    """A learning-rate schedule, and a loss term with an annealed weight."""

    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        return [ProviderSpec("lr_schedule", "stair", Stair, summary="a dip")]

    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [SectionSpec(schedule_params=("pull",))]

    @hookimpl
    def apt_loss_terms(self, trainer: Any, output: Any) -> dict[str, Any]:
        return {"logits": trainer.param("pull", 0.0) * output.logits.square().mean()}


@pytest.fixture
def train(tmp_path: Path) -> Any:
    """Train to ``stop``, then resume with what ``changes``; the same text for every run."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    count = iter(range(99))

    def call(stop: int, first: dict[str, Any], changes: dict[str, Any]) -> Any:
        profile = {**PROFILE, "data": {"train_path": str(text)}}
        output = tmp_path / f"run{next(count)}"
        tiny_run(Pulling(), profile=profile, overrides=first, output=output, stop_at_step=stop)
        both = {**first, **changes}
        return tiny_run(
            Pulling(),
            profile=profile,
            overrides=both,
            output=output,
            resume=True,
            strict=False,
        )

    def whole(overrides: dict[str, Any]) -> Any:
        profile = {**PROFILE, "data": {"train_path": str(text)}}
        return tiny_run(Pulling(), profile=profile, overrides=overrides)

    call.whole = whole
    return call


STAIR = {"training.lr_schedule_name": "stair"}
CONSTANT = {"training.lr_schedule_name": "constant"}
WSD = {"training.lr_schedule_name": "wsd", "training.decay_ratio": 0.5}
LONGER = {"training.max_steps": 16}
RAMP = {"start": 0.5, "end": 0.0}
BY_EPOCH = {**CONSTANT, "schedules.pull": RAMP, "training.max_steps": 14}
BY_STEP = {**CONSTANT, "schedules.pull": {**RAMP, "by": "step"}}


@pytest.mark.parametrize(
    ("stop", "first", "changes", "why"),
    [
        (6, STAIR, LONGER, "step 6 was 0.1 of its peak, and would have been 1"),
        (9, WSD, {"training.max_tokens": 10000, "training.max_steps": 20}, "rate of step 6 was"),
        (3, {}, LONGER, "learning rate of step 1 was"),
        (3, BY_STEP, LONGER, r"schedules\.pull was .* in step 2"),
        (
            9,
            {**CONSTANT, "training.max_steps": 13, "schedules.pull": {**RAMP, "by": "step"},
             "schedules.enable_Pulling_at_step": 8},
            LONGER,
            r"schedules\.pull was .* in step 9",
        ),
    ],
)  # fmt: skip
def test_another_length_is_refused_where_it_would_have_changed_the_past(
    train, stop, first, changes, why
):
    with pytest.raises(ConfigError, match=rf"training\.max_steps.*{why}"):
        train(stop, first, changes)


@pytest.mark.parametrize(
    ("stop", "first", "changes"),
    [
        (5, STAIR, LONGER),
        (5, WSD, LONGER),
        (1, BY_STEP, LONGER),
        (8, {**BY_STEP, "schedules.enable_Pulling_at_step": 8}, LONGER),
        (5, BY_EPOCH, {"training.max_steps": 18}),
        (5, {**CONSTANT, "schedules.pull": {**RAMP, "by": "step", "until": 8}}, LONGER),
        (5, {}, {"training.max_epochs": 9}),
        (5, BY_STEP, {"training.max_tokens": 10 * 64, "training.max_epochs": 7}),
    ],
)  # fmt: skip
def test_another_length_with_the_same_past_is_the_run_of_that_length(train, stop, first, changes):
    assert train(stop, first, changes).same_weights(train.whole({**first, **changes}))


class Cut(LRScheduleProvider):
    """Raises beyond the end of the run, where its contract wants a number."""

    def factor(
        self, step: int, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0
    ) -> float:
        return ([0.0] + [1.0] * total_steps)[step]


def test_a_schedule_that_fails_at_a_resume_is_named(tmp_path):
    class Brings:
        @hookimpl
        def apt_register_providers(self) -> list[ProviderSpec]:
            return [ProviderSpec("lr_schedule", "cut", Cut, summary="ends with the run")]

    cut = {"training.lr_schedule_name": "cut"}
    run: dict[str, Any] = {"profile": PROFILE, "output": tmp_path / "run"}
    tiny_run(Brings(), **run, overrides=cut, stop_at_step=8)
    shorter = {**cut, "training.max_steps": 6}
    with pytest.raises(ProviderError, match=r"lr_schedule:cut of plugin brings failed.*IndexError"):
        tiny_run(Brings(), **run, overrides=shorter, resume=True)


def test_the_same_text_at_another_path_is_the_same(train, tmp_path, caplog):
    copy = tmp_path / "copy.txt"
    copy.write_text(TEXT, encoding="utf-8")
    run = train(4, {}, {"data.train_path": str(copy)})
    assert run.same_weights(train.whole({}))
    assert "data.train_path differs from the checkpoint's profile" in caplog.messages
    copy.write_text(TEXT.replace("apples", "lemons"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.train_path.*another text"):
        train(4, {}, {"data.train_path": str(copy)})


def test_a_key_may_differ_where_what_it_comes_to_does_not(train):
    same = {
        "data.max_length": 16,
        "model.num_kv_heads": 2,
        "model.tva.rank": 4,
        "model.tva.qk_norm": False,  # as it is by itself at this rank, and was at any one
        "training.decay_ratio": 0.7,
        "training.muon.momentum": 0.5,
        "hardware.device": "auto",
    }
    run = train(4, {}, same)
    assert run.same_weights(train.whole({}))
    for key, value in {
        "data.max_length": 8,
        "model.num_kv_heads": 1,
        "model.tva.qk_norm": True,
        "training.weight_decay": 0.02,
    }.items():
        with pytest.raises(ConfigError, match=rf"{key}.*it changes how the weights train"):
            train(4, {}, {key: value})


def test_a_profile_that_was_accepted_then_is_known_though_it_would_be_refused_today() -> None:
    """A warm-up that the run does not reach the end of has been taken."""
    config = saved_config({"training": {"warmup_steps": 50, "max_steps": 12}})
    assert config is not None and config.training.warmup_steps == 50


class Grouping:
    """Chooses a group, brings the optimizer and keeps an average of the weights."""

    def __init__(self, lr_scale: float = 0.5, weight_decay: float = 0.0, **more: float) -> None:
        self.group = {"lr_scale": lr_scale, "weight_decay": weight_decay}
        self.momentum, self.decay = more.get("momentum", 0.0), more.get("decay", 0.9)
        self.decays: list[float] = []

    @hookimpl
    def apt_param_groups(self, model: Any) -> list[dict[str, Any]]:
        return [{"params": [model.embedding.weight], **self.group}]

    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        momentum = self.momentum

        class Descent(OptimizerProvider):
            def create(self, param_groups: Any, **rates: float) -> Any:
                lr, decay = rates["learning_rate"], rates["weight_decay"]
                return torch.optim.SGD(param_groups, lr=lr, weight_decay=decay, momentum=momentum)

        return [ProviderSpec("optimizer", "descent", Descent, summary="SGD")]

    @hookimpl
    def on_step_start(self, trainer: Any) -> None:
        average = trainer.average("grouping", self.decay)
        self.decays.append(average.decay)
        average.decay += 0.01


GROUPS: tuple[tuple[dict[str, float], str], ...] = (
    ({"weight_decay": 0.1}, "weight_decay of embedding.weight is 0.1 and was 0.0"),
    ({"lr_scale": 0.25}, "lr of embedding.weight is 0.00025 and was 0.0005"),
    ({"momentum": 0.9}, "momentum of embedding.weight is 0.9 and was 0.0"),
    ({"lr_scale": 1.0, "weight_decay": 0.01}, "other parameter groups"),
)


def test_what_a_group_is_made_with_changes_whole_or_not_at_all(tmp_path):
    profile = {**PROFILE, "training": {**PROFILE["training"], "optimizer_name": "descent"}}
    profile["training"]["scale_lr_by_width"] = False
    output = tmp_path / "run"
    tiny_run(Grouping(), profile=profile, output=output, stop_at_step=3)
    for changed, words in GROUPS:
        with pytest.raises(ConfigError, match=rf"plugins: .*{words}.*\(.*grouping\)"):
            tiny_run(Grouping(**changed), profile=profile, output=output, resume=True)
    whole = tiny_run(Grouping(), profile=profile)
    assert tiny_run(Grouping(), profile=profile, output=output, resume=True).same_weights(whole)


@pytest.mark.parametrize("allowed", ["training.gradient_clip", "training.learning_rate"])
def test_a_rate_that_may_change_excuses_no_edited_group(tmp_path, allowed):
    profile = {**PROFILE, "training": {**PROFILE["training"], "optimizer_name": "descent"}}
    profile["training"]["scale_lr_by_width"] = False
    rate = profile["training"].get("learning_rate", 1e-4)
    told = {"training.learning_rate": rate / 2} if allowed == "training.learning_rate" else {}
    again = {"profile": profile, "output": tmp_path / "run", "resume": True, "overrides": told}
    tiny_run(Grouping(), profile=profile, output=tmp_path / "run", stop_at_step=3)
    with pytest.raises(ConfigError, match=r"plugins: .*lr of embedding\.weight"):
        tiny_run(Grouping(lr_scale=0.25), allow_change=[allowed], **again)
    run = tiny_run(Grouping(), allow_change=[allowed], **again)
    assert run.result.status == "finished"


def test_an_average_goes_on_with_the_decay_that_is_asked_for_after_a_resume(tmp_path, caplog):
    output = tmp_path / "run"
    tiny_run(Grouping(), profile=PROFILE, output=output, stop_at_step=3)
    same, other = Grouping(), Grouping(decay=0.5)
    tiny_run(same, profile=PROFILE, output=output, resume=True, stop_at_step=5)
    assert same.decays == pytest.approx([0.93, 0.94])
    assert "goes on with decay" not in caplog.text
    tiny_run(other, profile=PROFILE, output=output, resume=True)
    assert other.decays == pytest.approx([0.5, 0.51, 0.52, 0.53, 0.54])
    assert "average of plugin grouping goes on with decay 0.5, asked was 0.9" in caplog.text


class Norms:
    """A norm that cannot be used where something is ``missing``."""

    def __init__(self, missing: tuple[str, ...]) -> None:
        self.missing = missing

    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        factory = "apt_core.modeling.layers.norm:LayerNormProvider"
        return [ProviderSpec("norm", "mine", factory, requires=self.missing)]


def test_a_resume_with_another_provider_than_before_says_which_key_names_it(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"overrides": {"model.norm_name": "mine"}, "output": tmp_path / "run"}
    tiny_run(Norms(("no-such-package",)), **options, stop_at_step=1, strict=False)
    with pytest.raises(CheckpointError) as caught:
        tiny_run(Norms(()), **options, resume=True)
    assert str(caught.value).endswith(
        "norm: the checkpoint was trained with 'rmsnorm', here 'mine' would run; "
        "name 'rmsnorm' in model.norm_name"
    )
