"""Weights of 8 and 4 bits: what is kept computes what rounding gives, in forwards and in decoding,
and runs that are made so are runs like others."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="weights are torch's")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apt_core import GenerationRequest, hookimpl
from apt_core.cli.eval import app as eval_app
from apt_core.cli.generate import app as generate_app
from apt_core.cli.run_command import run_command
from apt_core.errors import AptError, CheckpointError, ConfigError
from apt_core.inference import Engine
from apt_core.modeling.carry import materialize
from apt_core.modeling.plain import plain_model
from apt_core.modeling.row_decoding import Products, RowStep
from apt_core.runs import Session, open_run
from apt_core.testing import tiny_run, tiny_session
from apt_plugins.moe.settings import MoeSettings
from apt_plugins.moe.upcycle import upcycled
from apt_plugins.quant.command import app
from apt_plugins.quant.cpu_products import StoredWeight
from apt_plugins.quant.layers import Measured, choose, fake, pack, stored_weights, without_fake
from apt_plugins.quant.record import Record
from apt_plugins.quant.rounding import Rounding, signal_to_noise

BITS = {8: Rounding(8), 4: Rounding(4, 128)}
SIZES: dict[str, Any] = {
    "model.d_model": 64,
    "model.num_heads": 4,
    "model.d_ff": 96,
    "model.num_layers": 1,
    "model.max_seq_len": 40,
    "hardware.num_threads": 1,
}
MHA = {"model.attention_name": "mha"}
MODELS: dict[str, dict[str, Any]] = {
    "tva": {},
    "gqa, QK-norm, untied": {
        **MHA,
        "model.num_kv_heads": 2,
        "model.mha.qk_norm": True,
        "model.tie_embeddings": False,
    },
    "tva with a compensator, vft": {
        "model.tva.s": 2,
        "model.ffn_name": "vft",
        "model.vft.rank": 32,
    },
    "tva factored, gelu": {"model.tva.factored": True, "model.ffn_name": "gelu"},
    "experts": {},
}


def session_of(name: str) -> Session:
    """A model with noise in its weights."""
    session = tiny_session("moe", overrides={**SIZES, **MODELS[name]})
    if name == "experts":
        from apt_core.modeling import ModelBuilder

        with torch.device("meta"):
            structure = ModelBuilder(session.config, session.registry).build_model()
            settings = MoeSettings(experts=3, top_k=2, shared_expert="split")
            transform = upcycled(structure, session.config, settings, session.registry)
        made = materialize(transform, session.model, seed=1, num_layers=1)
        session = replace(session, model=made.eval())
    with torch.no_grad():
        for index, parameter in enumerate(session.model.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return session


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    ids = torch.arange(60).view(3, 20) * 7 % 256
    found: Tensor = model(ids).logits
    return found


@torch.inference_mode()
def decoded_logits(model: Any, products: Products) -> Tensor:
    """The logits of the first row of :func:`logits_of`, the last three of them token by token."""
    rows, ids = model.rows(products), torch.arange(20)[None] * 7 % 256
    found = []
    for first, last in ((0, 17), (17, 18), (18, 19), (19, 20)):
        places = torch.arange(first, last)[None]
        step = RowStep(places, first=0, span=last, mask=False, last=39)
        found.append(rows.logits(rows.hidden(ids[:, first:last], step)))
    return torch.cat(found)[None]


def tokens_of(session: Session, **options: Any) -> list[tuple[int, ...]]:
    requests = [
        GenerationRequest(text, max_new_tokens=12, temperature=0.0)
        for text in ("a", "some text", "The quick brown fox")
    ]
    return [result.token_ids for result in Engine(session, **options).run(requests)]


# Rounding ---------------------------------------------------------------------------------------


def test_rounding_and_packing_are_exact_inverses_and_as_good_as_they_are_said_to_be() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[4, :128] = 1e-30
    for rounding, least in ((Rounding(8), 42), (Rounding(4, 128), 19.8), (Rounding(4, 32), 21)):
        codes, scales = rounding.round(weight)
        kept = rounding.packed(codes)
        assert kept.nbytes == weight.numel() * rounding.bits // 8
        assert rounding.unpacked(kept).equal(codes)
        values = rounding.values(codes, scales)
        assert values[3].eq(0).all()
        assert signal_to_noise(weight, values) > least
        assert rounding.fake(weight).equal(values)
        product = StoredWeight(kept, scales, rounding).product()
        assert product is not None
        for rows in (1, 4, 5, 16):
            x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows))
            expected = x.bfloat16().float() @ values.T
            torch.testing.assert_close(product(x), expected, rtol=0.01, atol=0.05)


def test_groups_are_halved_until_they_divide_a_row() -> None:
    rounding = Rounding(4, 128)
    found = {width: rounding.for_width(width) for width in (1792, 448, 96, 80, 33)}
    groups = {width: None if own is None else own.group for width, own in found.items()}
    assert groups == {1792: 128, 448: 64, 96: 32, 80: None, 33: None}
    assert Rounding(8).for_width(33) == Rounding(8)
    assert Rounding(8).for_width(4) is None


def test_the_gradient_goes_on_as_if_nothing_was_rounded() -> None:
    weight = torch.randn(4, 64, requires_grad=True)
    upstream = torch.randn(4, 64)
    Rounding(4, 32).fake(weight).backward(upstream)
    assert weight.grad is not None and weight.grad.equal(upstream)


# Models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_every_form_of_layer_computes_with_what_is_kept(bits: int) -> None:
    for name in MODELS:
        session = session_of(name)
        model, before = session.model, logits_of(session.model)
        rounded = copy.deepcopy(model)
        fake(choose(rounded, BITS[bits]).layers)
        expected = logits_of(rounded)
        assert not expected.equal(before), name
        assert without_fake(rounded) and logits_of(rounded).equal(before), name
        measured: list[Measured] = []
        choice = choose(model, BITS[bits])
        pack(choice.layers, measured.append)
        assert logits_of(model).equal(expected), name
        assert min(each.noise for each in measured) > {8: 42, 4: 19}[bits], name
        kept = {each.name.rpartition(".")[2] for each in choice.kept if "router" not in each.name}
        basis = {"basis", "normal_weight", "gate_weight", "out_weight"}
        assert kept <= {"weight", "compress", "lift", *basis}, name
        for each in choice.kept:
            assert each.name in dict(model.named_parameters()), name
        tied = model.head is None
        outside = {each.name for each in choice.kept if "outside" in each.reason}
        assert outside == {"embedding.weight", *([] if tied else ["head.weight"])}, name
        # Decoding takes the integers, and gives what forwards give but for the rounding of x.
        for exact, most in ((True, 1e-4), (False, 0.02)):
            products = Products(exact=exact)
            decoded = decoded_logits(model, products)
            assert (products.rounded == 0) is exact and products.rounded != 1, name
            difference = (decoded - expected[:1]).norm() / expected[:1].norm()
            assert difference < most, (name, exact, difference)
        assert tokens_of(session) == tokens_of(session, max_batch=1), name
        if name in ("tva", "gqa, QK-norm, untied"):
            plain = plain_model(model).block(0)
            stored = [*stored_weights(model)]
            assert plain.attention.out.equal(model.blocks[0].attention.projections()[1])
            assert len(stored) == len(measured)


def test_a_stranger_s_layer_is_rounded_by_its_matrices() -> None:
    class Own(nn.Module):
        full_precision = ("mixing",)
        elementwise = ("table",)

        def __init__(self) -> None:
            super().__init__()
            self.mixing, self.table, self.plain = (
                nn.Parameter(torch.randn(64, 64)) for _ in range(3)
            )
            self.narrow = nn.Linear(5, 7)
            self.shared = self.other = nn.Linear(64, 64)
            self.again = nn.Linear(64, 64)
            self.again.weight = self.shared.weight
            self.scale = nn.Parameter(torch.ones(64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.mixing @ self.table @ self.plain * self.scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Own()])

    model = Model()
    choice = choose(model, Rounding(4, 128))
    assert [(each.path, [*each.roundings]) for each in choice.layers] == [("blocks.0", ["plain"])]
    assert {each.name: each.reason for each in choice.kept} == {
        "blocks.0.mixing": "its layer needs it exactly",
        "blocks.0.table": "its rows are learned separately",
        "blocks.0.narrow.weight": "5 columns do not group",
        "blocks.0.shared.weight": "several modules share it",
    }
    own: Any = model.blocks[0]
    x, values = torch.randn(2, 64), Rounding(4, 64).fake(own.plain.detach())
    pack(choice.layers)
    expected = x @ own.mixing @ own.table @ values * own.scale
    assert own(x).equal(expected) and isinstance(own, Own)
    assert copy.deepcopy(own)(x).equal(expected)


# Runs -------------------------------------------------------------------------------------------

TINY = {
    "model.d_model": 64,
    "model.num_heads": 2,
    "model.d_ff": 64,
    "model.max_seq_len": 64,
    "hardware.num_threads": 1,
    "training.ema_decay": 0.5,
    "training.save_every_steps": 2,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, one that trained with rounded weights, and both with 4 bits."""
    root = tmp_path_factory.mktemp("quant")
    tiny_run(steps=4, overrides=TINY, output=root / "plain")
    aware = {"model.quant.bits": 4, "schedules.enable_quant_at_step": 3}
    tiny_run("quant", steps=4, overrides={**TINY, **aware}, output=root / "aware")
    for name in ("plain", "aware"):
        command(str(root / name), "--bits", "4", "-o", str(root / f"{name}4"), "--force")
    return root


def command(*words: str, code: int = 0, of: Any = app, name: str = "apt-quantize") -> None:
    assert run_command(of, name, words) == code


def record_of(run: Path) -> Record:
    return Record.model_validate(json.loads((run / "quantisation.json").read_text("utf-8")))


def test_a_quantised_run_generates_and_is_scored_as_any_other(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(runs / "plain4")
    assert record.perplexity is not None and abs(record.perplexity.change) < 0.04
    assert record.noise > 18 and record.layer_bytes_before > 7 * record.layer_bytes_after
    assert record.run == str(runs / "plain")
    file = runs / "plain4" / "checkpoints" / "step-00000004" / "model.safetensors"
    assert {t.dtype for n, t in load_file(file).items() if n.endswith("_codes")} == {torch.uint8}
    command(
        str(runs / "plain4"), "a", "--max-new-tokens", "3", of=generate_app, name="apt-generate"
    )
    command(
        *(str(runs / name) for name in ("plain", "plain4")), "--json", of=eval_app, name="apt-eval"
    )
    capsys.readouterr()
    session = open_run(runs / "plain4")
    assert [*stored_weights(session.model)] and session.position.step == 4


def test_training_with_rounded_weights_knows_what_they_will_be(runs: Path) -> None:
    """The loss that the run saw is that of the quantised run; a resume is bit-exact."""
    rounded, quantised = open_run(runs / "aware"), open_run(runs / "aware4")
    assert logits_of(rounded.model).equal(logits_of(quantised.model))
    aware = {"model.quant.bits": 4, "schedules.enable_quant_at_step": 3}
    copied = runs / "resumed"
    shutil.copytree(runs / "aware", copied)
    for later in copied.glob("checkpoints/step-00000004"):
        shutil.rmtree(later)
    tiny_run("quant", steps=4, overrides={**TINY, **aware}, output=copied, resume=True)
    files = (f"checkpoints/step-00000004/{n}.safetensors" for n in ("model", "optimizer"))
    for name in files:
        assert (copied / name).read_bytes() == (runs / "aware" / name).read_bytes()


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2, says: str) -> None:
    command(*words, code=code)
    assert says in capsys.readouterr().err


def test_bad_input_is_refused_before_the_work(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, new = str(runs / "plain"), str(tmp_path / "new")
    for words, says in (
        ((plain, "-o", new), "--bits: is missing"),
        ((plain, "--bits", "3", "-o", new), "--bits: is 3 (8 or 4)"),
        ((plain, "--bits", "4", "--group", "100", "-o", new), "--group: is 100"),
        ((plain, "--bits", "8", "--group", "64", "-o", new), "goes with --bits 4"),
        ((plain, "--bits", "8"), "--output: is missing"),
        ((plain, "--bits", "8", "-o", plain), "is there, and is not empty"),
        ((str(runs / "plain4"), "--bits", "8", "-o", new, "--force"), "of 4 bits already"),
        ((str(tmp_path), "--bits", "8", "-o", new), "there is no checkpoint"),
        ((str(tmp_path / "none"), "--bits", "8", "-o", new), "there is no such run"),
    ):
        refused(capsys, *words, says=says)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs / "plain", unfinished)
    manifest = json.loads((unfinished / "manifest.json").read_text("utf-8"))
    (unfinished / "manifest.json").write_text(json.dumps({**manifest, "status": "failed"}))
    refused(capsys, str(unfinished), "--bits", "8", "-o", new, says="unfinished")
    narrow = tmp_path / "narrow"
    tiny_run(steps=1, overrides={"model.d_ff": 20, "model.d_model": 24}, output=narrow)
    refused(
        capsys, str(narrow), "--bits", "4", "-o", new, "--force", says="24 columns do not group"
    )
    assert [*tmp_path.iterdir()] and not Path(new).exists()


def test_integers_are_not_trained(runs: Path) -> None:
    quant = {"model.quant.bits": 4, "model.quant.packed": True}
    for options in ({"output": runs / "plain4", "resume": True}, {}):
        with pytest.raises(ConfigError, match="integers, which cannot be trained"):
            tiny_run("quant", steps=6, overrides={**TINY, **quant}, **options)


def test_a_damaged_quantised_checkpoint_is_refused(runs: Path, tmp_path: Path) -> None:
    def spoilt(change: Callable[[dict[str, Tensor]], None] | None) -> Path:
        run = tmp_path / str(len([*tmp_path.iterdir()]))
        shutil.copytree(runs / "plain4", run)
        file = run / "checkpoints" / "step-00000004" / "model.safetensors"
        if change is None:
            file.write_bytes(file.read_bytes()[:-10])
            return run
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        manifest = json.loads((file.parent / "manifest.json").read_text("utf-8"))
        _seal(manifest, file)
        return run

    name = "blocks.0.ffn.up.weight"

    def no_scales(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{name}_scales"]

    def other_codes(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}_codes"] = tensors[f"{name}_codes"].view(torch.int8)

    def infinite(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}_scales"][0] = torch.inf

    for change, says in (
        (None, "sha256"),
        (no_scales, f"{name}_scales"),
        (other_codes, f"{name}_codes"),
        (infinite, "not finite"),
    ):
        with pytest.raises(CheckpointError, match=says):
            open_run(spoilt(change))


def _seal(manifest: dict[str, Any], file: Path) -> None:
    """Give the manifest the sums of a changed file."""
    import hashlib

    from apt_core.runs.scores import digest

    manifest.pop("manifest_sha256")
    manifest["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["manifest_sha256"] = digest(manifest)
    (file.parent / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def test_nothing_is_left_of_a_run_that_does_not_compute_what_it_should(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from apt_plugins.quant import quantising

    def spoilt(tensor: Tensor) -> dict[str, Tensor]:
        return {name: each + (each.dtype == torch.bfloat16) for name, each in whole(tensor).items()}

    whole: Any = quantising.model_tensors
    monkeypatch.setattr(quantising, "model_tensors", spoilt)
    new = tmp_path / "new"
    refused(
        capsys,
        str(runs / "plain"),
        *("--bits", "8", "-o", str(new), "--documents", "0", "--force"),
        code=1,
        says="does not compute what it should",
    )
    assert not [*tmp_path.iterdir()]


def test_plugins_of_the_run_go_with_it(tmp_path: Path) -> None:
    """A plugin that changes the model by a head of its own, and is needed to open it."""

    class WithHead:
        @hookimpl
        def apt_transform_model(self, model: Any) -> Any:
            from apt_core.modeling import ModelTransform

            model.extra = nn.Linear(model.d_model, 8)
            return ModelTransform(model)

    from apt_plugins.quant.quantising import Asked, quantise

    tiny_run(WithHead(), steps=2, overrides=TINY, output=tmp_path / "run")
    session = open_run(tmp_path / "run", plugins=[WithHead()])
    with pytest.raises(AptError):  # nobody could open it without the object
        quantise(Asked(session, "last", Rounding(8), tmp_path / "new", 0), lambda *_: None)
    assert not (tmp_path / "new").exists()


def test_experts_are_not_made_of_rounded_weights() -> None:
    """Copies would lose the rounding: what enables the two in this order is told."""
    session = session_of("tva")
    fake(choose(session.model, Rounding(8)).layers)
    with pytest.raises(ConfigError, match="enable what computes them after moe"):
        upcycled(session.model, session.config, MoeSettings(), session.registry)
