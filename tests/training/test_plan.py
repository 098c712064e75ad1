"""The dry run: what the model costs by its providers' own figures, and what they do not claim."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from apt_core import ProviderSpec, hookimpl
from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.data.loading import load_data
from apt_core.kernel import Kernel, boot
from apt_core.modeling import ModelBuilder
from apt_core.modeling.costs import support_notices
from apt_core.modeling.layers import MHAProvider
from apt_core.planning import calibration
from apt_core.planning.calibration import measured_size
from apt_core.planning.data import planned_data
from apt_core.planning.footprint import Footprint
from apt_core.planning.memory import estimate
from apt_core.planning.plan import make_plan, print_plan
from apt_core.plugin_manager import PluginManager
from apt_core.providers import DatasetProvider
from apt_core.providers.attention import AttentionSupport

SIZES = {"d_model": 32, "num_heads": 4, "d_ff": 48, "num_layers": 2, "max_seq_len": 16}
CPU = torch.device("cpu")


class Recomputing(MHAProvider):
    """Its layers claim nothing but masks."""

    supports = AttentionSupport(cache=False, mask=True, autocast=False, compile=False)


class Failing(MHAProvider):
    def flops(self, *args: Any, **options: Any) -> int:
        raise RuntimeError("no idea")

    def kv_cache_bytes(self, *args: Any, **options: Any) -> int:
        return -7


class Duck:
    """A provider that is none of the core's classes and has the one method that is needed."""

    def __init__(self, config: Any) -> None:
        self._inner = MHAProvider(config)

    def create_layer(self, d_model: int, num_heads: int, **options: Any) -> nn.Module:
        return self._inner.create_layer(d_model, num_heads, **options)


class Unending(DatasetProvider):
    """A thousand bytes of text, and then an error."""

    def documents(self) -> Iterator[str]:
        for self.read in range(100):
            yield "some words"
        raise RuntimeError("everything was read")

    def share_read(self) -> float:
        return (self.read + 1) / 100


class Plugin:
    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        factories = {"recomputing": Recomputing, "failing": Failing, "duck": Duck}
        found = [ProviderSpec("attention", name, factory) for name, factory in factories.items()]
        return [*found, ProviderSpec("dataset", "unending", Unending)]


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SECONDS", 0.005)


@pytest.fixture
def kernel_of() -> Callable[..., Kernel]:
    """A kernel for keys of the section ``model`` and of others, with the providers above."""

    def make(model: dict[str, Any] | None = None, **sections: Any) -> Kernel:
        manager = PluginManager()
        manager.register(Plugin(), "thirds")
        model = {**SIZES, **(model or {})}
        return boot({"hardware": {"device": "cpu"}, **sections, "model": model}, manager=manager)

    return make


def rows(plan: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [part for part in plan["model"]["parts"] if part["kind"] == kind]


# FLOPs


@pytest.mark.parametrize(
    "model",
    [
        {"attention_name": "mha"},
        {"attention_name": "mha", "num_kv_heads": 2, "ffn_name": "gelu", "tie_embeddings": False},
        {"attention_name": "mha", "num_kv_heads": 1, "ffn_name": "vft", "position_name": "learned"},
        {"attention_name": "mha", "num_kv_heads": 2, "mha": {"head_dim": 20}},
        {"attention_name": "mha", "ffn_name": "relu2", "norm_name": "layernorm"},
    ],
)
def test_flops_are_three_times_those_that_torch_counts_in_a_forward(kernel_of, model) -> None:
    kernel = kernel_of(model, data={"max_length": 8})
    # On the meta device no kernel for causal attention halves the scores.
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ModelBuilder(kernel.config, kernel.registry).build_model()(torch.zeros(1, 8, dtype=int))
    (stage,) = make_plan(kernel)["stages"]
    assert stage["flops_per_token"] * 8 == 3 * counter.get_total_flops()


def test_each_attention_of_a_pattern_counts_with_its_layers(kernel_of) -> None:
    three = {"num_layers": 3}
    plan = make_plan(kernel_of({**three, "attention_pattern": ["mha", "tva_default", "mha"]}))
    mha, tva = rows(plan, "attention")
    assert [(row["used"], row["layers"]) for row in (mha, tva)] == [("mha", 2), ("tva_default", 1)]
    mha_alone, tva_alone = (
        rows(make_plan(kernel_of({**three, "attention_name": name})), "attention")[0]
        for name in ("mha", "tva_default")
    )
    for key in ("params", "flops_per_token", "kv_cache_bytes_per_token"):
        assert mha[key] == 2 * mha_alone[key] // 3
        assert tva[key] == tva_alone[key] // 3
    (stage,) = plan["stages"]
    parts = plan["model"]["parts"]
    assert stage["flops_per_token"] == sum(part["flops_per_token"] for part in parts)
    assert stage["params_total"] == sum(part["params"] for part in parts)


# The cache


def test_the_cache_is_counted_in_bf16_for_all_layers(kernel_of) -> None:
    def cache(**model: Any) -> dict[str, Any]:
        plan = make_plan(kernel_of(model))
        assert plan["model"]["kv_cache_dtype"] == "bfloat16"
        return plan["stages"][0]

    mha = cache(attention_name="mha")
    assert mha["kv_cache_bytes_per_token"] == 2 * 32 * 2 * 2  # keys and values of d_model, 2 layers
    assert mha["kv_cache_bytes_per_sequence"] == 16 * mha["kv_cache_bytes_per_token"]
    wide = cache(attention_name="mha", mha={"head_dim": 24})
    assert wide["kv_cache_bytes_per_token"] == 3 * mha["kv_cache_bytes_per_token"]
    grouped = cache(attention_name="mha", num_kv_heads=1)
    assert grouped["kv_cache_bytes_per_token"] * 4 == mha["kv_cache_bytes_per_token"]
    compressed = cache(tva={"r": 4})
    assert compressed["kv_cache_bytes_per_token"] * 4 == mha["kv_cache_bytes_per_token"]


def test_a_model_with_attention_that_recomputes_has_no_cache(kernel_of) -> None:
    plan = make_plan(kernel_of({"attention_pattern": ["mha", "recomputing"]}))
    mha, recomputing = rows(plan, "attention")
    assert mha["kv_cache_bytes_per_token"] > 0
    assert recomputing["kv_cache_bytes_per_token"] is None
    assert plan["stages"][0]["kv_cache_bytes_per_token"] is None
    (notice,) = plan["notices"]
    assert notice.startswith("model.attention_pattern: attention:recomputing (plugin thirds) has")
    assert "none, for recomputing has none" in printed(plan)


# Providers that cannot tell


def test_a_figure_that_a_provider_cannot_give_is_null_and_said_so(kernel_of) -> None:
    plan = make_plan(kernel_of({"attention_name": "failing"}))
    (part,) = rows(plan, "attention")
    assert part["flops_per_token"] is None and part["kv_cache_bytes_per_sequence"] is None
    assert plan["stages"][0]["flops_per_token"] is None
    assert rows(plan, "ffn")[0]["flops_per_token"] > 0
    assert plan["notices"] == [
        "attention:failing (plugin thirds) failed in flops(): RuntimeError: no idea",
        "attention:failing (plugin thirds) failed in kv_cache_bytes(): ValueError: -7 is negative",
    ]
    assert "unknown" in printed(plan)


def test_a_provider_without_the_base_class_does_not_break_the_plan(kernel_of) -> None:
    plan = make_plan(kernel_of({"attention_name": "duck"}, training={"compile": True}))
    (part,) = rows(plan, "attention")
    assert part["params"] > 0 and part["layers"] == 2
    assert part["flops_per_token"] is None and part["supports"] is None
    assert plan["notices"] == [
        "attention:duck (plugin thirds) has no flops(): the figure is unknown",
        "attention:duck (plugin thirds) has no kv_cache_bytes(): the figure is unknown",
    ]
    assert "unknown" in printed(plan)


# What attention claims


def test_an_attention_that_does_not_claim_what_training_asks_for_is_named(kernel_of) -> None:
    training = {"compile": True, "mixed_precision": True}
    kernel = kernel_of({"attention_pattern": ["mha", "recomputing"]}, training=training)
    plan = make_plan(kernel)
    _, compiling, casting = plan["notices"]
    assert compiling.startswith("training.compile: attention:recomputing (plugin thirds)")
    assert casting.startswith("training.mixed_precision: attention:recomputing (plugin thirds)")
    assert rows(plan, "attention")[1]["supports"] == {
        "cache": False, "mask": True, "autocast": False, "compile": False,
    }  # fmt: skip
    assert compiling in printed(plan)


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("mha", {"compile": True, "mixed_precision": True}),
        ("recomputing", {"compile": False, "mixed_precision": False}),
        ("recomputing", {"compile": False, "mixed_precision": "auto"}),
    ],
)
def test_nothing_is_said_where_nothing_is_asked_in_vain(kernel_of, name, training) -> None:
    assert support_notices(kernel_of({"attention_name": name}, training=training), CPU) == []


# Parameters


def test_parameters_are_those_of_the_model_by_part(kernel_of) -> None:
    kernel = kernel_of({"position_name": "learned", "tie_embeddings": False})
    model = ModelBuilder(kernel.config, kernel.registry).build_model()
    plan = make_plan(kernel)

    def total(word: str) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if word in name.split("."))

    norms = ("attention_norm", "ffn_norm", "final_norm")
    expected = {
        "attention": total("attention"),
        "ffn": total("ffn"),
        "norm": sum(map(total, norms)),
        "embeddings": total("embedding") + total("position") + total("head"),
    }
    assert {part["kind"]: part["params"] for part in plan["model"]["parts"]} == expected
    assert plan["stages"][0]["params_total"] == sum(p.numel() for p in model.parameters())


# Memory and the batch


def test_a_stage_has_the_memory_of_one_process_by_part(kernel_of) -> None:
    kernel = kernel_of(training={"ema_decay": 0.9})
    plan = make_plan(kernel)
    (stage,) = plan["stages"]
    assert stage["memory"] == estimate(Footprint(kernel)).row()
    assert stage["memory_mb"] == round(stage["memory"]["total"] / 2**20, 1)
    assert plan["notices"] == []
    text = printed(plan)
    assert "memory: parameters " in text and ", average " in text and "communication" not in text


@pytest.mark.parametrize(
    ("hardware", "world_size", "expected"),
    [
        ({"num_gpus": 4}, None, (1, "none")),
        ({"num_gpus": 4, "distributed": "fsdp"}, None, (4, "fsdp")),
        ({"num_gpus": 0, "distributed": True}, None, (1, "none")),
        ({"num_gpus": 4, "distributed": True}, 2, (2, "ddp")),
        ({}, 8, (8, "ddp")),
    ],
)
def test_the_plan_is_of_the_processes_that_the_profile_asks_for_or_the_caller(
    kernel_of, hardware, world_size, expected
) -> None:
    training = {"batch_size": 3, "grad_accum_steps": 2}
    kernel = kernel_of(hardware={"device": "cpu", **hardware}, training=training)
    plan = make_plan(kernel, world_size)
    size, sharding = expected
    memory = plan["stages"][0]["memory"]
    assert (memory["world_size"], memory["sharding"]) == expected
    assert plan["batch"]["sequences_per_step"] == 6 * size
    assert plan["batch"]["tokens_per_step"] == 6 * size * 16
    product = "2 micro-batches x 3 sequences of 16 tokens"
    processes = f"{size} processes x " if size > 1 else ""
    assert f"step: {96 * size} tokens, {processes}{product}; " in printed(plan)
    assert (f"of each of {size} processes ({sharding})" in printed(plan)) == (size > 1)


def test_the_steps_of_an_epoch_are_those_of_a_run_where_the_text_is_at_hand(apt_train) -> None:
    batch = ("--training.batch_size", "7")
    planned = apt_train("--dry-run", "--json", *batch)
    run = apt_train(*batch, "--training.max_epochs", "1", "--training.max_steps", "10000")
    steps = json.loads(planned.out)["batch"]["steps_per_epoch"]
    assert run.code == 0 and steps == run.manifest["figures"]["steps"]


def test_a_text_that_is_not_there_or_large_leaves_the_steps_unknown(
    kernel_of, tmp_path, monkeypatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words, " * 100, encoding="utf-8")
    small = kernel_of(data={"train_path": [str(text)]})
    plan = make_plan(small)
    assert plan["batch"]["steps_per_epoch"] > 0
    (row,) = plan["data"]
    assert row["train_tokens"] + row["val_tokens"] >= 1_300 and row["windows"] > 0
    assert f"{row['train_tokens']:,} tokens to train on" in printed(plan)
    monkeypatch.setattr("apt_core.planning.data.READ_UP_TO", 10)
    monkeypatch.setattr("apt_core.planning.data.SAMPLE_CHARS", 10)
    large = make_plan(small)
    assert large["batch"]["steps_per_epoch"] is None
    assert "an epoch" not in printed(large)
    (row,) = large["data"]
    assert row["windows"] is None and 1_250 <= row["estimated_tokens"] <= 1_350
    assert "about 1.3K tokens; to tokenize them, once, takes about " in printed(large)
    text.unlink()
    assert make_plan(small)["batch"]["steps_per_epoch"] is None


def test_a_plan_opens_the_store_of_large_data_where_it_is_there(
    kernel_of, tmp_path, monkeypatch
) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.txt").write_text(f"a few words {number}, " * 100, encoding="utf-8")
    profiles = {
        "bytes": {"train_path": str(tmp_path / "1.txt")},
        "trained": {"train_path": str(tmp_path / "1.txt"), "tokenizer_name": "char"},
        "mixed": {
            "mixture": [
                {"name": "one", "train_path": str(tmp_path / "1.txt")},
                {"name": "two", "train_path": str(tmp_path / "2.txt")},
            ]
        },
    }
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    # Not younger than a clock's tick, so that hashes are kept.
    monkeypatch.setattr("apt_core.data.sources.digests.SETTLED", 0.0)
    monkeypatch.setattr("apt_core.planning.data.READ_UP_TO", 10)
    for name, data in profiles.items():
        kernel = kernel_of(data=data, model={"vocab_size": 300})
        assert all(row["windows"] is None for row in planned_data(kernel)[1]), name
        there = load_data(kernel)
        found, rows_there = planned_data(kernel)
        assert found is not None and found.sha256 == there.sha256, name
        assert [row["windows"] for row in rows_there] == [len(s.train) for s in there.sources]
    (tmp_path / "2.txt").write_text("another text, " * 100, encoding="utf-8")
    for row in planned_data(kernel)[1]:
        assert row["windows"] is None and row["estimated_tokens"]


def test_a_plan_does_not_read_all_of_a_source_that_tells_no_size(kernel_of, monkeypatch) -> None:
    kernel = kernel_of(data={"loader": "unending"})
    assert planned_data(kernel) == (None, [])
    (notice,) = kernel.notices
    assert "everything was read" in notice
    monkeypatch.setattr("apt_core.planning.data.READ_UP_TO", 500)
    monkeypatch.setattr("apt_core.planning.data.SAMPLE_CHARS", 500)
    (row,) = planned_data(kernel)[1]
    assert row["windows"] is None and 900 < row["estimated_tokens"] < 1_300
    assert kernel.notices == [notice]


def test_a_plan_says_that_nothing_could_be_drawn_from_a_mixture(kernel_of, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("a few words, " * 100, encoding="utf-8")
    item = {"name": "one", "train_path": str(tmp_path / "text.txt")}
    for schedule, message in {
        "mixture_one": "data: data.mixture: all weights are 0 from step 1 on",
        "enable_one_at_step": "data: data.mixture: all weights are 0 from step 1 on",
    }.items():
        value = 0 if schedule == "mixture_one" else 3
        kernel = kernel_of(data={"mixture": [item]}, schedules={schedule: value})
        assert any(message in notice for notice in make_plan(kernel)["notices"]), schedule
    short = kernel_of(data={"mixture": [item]}, training={"batch_size": 1000})
    assert any("one optimizer step takes 1000" in n for n in make_plan(short)["notices"])


# For people


def printed(plan: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_plan(Console(file=stream, width=80, highlight=False, soft_wrap=True), plan)
    return stream.getvalue()


def test_the_table_of_parts_fits_a_terminal(kernel_of) -> None:
    sizes = {"d_model": 768, "num_heads": 12, "d_ff": 3072, "num_layers": 24, "max_seq_len": 2048}
    text = printed(make_plan(kernel_of({**sizes, "attention_name": "mha"})))
    (line,) = (line for line in text.splitlines() if " attention mha " in line)
    assert " ".join(line.split()) == "attention mha 24 56,623,104 793 MFLOP 72.0 KiB all"
    assert len(line) <= 80
    assert "of training on 2048 tokens" in text
    assert "in bfloat16; 144 MiB for a sequence of 2048 tokens" in text


def test_the_json_of_a_plan_has_the_costs(capsys, profile) -> None:
    assert run_command(app, "apt-train", ["-p", str(profile), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    stage = plan["stages"][0]
    assert stage["flops_per_token"] > 0 and stage["kv_cache_bytes_per_token"] > 0
    assert {part["kind"] for part in plan["model"]["parts"]} == {
        "attention", "ffn", "norm", "embeddings",
    }  # fmt: skip


# Bad input


def test_every_wrong_size_is_reported_at_once_and_nothing_is_built(apt_train) -> None:
    run = apt_train(
        "--model.attention_pattern", "[mha, tva_default]", "--model.num_layers", "2",
        "--model.d_model", "36", "--model.num_heads", "4", "--model.num_kv_heads", "3",
        "--model.tva.rank", "5", "--model.ffn_name", "vft", "--model.vft.rank", "64",
    )  # fmt: skip
    assert run.code == 2
    head, *lines = run.err.splitlines()
    assert head == "error: 4 problems:"
    assert [line.split(": ")[1] for line in lines] == [
        "model.num_kv_heads", "model.tva.rank", "model.d_model", "model.vft.rank",
    ]  # fmt: skip
    assert not run.folder.exists()


PICKY = """
from apt_core import ProviderSpec, hookimpl
from apt_core.modeling.layers import MHAProvider
from apt_core.providers.attention import AttentionSupport
from apt_core.planning import calibration
from apt_core.planning.calibration import measured_size
from apt_core.planning.data import planned_data


class Picky(MHAProvider):
    supports = AttentionSupport(compile=False)

    def create_layer(self, d_model, num_heads, **options):
        if num_heads != 4:
            raise ValueError(f"model.num_heads: {num_heads} are not for me: choose 4")
        return super().create_layer(d_model, num_heads, **options)


@hookimpl
def apt_register_providers():
    return [ProviderSpec("attention", "picky", Picky)]
"""


@pytest.fixture
def picky(tmp_path: Path) -> tuple[str, ...]:
    """The arguments that choose an attention which takes 4 heads and nothing else."""
    path = tmp_path / "picky.py"
    path.write_text(PICKY, encoding="utf-8")
    return ("--plugin", str(path), "--model.attention_name", "picky")


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_size_that_a_plugins_attention_refuses_is_bad_input(apt_train, picky, more) -> None:
    run = apt_train(*picky, "--model.num_heads", "2", *more)
    assert run.code == 2, run.out
    assert "provider attention:picky of plugin picky" in run.err
    assert "model.num_heads: 2 are not for me: choose 4" in run.err
    assert "Traceback" not in run.err and not run.folder.exists()


def test_a_size_that_only_the_probe_has_is_no_reason_to_fall_back(apt_train, picky) -> None:
    sizes = ("--model.d_model", "32", "--model.num_heads", "4")
    vft = ("--model.ffn_name", "vft", "--model.vft.rank", "32")
    run = apt_train(*picky, *sizes, *vft, "--training.max_steps", "1")
    assert run.code == 0, run.err
    used = {row["kind"]: row["used"] for row in run.manifest["providers"]}
    assert (used["attention"], used["ffn"]) == ("picky", "vft")


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_what_a_layer_of_the_core_refuses_is_bad_input_that_names_the_key(
    apt_train, monkeypatch, more
) -> None:
    monkeypatch.setattr("apt_core.config.checks.COLLECTORS", ())
    run = apt_train("--model.tva.rank", "4096", *more)
    assert run.code == 2, run.out
    assert run.err.startswith("error: model.tva.rank: 4096 is more than the head dimension")


def test_a_run_says_at_its_start_what_its_attention_does_not_claim(
    apt_train, picky, monkeypatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    sizes = ("--model.d_model", "32", "--model.num_heads", "4")
    run = apt_train(*picky, *sizes, "--training.compile", "true", "--training.max_steps", "1")
    assert run.code == 0, run.err
    assert "training.compile: attention:picky (plugin picky) does not claim" in run.out


def launched(tried: list[int], most: int = 2**30) -> Callable[[int, int, int], float]:
    """A device that takes 20 ms to be told what to do, and 5 microseconds a token; beyond ``most``
    tokens it has no memory."""

    def seconds(sequences: int, length: int, tries: int) -> float:
        tokens = sequences * length
        if tokens > most:
            raise torch.OutOfMemoryError
        tried.append(tokens)
        return max(0.02, 5e-6 * tokens)

    return seconds


def test_a_plan_is_timed_as_exactly_as_the_run_computes_and_says_what_it_leaves_out(
    kernel_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def products(device: torch.device, *, tf32: bool) -> AbstractContextManager[None]:
        asked.append((str(device), tf32))
        return nullcontext()

    monkeypatch.setattr(calibration, "fp32_products", products)
    for tf32, compiled in ((True, False), (False, True)):
        hardware = {"device": "cpu", "tf32": tf32}
        plan = make_plan(kernel_of(hardware=hardware, training={"compile": compiled}))
        assert asked == [("cpu", tf32)]
        assert ("timed: the whole model, not compiled" in printed(plan)) is compiled
        asked.clear()


def test_a_device_that_waits_to_be_told_is_timed_with_as_much_as_it_takes_to_be_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "SECONDS", 0.15)
    tried: list[int] = []
    sized = partial(measured_size, flops=lambda length: 1.0, most=(12, 1024))
    assert sized(launched(tried), again=True) == (12, 1024, pytest.approx(0.06144))
    assert tried[0] == 32 and 3 <= len(tried) <= 5
    # On a CPU a few tokens tell how long many take.
    assert sized(launched(tried := []), again=False) == (1, 240, 0.02)
    assert tried == [32, 240]
    sequences, length, taken = sized(launched(tried := [], most=2000), again=True)
    assert sequences * length == tried[-1] <= 2000 and taken == 0.02
    with pytest.raises(torch.OutOfMemoryError):
        sized(launched([], most=100), again=True)
