"""What compiles the forward and the loss of a run, what speaks against it, and how exact products
are. Forced on the CPU, where the compiler runs without generating code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from apt_core import ProviderSpec, hookimpl
from apt_core.data.packing.rows import IGNORED
from apt_core.errors import ConfigError
from apt_core.evaluation.quick_eval import sums_of
from apt_core.kernel import boot
from apt_core.modeling import ModelTransform, cross_entropy
from apt_core.modeling import compilation as compilation_module
from apt_core.modeling.compilation import Compilation, compilation
from apt_core.modeling.layers import MHAProvider
from apt_core.modeling.seeds import fp32_products
from apt_core.planning.footprint import CountedAllocations
from apt_core.planning.gpu_operators import GPUOperators
from apt_core.plugin_manager import PluginManager
from apt_core.providers import AttentionSupport
from apt_core.testing import TINY_PROFILE, TinyRun, tiny_run
from apt_core.torch_state import TorchWatch
from apt_core.training import prepare, trainer
from apt_core.training.curriculum import switching
from apt_core.training.step import forward as compiling
from apt_core.types import ModelOutput

pytestmark = pytest.mark.long

GPU = torch.device("cuda", 0)
EPOCH = 5
"""Steps: the last one has fewer windows, one of them shorter."""

OVERRIDES = {
    "training.batch_size": 5,
    "training.grad_accum_steps": 2,
    "training.log_every_steps": 1,
    "training.max_epochs": 3,
    "evaluation.eval_freq": 3,
    "model.num_layers": 1,
    "model.dropout": 0.2,
    "training.lr_schedule_name": "constant",
}


def ran(*plugins: Any, compile: Any = "auto", steps: int = EPOCH + 2, **options: Any) -> TinyRun:
    overrides = {**OVERRIDES, "training.compile": compile, **options.pop("overrides", {})}
    return tiny_run(*plugins, steps=steps, overrides=overrides, **options)


def losses(run: TinyRun) -> list[float]:
    return [row[name] for row in run.metrics for name in ("loss", "val_loss") if name in row]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets ``auto`` compile on the CPU, by a backend."""
    compile_ = torch.compile

    def using(backend: Any = "aot_eager") -> None:
        torch._dynamo.reset()
        counters.clear()
        monkeypatch.setattr(compilation_module, "_objection", lambda *_: "")
        monkeypatch.setattr(
            torch,
            "compile",
            lambda f, mode=None, **options: compile_(f, backend=backend, **options),
        )

    return using


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


# What is compiled ---------------------------------------------------------------------------------


def test_a_compiled_run_has_the_losses_of_another_and_few_graphs(
    as_on_a_gpu: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    plain = ran(compile=False)
    assert "computes in" not in caplog.text, "of a plain run on a CPU there is nothing to say"
    as_on_a_gpu()
    made: list[int] = []

    class Looks:
        @hookimpl
        def on_step_end(self, step: int) -> None:
            made.append(graphs())

    run = ran(Looks(), steps=2 * EPOCH + 2)
    both = len(losses(plain)) - 1  # without the evaluation at its end
    assert losses(run)[:both] == pytest.approx(losses(plain)[:both], rel=1e-5)
    assert run.manifest["computes"]["compile"]["mode"] == "default"
    assert "computes in float32, compiled without graphs" in caplog.text
    assert "compiling: the first evaluation" in caplog.text
    assert sum(counters["graph_break"].values()) == 0
    # Whole batches and the last of an epoch, in training and in evaluations.
    assert made[EPOCH + 1] == graphs() == 4, "another epoch compiles nothing more"
    counters.clear()
    ran(steps=1, overrides={"evaluation.eval_batches": 1})
    assert graphs() > 0, "another run compiles all of it"


class ReadsLogits:
    """A term of the logits, which notes what it is given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    @hookimpl
    def apt_loss_terms(self, output: Any) -> dict[str, torch.Tensor]:
        self.given.append(tuple(output.logits.shape))
        return {"z": 1e-2 * output.logits.float().logsumexp(-1).square().mean()}


class ReadsNothing:
    def __init__(self) -> None:
        self.steps = 0

    @hookimpl
    def apt_loss_terms(self, trainer: Any) -> dict[str, torch.Tensor]:
        self.steps += 1
        return {"norm": 1e-3 * next(trainer.model.parameters()).square().sum()}


@pytest.mark.parametrize("plugin", [ReadsLogits, ReadsNothing])
def test_loss_terms_are_those_of_a_plain_run(
    as_on_a_gpu: Callable[..., None], plugin: type[Any]
) -> None:
    plain = ran(plugin(), compile=False, steps=3)
    as_on_a_gpu()
    asked: list[bool] = []
    forward = compiling.Forward.__call__

    def noting(self: Any, batch: Any, *, outputs: bool, **options: Any) -> Any:
        result = forward(self, batch, outputs=outputs, **options)
        assert (result[1] is not None) is outputs
        asked.append(outputs)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling.Forward, "__call__", noting)
        run = ran(plugin(), steps=3)
    assert set(asked) == {plugin is ReadsLogits}
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)


class Registers:
    """Brings a plugin that reads the logits along when a step has been taken."""

    def __init__(self, plugin: ReadsLogits) -> None:
        self.plugin = plugin

    @hookimpl
    def on_step_end(self, step: int, trainer: Any) -> None:
        if step == 1:
            trainer.manager.register(self.plugin, "reads_logits")


def test_a_plugin_that_comes_later_gets_the_logits_too(as_on_a_gpu: Callable[..., None]) -> None:
    as_on_a_gpu()
    plugin = ReadsLogits()
    ran(Registers(plugin), steps=3)
    assert len(plugin.given) == 2 * 2, "of two micro-batches in each of two steps"


@pytest.mark.parametrize(("state", "more"), [("ema", 2), ("rdrop", 0)])
def test_a_second_state_of_the_model_is_compiled_too(
    as_on_a_gpu: Callable[..., None], state: str, more: int
) -> None:
    overrides = {"model.bistate": {"mode": state, "weight": 0.3, "beta": 0.0}}
    plain = ran("align", compile=False, overrides=overrides)
    as_on_a_gpu()
    run = ran("align", overrides=overrides)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    assert run.manifest["computes"]["compile"]["mode"] == "default"
    assert graphs() == 4 + more


def test_what_the_compiler_sets_is_no_plugins_change(as_on_a_gpu: Callable[..., None]) -> None:
    def setting(graph: Any, _: Any) -> Any:
        if torch.is_grad_enabled():  # in a step
            sys.setrecursionlimit(max(sys.getrecursionlimit(), 2000))
        return graph.forward

    before = sys.getrecursionlimit()
    as_on_a_gpu(setting)
    run = ran(Sees(), steps=2)
    assert run.manifest["computes"]["compile"]["mode"] == "default"
    assert sys.getrecursionlimit() == before


class Hooks:
    """Functions in the model that keep a number, read a value, and fail."""

    def __init__(self, *names: str) -> None:
        self.names = names or ("counting", "reading", "failing")
        self.calls = 0
        self.values: list[float] = []

    @hookimpl
    def on_training_start(self, trainer: Any) -> None:
        def counting(*_: Any) -> None:
            self.calls += 1

        def reading(_: Any, __: Any, output: torch.Tensor) -> None:
            self.values.append(output.detach().abs().mean().item())

        def failing(*_: Any) -> None:
            raise ValueError("nothing to see")

        for function in (counting, reading, failing):
            if function.__name__ in self.names:
                trainer.model.blocks[0].ffn.register_forward_hook(function)


def test_hooks_in_a_compiled_model_are_called_between_its_graphs(
    as_on_a_gpu: Callable[..., None],
) -> None:
    plain, hooks, keys = Hooks(), Hooks(), {"evaluation.eval_freq": 0}
    expected = ran(plain, compile=False, strict=False, steps=3, overrides=keys)
    as_on_a_gpu()
    run = ran(hooks, strict=False, steps=3, overrides=keys)
    assert losses(run) == pytest.approx(losses(expected), rel=1e-5)
    assert hooks.calls == plain.calls
    assert hooks.values == pytest.approx(plain.values, rel=1e-4)
    rows = [r.manifest["plugins"][0]["failures"] for r in (run, expected)]
    assert [row["error"] for row in rows[0]] == [row["error"] for row in rows[1]]
    counters.clear()
    made: list[int] = []

    class Looks:
        @hookimpl
        def on_step_end(self, step: int) -> None:
            made.append(graphs())

    ran(Hooks("counting"), Looks(), steps=4, overrides=keys)
    assert made[1] == made[3] > 0, "a number that changes in every step makes no graph"


# What fails ---------------------------------------------------------------------------------------


def refusing(*_: Any) -> Any:
    raise RuntimeError("no kernel for this")


def forward_alone() -> Any:
    return aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=refusing
    )


@pytest.mark.parametrize("make_backend", [lambda: refusing, forward_alone], ids=["all", "backward"])
def test_a_run_goes_on_without_a_compiler_that_fails(
    as_on_a_gpu: Callable[..., None],
    make_backend: Callable[[], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = ran(compile=False, steps=3)
    as_on_a_gpu(make_backend())
    run = ran(steps=3, strict=False)
    assert run.same_weights(plain) and losses(run) == losses(plain)
    chosen = run.manifest["computes"]["compile"]
    assert chosen["mode"] is None and "no kernel for this" in chosen["reason"]
    assert "the run goes on without it" in caplog.text


@pytest.mark.parametrize("options", [{"compile": True, "strict": False}, {"compile": "auto"}])
def test_a_compiler_that_fails_is_an_error_where_nothing_else_is_wanted(
    as_on_a_gpu: Callable[..., None], options: dict[str, Any]
) -> None:
    as_on_a_gpu(refusing)
    with pytest.raises(Exception, match="no kernel for this"):
        ran(steps=1, **options)


class Breaks:
    @hookimpl
    def on_training_start(self, trainer: Any) -> None:
        def broken(*_: Any) -> None:
            raise ValueError("the layer is wrong")

        trainer.model.blocks[0].ffn.forward = broken


def test_an_error_of_the_model_is_not_the_compilers(as_on_a_gpu: Callable[..., None]) -> None:
    as_on_a_gpu()
    with pytest.raises(ConfigError, match="breaks: the layer is wrong"):
        ran(Breaks(), steps=1, strict=False, overrides={"evaluation.eval_freq": 0})


class Freezes:
    """Another set of parameters learns in every step: each needs a graph of its own."""

    @hookimpl
    def on_step_start(self, step: int, trainer: Any) -> None:
        for place, parameter in enumerate(trainer.model.blocks.parameters()):
            parameter.requires_grad_(bool(step >> place & 1))


def test_a_run_that_needs_ever_new_graphs_goes_on_without(
    as_on_a_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu()
    monkeypatch.setattr(compiling, "MOST_GRAPHS", 2)
    run = ran(Freezes(), steps=5, strict=False)
    chosen = run.manifest["computes"]["compile"]
    assert chosen["mode"] is None and "2 graphs did not suffice" in chosen["reason"]
    assert losses(run) == pytest.approx(losses(ran(Freezes(), steps=5, compile=False)), rel=1e-5)


# What speaks against it ---------------------------------------------------------------------------


class Transforms:
    @hookimpl
    def apt_transform_model(self, model: Any) -> None:
        """Changes nothing."""


class Breaking(MHAProvider):
    supports = AttentionSupport(compile=False)


class Attention:
    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        return [ProviderSpec("attention", "breaking", Breaking)]


def chosen(*plugins: Any, world: int = 1, sharding: Any = "none", **changes: Any) -> Compilation:
    profile = {section: values for section, values in TINY_PROFILE.items() if section != "data"}
    for key, value in {"training__compile": "auto", **changes}.items():
        section, _, name = key.partition("__")
        profile[section] = {**profile.get(section, {}), name: value}
    manager = PluginManager()
    for number, plugin in enumerate(plugins):
        manager.register(plugin, f"plugin{number}")
    return compilation(boot(profile, manager=manager, files=False), GPU, sharding, world)


def test_what_speaks_against_compiling_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation_module, "_has_triton", lambda device: True)
    breaking = (Attention(),), {"model__attention_name": "breaking"}
    for plugins, options, reason in (
        ((), {"training__compile": False}, "training.compile is false"),
        ((), {"world": 2, "sharding": "fsdp"}, "fsdp"),
        (*breaking, "breaking, which does not claim to support it"),
    ):
        found = chosen(*plugins, **options)
        assert found.mode is None and reason in found.reason, options
    assert chosen(Attention(), model__attention_name="breaking", training__compile=True).mode
    monkeypatch.setattr(compilation_module, "_has_triton", lambda device: False)
    assert "Triton" in chosen().reason and chosen().mode is None
    assert chosen(training__compile=True).mode is not None


def test_small_models_are_compiled_with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation_module, "_has_triton", lambda device: True)
    assert chosen() == Compilation("reduce-overhead", "")
    assert chosen(ReadsNothing()).mode == "reduce-overhead"
    gpt2 = {"model__d_model": 768, "model__max_seq_len": 1024, "training__batch_size": 12}
    large = chosen(**gpt2)
    assert large.mode == "default" and "large" in large.reason
    with_graphs = {"training__compile_mode": "reduce-overhead"}
    assert chosen(**gpt2, **with_graphs).mode == "reduce-overhead"
    assert chosen(ReadsLogits(), **with_graphs).mode == "reduce-overhead"
    for plugins, options, reason in (
        ((), {"world": 2, "sharding": "ddp"}, "summed in the backward"),
        ((), {"training__grad_accum_steps": 2}, "grad_accum_steps"),
        ((), {"training__grad_accum_steps": 2, **with_graphs}, "grad_accum_steps"),
        ((), {"training__compile_mode": "default"}, "training.compile_mode is default"),
        ((ReadsLogits(),), {}, "plugin0 may keep"),
        ((Transforms(),), {}, "plugin0 may keep"),
    ):
        found = chosen(*plugins, **options)
        assert found.mode == "default" and reason in found.reason, options


def test_nothing_is_compiled_on_a_cpu_unless_it_is_asked_for() -> None:
    kernel = boot({"model": TINY_PROFILE["model"]}, files=False)
    found = compilation(kernel, torch.device("cpu"), "none", 1)
    assert found == Compilation(None, "auto compiles on a GPU alone")


# How exact products are ---------------------------------------------------------------------------


class Sees:
    """Notes how exact products are in a step, in an evaluation, and at a switch."""

    def __init__(self) -> None:
        self.seen: dict[str, set[str]] = {}

    def note(self, where: str) -> None:
        self.seen.setdefault(where, set()).add(torch.get_float32_matmul_precision())

    @hookimpl
    def on_step_start(self) -> None:
        self.note("step")

    @hookimpl
    def apt_loss_terms(self) -> dict[str, Any]:
        self.note("step")
        return {}

    @hookimpl
    def on_evaluation_end(self) -> None:
        self.note("evaluation")


class Doubles(Sees):
    """Replaces the model by one that computes the same."""

    @hookimpl
    def apt_transform_model(self, model: Any) -> ModelTransform:
        self.note("switch")
        return ModelTransform(model, {}, tolerance=1e-6)


@pytest.mark.parametrize(("tf32", "there"), [(True, "high"), (False, "highest")])
def test_fp32_is_multiplied_in_tf32_but_for_proofs(
    monkeypatch: pytest.MonkeyPatch, tf32: bool, there: str
) -> None:
    as_gpu = lambda _, *, tf32: fp32_products(GPU, tf32=tf32)  # noqa: E731
    for module in (trainer, prepare, switching):
        monkeypatch.setattr(module, "fp32_products", as_gpu)
    before = TorchWatch().before().values
    plugin = Doubles()
    compare = switching.fixed_loss

    def comparing(*given: Any) -> float:
        plugin.note("comparison")
        return compare(*given)

    monkeypatch.setattr(switching, "fixed_loss", comparing)
    ran(plugin, compile=False, overrides={"hardware.device": "auto", "hardware.tf32": tf32})
    assert plugin.seen == {
        "step": {there}, "evaluation": {there}, "switch": {"highest"}, "comparison": {"highest"},
    }  # fmt: skip
    assert TorchWatch().before().values == before


def test_what_a_plugin_leaves_of_it_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    as_gpu = lambda _, *, tf32: fp32_products(GPU, tf32=tf32)  # noqa: E731
    monkeypatch.setattr(trainer, "fp32_products", as_gpu)

    class Sets(Sees):
        @hookimpl
        def on_step_end(self) -> None:
            torch.set_float32_matmul_precision("highest")

    plugin = Sets()
    run = ran(plugin, compile=False, strict=False, steps=3)
    assert plugin.seen["step"] == {"high"}
    (failure,) = run.manifest["plugins"][0]["failures"]
    assert "fp32 precision from high to highest" in failure["error"]


# What the loss takes on a GPU without a compiler --------------------------------------------------


def test_the_loss_in_parts_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, classes = 50, 300
    monkeypatch.setattr(cross_entropy, "PART_BYTES", 4 * classes * 16)
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(rows, classes, generator=draw)
    targets = torch.randint(classes, (rows,), generator=draw)
    targets[::7] = IGNORED

    def computed(
        function: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor
    ) -> list[torch.Tensor]:
        leaf = given.clone().requires_grad_()
        value = function(leaf)
        (0.3 * value).backward()
        assert leaf.grad is not None and leaf.grad.dtype == given.dtype
        return [value.detach().double(), leaf.grad.double()]

    plain = partial(F.cross_entropy, target=targets, reduction="sum")
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        given = logits.to(dtype)
        expected = computed(plain, given.double())
        value, gradient = computed(lambda x: cross_entropy._InParts.apply(x, targets), given)
        assert value.item() == pytest.approx(expected[0].item(), rel=1e-6)
        assert (gradient - expected[1]).norm() <= tolerance * expected[1].norm()
        assert (gradient[::7] == 0).all()


def test_the_loss_in_parts_holds_no_logits_in_fp32() -> None:
    with FakeTensorMode():
        logits = torch.empty(4096, 50_304, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(4096, dtype=torch.int64)
        with CountedAllocations() as counted:
            cross_entropy._InParts.apply(logits, targets).backward()
        evaluated = CountedAllocations()
        with torch.no_grad(), GPUOperators((9, 0)), evaluated:
            sums_of(ModelOutput(logits[None], logits[None]), targets[None], accuracy=True)
    assert evaluated.peak <= 4 * cross_entropy.PART_BYTES
    # The gradient, and four of a part.
    assert counted.peak <= logits.nbytes + 4 * cross_entropy.PART_BYTES
