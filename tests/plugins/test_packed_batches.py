"""Experts and alignment on rows that hold several documents, or padding: each document counts as it
does alone, and padding changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apt_core import ModelOutput
from apt_core.data.batches import Batch
from apt_core.data.packing.pieces import PieceIndex, PieceWindows, pack_documents, pad_documents
from apt_core.data.packing.rows import IGNORED
from apt_core.data.store.parts import ArrayPart
from apt_core.kernel import boot
from apt_core.modeling import ModelBuilder
from apt_core.modeling.calling import forward_batch
from apt_core.modeling.carry import materialize
from apt_core.modeling.cross_entropy import cross_entropy_sum
from apt_core.providers import Encoded
from apt_core.testing import TINY_PROFILE
from apt_plugins.align.alignment import last_with_vein, vein_of
from apt_plugins.align.objective import BistateProvider
from apt_plugins.moe import statistics
from apt_plugins.moe.layer import MoELayer, moe_layers
from apt_plugins.moe.settings import MoeSettings, settings_of
from apt_plugins.moe.upcycle import upcycled

LENGTH = 24
DOCUMENTS = (5, 9, 3, 17, 2, 12, 7, 23)
"""Their tokens; none is longer than a row."""

TERMS = MoeSettings(balance_loss=0.3, z_loss=0.1)


def part(*, prompts: bool) -> ArrayPart:
    random = np.random.default_rng(4)
    found = []
    for length in DOCUMENTS:
        ids = random.integers(0, 250, length).astype(np.uint8)
        learned = np.arange(length) >= max(1, length // 2) if prompts else None
        found.append(Encoded(ids, learned))
    return ArrayPart.of(found)


def windows_of(tokens: ArrayPart, packing: str, length: int = LENGTH) -> PieceWindows:
    packed = packing == "documents"
    if packed:
        blocks = pack_documents(tokens, length)
    else:
        blocks = pad_documents(tokens, length, truncation=False)
    return PieceWindows(tokens, length, PieceIndex.of(blocks), packed=packed, pad=7)


def whole(windows: PieceWindows) -> Batch:
    return Batch.of_rows(windows.rows(np.arange(len(windows))))


def alone(windows: PieceWindows) -> Iterator[Batch]:
    """Each document as a batch of its own, without any padding, in the order of the rows."""
    for row in range(len(windows)):
        for start, length in zip(*windows.index.pieces(row), strict=True):
            ids = windows.part.read(int(start), int(start + length + 1)).astype(np.int64)
            marks = windows.part.marks(int(start) + 1, int(start + length + 1))
            yield Batch(
                torch.from_numpy(ids[None, :-1]),
                torch.from_numpy(np.where(marks, ids[1:], IGNORED)[None]),
                int(marks.sum()),
                num_tokens=int(length),
            )


@pytest.fixture(scope="module")
def states() -> tuple[nn.Module, nn.Module]:
    """Two states of a model of experts that differ, in fp64 and training mode, without a capacity:
    how many tokens an expert takes depends on how many it sees together."""
    return _state(3), _state(4)


def _state(seed: int) -> nn.Module:
    """A model whose parameters, routers included, are drawn alike for a ``seed``."""
    kernel = boot(
        {
            **TINY_PROFILE,
            "plugins": ["apt_plugins.moe.plugin"],
            "model": {
                **TINY_PROFILE["model"],
                "max_seq_len": 64,
                "num_layers": 2,
                "tva": {"s": 1},
                "moe": {"experts": 4, "top_k": 2, "dropless": True},
            },
        }
    )
    builder = ModelBuilder(kernel.config, kernel.registry)
    dense = builder.build_model().double()
    with torch.device("meta"):
        structure = builder.build_model()
        transform = upcycled(structure, kernel.config, settings_of(kernel.config), kernel.registry)
    structure.double()
    model = materialize(transform, dense, seed=seed, num_layers=2).train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 * noise)
    assert len(moe_layers(model)) == 2
    return model


def counted(model: nn.Module, batch: Batch) -> tuple[Tensor, ModelOutput, list[tuple[Tensor, ...]]]:
    """The summed loss of ``batch``, the output, and what is left in the layers of experts."""
    output = forward_batch(model, model, batch)
    entropy = cross_entropy_sum(output, batch.targets)
    layers = moe_layers(model)
    left = [(layer.indices, layer.router.logits, layer.router.probabilities) for layer in layers]
    return entropy, output, left


def put(layers: list[MoELayer], left: list[tuple[Tensor, ...]]) -> None:
    for layer, (indices, logits, probabilities) in zip(layers, left, strict=True):
        layer.indices = indices
        layer.router.logits, layer.router.probabilities = logits, probabilities


def measured(
    states: tuple[nn.Module, nn.Module], batches: list[Batch], *, mutual: bool
) -> dict[str, Any]:
    """The losses of all tokens of ``batches``, which are computed apart and judged together, the
    loads of experts, and the gradients of both states."""
    live, stable = states
    layers = moe_layers(live)
    for model in states:
        model.zero_grad(set_to_none=True)
    parts = [counted(live, batch) for batch in batches]
    others = [forward_batch(stable, stable, batch) for batch in batches]
    outputs = [_together([each[1] for each in parts]), _together(others)]
    left = [
        tuple(torch.cat(tensors) for tensors in zip(*layer, strict=True))
        for layer in zip(*(each[2] for each in parts), strict=True)
    ]
    put(layers, left)
    masks = torch.cat([batch.token_mask().flatten() for batch in batches])[None]
    targets = torch.cat([batch.targets.flatten() for batch in batches])[None]
    number = sum(batch.num_targets for batch in batches)
    judged = Batch(
        targets.clamp_min(0), targets, number, num_tokens=int(masks.sum()), is_token=masks
    )
    statistics.start_counting(layers)
    terms = statistics.losses(layers, judged, TERMS)
    terms |= BistateProvider({"alpha": 0.4, "beta": 0.3}).terms(
        *outputs, targets, vein=vein_of(last_with_vein(live)), mutual=mutual
    )
    entropy = sum(each[0] for each in parts) / number
    (entropy + sum(terms.values())).backward()
    gradients = {
        f"{number}.{name}": parameter.grad
        for number, model in enumerate(states[: 1 + mutual])
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert len(gradients) > 20
    return {
        "losses": {"cross_entropy": entropy.item()} | {n: t.item() for n, t in terms.items()},
        "loads": [layer.load.tolist() for layer in layers],
        "gradients": {name: gradient.clone() for name, gradient in gradients.items()},
    }


def _together(outputs: list[ModelOutput]) -> ModelOutput:
    return ModelOutput(
        torch.cat([output.logits.flatten(0, 1) for output in outputs])[None],
        torch.cat([output.hidden.flatten(0, 1) for output in outputs])[None],
    )


def require_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["loads"] == expected["loads"]
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in found["gradients"].items():
        torch.testing.assert_close(gradient, expected["gradients"][name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("packing", ["documents", "pad"])
def test_documents_count_in_a_row_as_they_do_alone(
    states: tuple[nn.Module, nn.Module], packing: str, prompts: bool, mutual: bool
) -> None:
    windows = windows_of(part(prompts=prompts), packing)
    together = whole(windows)
    assert together.token_count == sum(DOCUMENTS) - len(DOCUMENTS) < together.targets.numel()
    found = measured(states, [together], mutual=mutual)
    expected = measured(states, list(alone(windows)), mutual=mutual)
    assert set(found["losses"]) == {"cross_entropy", "balance", "z", "kl", "info_nce"}
    assert sum(found["loads"][0]) == 2 * together.token_count
    require_same(found, expected)


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("packing", ["documents", "pad"])
def test_twice_the_padding_changes_nothing(
    states: tuple[nn.Module, nn.Module], packing: str, prompts: bool
) -> None:
    windows = windows_of(part(prompts=prompts), packing)
    rows = windows.rows(np.arange(len(windows)))
    found = measured(states, [Batch.of_rows(rows)], mutual=True)
    for name, filling in (("ids", 7), ("targets", IGNORED), ("document_ids", -1)):
        array = getattr(rows, name)
        padding = np.full_like(array, filling)
        setattr(rows, name, np.concatenate([array, padding], axis=1))
    require_same(measured(states, [Batch.of_rows(rows)], mutual=True), found)
