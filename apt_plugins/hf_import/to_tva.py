"""Makes a model with TVA of an imported one with multi-head attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from torch import Tensor

from apt_core.modeling.to_tva import Heads, converted


def of_layers(
    tensors: Iterable[tuple[str, Tensor]],
    moments: Sequence[Tensor],
    heads: Heads,
    rank: int,
    *,
    width: int,
    seed: int,
    lost: list[dict[str, float]],
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model with TVA for those of one with multi-head attention, of which each
    attention's stand together; what was lost of each layer is added to ``lost``."""
    for place, part in groupby(tensors, lambda item: item[0].rpartition(".attention.")[0]):
        if not place:
            yield from part
            continue
        own = {name.rpartition(".attention.")[2]: tensor for name, tensor in part}
        norms = (own["q_norm.weight"], own["k_norm.weight"]) if "q_norm.weight" in own else None
        made = converted(
            own["qkv_weight"],
            own["out_weight"],
            norms,
            moments[len(lost)],
            heads,
            rank,
            width=width,
            seed=seed,
            name=f"{place}.attention",
        )
        lost.append({"scores": made.scores_lost, "values": made.values_lost})
        for name, tensor in made.parameters.items():
            yield f"{place}.attention.{name}", tensor
