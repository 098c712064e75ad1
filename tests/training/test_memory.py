"""Memory that is counted on fake tensors is what real ones take; what fits is said in settings."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from apt_core import ProviderSpec, hookimpl
from apt_core import device as devices
from apt_core.device import (
    PLANNED_CAPABILITY,
    autocast,
    autocast_dtype,
    available_memory,
    is_out_of_memory,
)
from apt_core.kernel import Kernel, boot
from apt_core.modeling import ModelBuilder
from apt_core.modeling.cross_entropy import cross_entropy_sum
from apt_core.modeling.layers import SwiGLUProvider
from apt_core.parallel.world import sharding_of
from apt_core.planning.footprint import CountedAllocations, Footprint
from apt_core.planning.gpu_operators import GPUOperators
from apt_core.planning.memory import (
    estimate,
    fitting_batch,
    out_of_memory_advice,
)
from apt_core.plugin_manager import PluginManager

CPU = torch.device("cpu")
MIB = 2**20

MODELS: list[dict[str, Any]] = [
    {"attention_name": "mha", "num_layers": 5, "dropout": 0.1, "vocab_size": 300},
    {"num_layers": 6, "tva": {"s": 2}, "tie_embeddings": False, "logits_soft_cap": 30.0},
    {"attention_pattern": ["mha", "tva_default"], "num_layers": 7, "num_kv_heads": 2},
    {"attention_name": "mha", "ffn_name": "vft", "position_name": "learned", "num_layers": 2},
]


def kernel_of(model: dict[str, Any] | None = None, **training: Any) -> Kernel:
    hardware = {"device": training.pop("device", "cpu")}
    sizes = {"d_model": 64, "num_heads": 4, "d_ff": 96, "num_layers": 2, "max_seq_len": 32}
    training = {"batch_size": 4, **training}
    return boot({"model": {**sizes, **(model or {})}, "training": training, "hardware": hardware})


def micro_batch(kernel: Kernel, model: nn.Module, length: int = 32) -> None:
    size = kernel.config.training.batch_size
    ids = torch.zeros(size, length, dtype=torch.int64)
    with autocast(CPU, autocast_dtype(kernel.config.training.mixed_precision, CPU)):
        output = model(ids)
        loss = cross_entropy_sum(output, ids) / ids.numel()
    loss.backward()


def real_model(kernel: Kernel) -> nn.Module:
    model = ModelBuilder(kernel.config, kernel.registry).build_model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def profiled_peak(work: Any) -> int:
    """The most that torch's own allocator held at a time, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


# Against real memory


@pytest.mark.parametrize(
    ("model", "mixed"),
    [
        *((model, False) for model in MODELS),
        (MODELS[0], True),
        *(pytest.param(model, True, marks=pytest.mark.long) for model in MODELS[1:]),
    ],
)
def test_activations_are_those_of_the_whole_model_in_real_memory(model, mixed) -> None:
    kernel = kernel_of(model, mixed_precision=mixed)
    real = real_model(kernel)
    with CountedAllocations() as counted:
        micro_batch(kernel, real)
    assert Footprint(kernel).activations(4) == counted.peak


@pytest.mark.parametrize(
    "model",
    [MODELS[0], *(pytest.param(model, marks=pytest.mark.long) for model in MODELS[1:])],
)
def test_activations_are_what_the_profiler_of_torch_sees(model) -> None:
    kernel = kernel_of(model)
    real = real_model(kernel)
    seen = profiled_peak(lambda: micro_batch(kernel, real))
    assert Footprint(kernel).activations(4) == pytest.approx(seen, rel=0.03)


def test_activations_hold_all_that_the_backward_needs() -> None:
    kernel = kernel_of(MODELS[0])
    real = real_model(kernel)
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        micro_batch(kernel, real)
    needed = sum(storage.nbytes() for storage in saved.values())
    activations = Footprint(kernel).activations(4)
    assert activations is not None
    assert needed < activations < 1.5 * needed


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_whole_step_takes_what_the_estimate_says(name) -> None:
    kernel = kernel_of(optimizer_name=name, grad_accum_steps=2, batch_size=8)
    footprint = Footprint(kernel)
    expected = estimate(footprint)

    def steps() -> None:
        model = ModelBuilder(kernel.config, kernel.registry).build_model()
        hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
        groups: list[dict[str, Any]] = [{"params": rest, "lr": 1e-3, "weight_decay": 0.0}]
        groups.append({**groups[0], "params": hidden})
        if name == "muon":
            groups[1] = {"params": hidden, "hidden_matrices": True, "lr_scale": 1.0}
        provider = kernel.registry.get("optimizer", name)
        optimizer = provider.create(groups, learning_rate=1e-3, weight_decay=0.0)
        for _ in range(2):
            for _ in range(2):
                micro_batch(kernel, model)
            optimizer.step()
            optimizer.zero_grad()

    seen = profiled_peak(steps)
    assert expected.total - expected.snapshot == pytest.approx(seen, rel=0.03)


def test_the_state_of_an_optimizer_is_asked_of_it() -> None:
    adamw, muon = (Footprint(kernel_of(optimizer_name=name)) for name in ("adamw", "muon"))
    weights = adamw.weights
    few = 4096  # the counters of steps
    assert 0 <= adamw.optimizer[0] - 2 * weights.trainable < few
    assert weights.trainable < muon.optimizer[0] < 1.3 * weights.trainable


# Against what a GPU keeps, by hand


def kept_on_gpu(
    work: Callable[..., torch.Tensor],
    *shapes: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    mixed: bool = False,
    capability: tuple[int, int] = PLANNED_CAPABILITY,
) -> dict[str, int]:
    """Bytes of what the backward of ``work`` keeps beside its inputs of ``shapes``, and of its
    result, on fake tensors."""
    kept: dict[torch.UntypedStorage, int] = {}
    with FakeTensorMode(), GPUOperators(capability):
        given = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        own = {tensor.untyped_storage() for tensor in given}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage() not in own:
                kept[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            autocast(CPU, torch.bfloat16 if mixed else None),
        ):
            result = work(*given)
        result.float().sum().backward()
        assert all(tensor.grad.shape == tensor.shape for tensor in given)
    return {"kept": sum(kept.values()), "result": result.untyped_storage().nbytes()}


HEADS = 4 * [(2, 4, 48, 16)]  # [B, H, T, R]
SIZE, ROWS = 2 * 4 * 48 * 16, 2 * 4 * 48  # numbers, and rows of them
SEEDS = 32


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal="attn_mask" not in options, **options)


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_gpu_keeps_a_number_a_row_and_no_scores(dtype, dropout, capability) -> None:
    found = kept_on_gpu(
        partial(attention, dropout_p=dropout), *HEADS[:3], dtype=dtype, capability=capability
    )
    result = dtype.itemsize * SIZE
    assert found["result"] == result
    # Rows of the efficient kernel are filled up to 32.
    assert result + 4 * ROWS <= found["kept"] <= result + 4 * ROWS * 64 // 48 + SEEDS


def test_a_gpu_keeps_all_scores_where_no_other_kernel_takes_the_heads() -> None:
    shared = [(2, 4, 48, 16), (2, 2, 48, 16), (2, 2, 48, 16)]
    work = partial(attention, enable_gqa=True)
    scores = ROWS * 48
    assert kept_on_gpu(work, *shared)["kept"] > 4 * scores
    assert kept_on_gpu(work, *shared, dtype=torch.bfloat16)["kept"] < 2 * scores


def test_a_mask_on_a_gpu_is_a_number_for_each_place() -> None:
    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(2, 1, 50, 50, dtype=torch.bool)
        return attention(q, k, v, attn_mask=mask)

    found = kept_on_gpu(masked, *3 * [(2, 4, 50, 16)])
    expected = 4 * (2 * 4 * 50 * 16 + 2 * 50 * 64 + 2 * 4 * 64)
    assert expected <= found["kept"] <= expected + SEEDS


@pytest.mark.parametrize(
    ("work", "mixed", "kept", "result"),
    [
        (partial(F.dropout, p=0.1), False, SIZE, 4 * SIZE),
        (partial(F.rms_norm, normalized_shape=(16,)), False, 4 * ROWS, 4 * SIZE),
        # In fp32 under autocast: a copy of the input, and the row's number.
        (partial(F.rms_norm, normalized_shape=(16,)), True, 4 * SIZE + 4 * ROWS, 4 * SIZE),
        (partial(torch.softmax, dim=-1), True, 4 * SIZE, 4 * SIZE),
        (lambda x: x.softmax(-1, torch.bfloat16), True, 2 * SIZE, 2 * SIZE),
        (lambda x: x.exp(), True, 4 * SIZE, 4 * SIZE),
    ],
)
def test_operators_keep_what_they_keep_on_a_gpu(work, mixed, kept, result) -> None:
    dtype = torch.bfloat16 if mixed else torch.float32
    found = kept_on_gpu(work, HEADS[0], dtype=dtype, mixed=mixed)
    assert found == {"kept": kept, "result": result}


def test_a_plan_for_a_gpu_says_that_there_is_none(monkeypatch) -> None:
    kernel = kernel_of(MODELS[0], device="cuda", batch_size=8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Footprint(kernel).notes == [
        "memory: there is no GPU here: counted for one of compute capability 9.0"
    ]
    assert Footprint(kernel, CPU).notes == []


# The parts by distribution


def test_fsdp_divides_what_lasts_and_gathers_a_layer_at_a_time() -> None:
    footprint = Footprint(kernel_of(ema_decay=0.99, device="cuda", mixed_precision=False))
    alone, eight = estimate(footprint), estimate(footprint, 8, "fsdp")
    weights = footprint.weights
    for part in ("gradients", "optimizer", "ema"):
        assert getattr(eight, part) == -(-getattr(alone, part) // 8), part
    assert eight.parameters - weights.tables == -(-(alone.parameters - weights.tables) // 8)
    assert eight.activations == alone.activations
    assert eight.buffers == weights.outside + 2 * weights.largest_layer
    assert weights.outside + 2 * weights.largest_layer == weights.parameters
    assert alone.buffers == alone.snapshot == 0 and alone.ema > 0


def test_layers_that_fsdp_gathers_in_bf16_need_no_casts_beside_them() -> None:
    footprint = Footprint(kernel_of(mixed_precision=True))
    alone, eight = estimate(footprint), estimate(footprint, 8, "fsdp")
    weights = footprint.weights
    assert eight.buffers == weights.outside + weights.largest_layer
    assert alone.activations and eight.activations
    casts = (weights.parameters - weights.outside) // 2
    assert alone.activations - eight.activations == pytest.approx(casts, rel=0.05)
    # Within a process nothing is gathered.
    assert estimate(footprint, 8, "ddp").activations == alone.activations


def test_gradients_that_wait_for_more_micro_batches_are_whole_in_every_process() -> None:
    footprint = Footprint(kernel_of(grad_accum_steps=2))
    whole = footprint.weights.trainable
    assert estimate(footprint, 4, "fsdp").gradients == whole
    assert estimate(footprint, 4, "ddp") == replace(
        estimate(footprint), world_size=4, sharding="ddp"
    )
    assert estimate(footprint).buffers == 0


def test_a_run_on_a_cpu_also_holds_the_copy_that_a_checkpoint_is_written_from() -> None:
    cpu = estimate(Footprint(kernel_of(ema_decay=0.99)))
    tables = Footprint(kernel_of()).weights.tables
    assert cpu.snapshot == cpu.parameters - tables + cpu.optimizer + cpu.ema
    assert cpu.total == sum(v for k, v in cpu.row().items() if k in (
        "parameters", "gradients", "optimizer", "ema", "activations", "buffers", "snapshot",
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("distributed", "world_size", "expected"),
    [("fsdp", 2, "fsdp"), (True, 2, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 1, "none")],
)
def test_a_run_of_one_process_divides_nothing(distributed, world_size, expected) -> None:
    config = boot({"hardware": {"distributed": distributed}}).config
    assert sharding_of(config, world_size) == expected


def test_seven_billion_parameters_are_planned_without_allocating_them() -> None:
    sizes = {"d_model": 4096, "num_heads": 32, "d_ff": 11008, "num_layers": 32}
    kernel = kernel_of(
        {**sizes, "attention_name": "mha", "vocab_size": 32000, "max_seq_len": 512},
        mixed_precision=True,
        device="cuda",
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    needed = estimate(Footprint(kernel), 8, "fsdp")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert needed.parameters > 3 * 2**30 and needed.activations and needed.activations > 2**30
    assert grown < 2**29


# What cannot be measured


class Deciding(SwiGLUProvider):
    """Its layers look at values, which fake tensors do not have."""

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0) -> nn.Module:
        class Layer(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = F.linear(x, self.weight)
                return y if bool((y > 0).all()) else -y

        return Layer(d_model, d_model, bias=False)


class Plugin:
    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        return [ProviderSpec("ffn", "deciding", Deciding)]


def test_a_model_that_looks_at_values_has_unknown_activations_and_a_note() -> None:
    manager = PluginManager()
    manager.register(Plugin(), "thirds")
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 1, "max_seq_len": 8}
    kernel = boot({"model": {**sizes, "ffn_name": "deciding"}}, manager=manager)
    footprint = Footprint(kernel)
    unknown = estimate(footprint)
    assert unknown.activations is None and unknown.total > unknown.parameters
    (note,) = footprint.notes
    assert note.startswith("memory: the activations are unknown: DataDependent")
    assert footprint.trial(4) == 0
    assert footprint.notes[1].startswith("memory: the loss by which a switch is judged is not cou")
    assert "training.batch_size below 16" in out_of_memory_advice(kernel, 1, "none", MIB)


# What fits


def test_the_largest_batch_that_fits_keeps_the_batch_of_a_step() -> None:
    footprint = Footprint(kernel_of(batch_size=12, grad_accum_steps=2))
    by_size = {n: estimate(footprint, batch_size=n).total for n in (1, 2, 3, 4, 6, 12)}
    for size, total in by_size.items():
        fitting = fitting_batch(footprint, total)
        assert fitting is not None and fitting.total <= total
        assert (fitting.batch_size, fitting.grad_accum_steps) == (size, 24 // size)
    assert fitting_batch(footprint, by_size[1] - 1) is None


def test_running_out_of_memory_is_answered_with_settings_that_fit() -> None:
    kernel = kernel_of(batch_size=8, grad_accum_steps=3)
    footprint = Footprint(kernel)
    half = estimate(footprint, batch_size=4, grad_accum_steps=6).total
    advice = out_of_memory_advice(kernel, 1, "none", half)
    assert advice.endswith("--training.batch_size 4 --training.grad_accum_steps 6")
    assert "(the same global batch)" in advice and "are needed and" in advice
    # It failed although it should have fitted: smaller nevertheless.
    enough = out_of_memory_advice(kernel, 1, "none", 2**40)
    assert "--training.batch_size 4 " in enough and "other programs" in enough


def test_where_no_batch_fits_the_advice_names_what_else_helps() -> None:
    kernel = kernel_of({"d_model": 512, "d_ff": 2048}, batch_size=2, device="cuda")
    footprint = Footprint(kernel)
    four = estimate(footprint, 4, "fsdp", batch_size=1).total
    advice = out_of_memory_advice(kernel, 1, "none", four)
    assert "hardware.distributed fsdp over 4 processes" in advice
    assert "data.max_length below 32" in advice and "a smaller model" in advice
    assert "--training.batch_size" not in advice
    assert "fsdp over" not in out_of_memory_advice(kernel, 1, "none", MIB)


# What there is


def test_a_share_of_a_gpu_bounds_what_is_available_on_it(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    for share, available in ((1.0, 80), (0.5, 50)):
        monkeypatch.setattr(
            torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share
        )
        assert available_memory(torch.device("cuda:0")) == available


def test_a_limit_on_the_address_space_bounds_what_is_available(monkeypatch) -> None:
    free = available_memory(CPU)
    assert free > 0
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**26, 2**26))
    assert available_memory(CPU) < 2**26 < free


def test_the_limits_of_all_control_groups_around_the_process_count(tmp_path: Path) -> None:
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("5000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/job/step\n")
    assert list(devices._control_group_limits(tmp_path, membership)) == [5000]
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("7000\n")
    membership.write_text("5:cpuset:/x\n4:memory:/job\n0::/\n")
    assert list(devices._control_group_limits(tmp_path, membership)) == [7000]


def test_a_lack_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    wrapped = ValueError("in a plugin")
    wrapped.__cause__ = refused.value
    for error in (refused.value, wrapped, MemoryError(), torch.OutOfMemoryError("x")):
        assert is_out_of_memory(error), error
    for error in (ValueError("out of memory"), RuntimeError("shapes differ")):
        assert not is_out_of_memory(error), error


# Precision


@pytest.mark.parametrize(
    ("units", "d_model", "expected"),
    [
        ({"avx512_bf16": True}, 256, torch.bfloat16),
        ({"amx_bf16": True}, 4096, torch.bfloat16),
        ({"avx512_bf16": True}, 128, None),
        ({"avx512_f": True, "avx512_bf16": False}, 4096, None),
        ({}, 4096, None),
    ],
)
def test_auto_is_bf16_on_cpus_with_bf16_units_for_wide_models(
    monkeypatch, units, d_model, expected
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert autocast_dtype("auto", CPU, d_model) is expected
    assert autocast_dtype(True, CPU, d_model) is torch.bfloat16
    assert autocast_dtype(False, CPU, d_model) is None
