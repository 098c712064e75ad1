"""Makes the transform of a growth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from apt_core import ConfigError
from apt_core.config import Config
from apt_core.modeling import Carried, ModelTransform
from apt_core.modeling.blocks import block_stack
from apt_core.modeling.growth import (
    CannotGrow,
    Sizes,
    composed,
    grow_parts,
    insert_blocks,
    origins_of,
)
from apt_core.modeling.plain import problems_by_message
from apt_plugins.growth.settings import head_width, heads_after, settings_of

HINT = "leave out the part, or this size (docs/curriculum.md: a layer that grows)"


def grown(model: nn.Module, config: Config) -> ModelTransform:
    """``model``, on the meta device and changed in place, with the sizes of ``growth``.

    Raises ConfigError for layers that cannot grow.
    """
    seed, now = config.training.seed, config.model
    sizes = sizes_after(config)
    origins: dict[str, Carried] = {}
    asked = [key for key, size in vars(sizes).items() if size is not None]
    if asked:
        try:
            larger = grow_parts(sizes, model=model)
        except CannotGrow as error:
            raise _refused(error, f"growth.{asked[0]}") from None
        larger = {name.removeprefix("model."): each for name, each in larger.items()}
        origins = origins_of(model, larger, seed)
    blocks = len(block_stack(model)[1])
    sources = sources_of_blocks(config, blocks)
    moved: dict[str, str] = {}
    if len(sources) > blocks:
        copies = settings_of(config).new_blocks == "copies"
        try:
            moved, silent = insert_blocks(model, sources, copies=copies, seed=seed)
        except CannotGrow as error:
            raise _refused(error, "growth.num_layers") from None
        wider = origins
        old = ModelTransform(model, moved=moved)
        origins = {}
        for name, _ in model.named_parameters():
            source = old.old_name(name)
            if name in silent:
                origins[name] = composed(wider.get(source), silent[name])
            elif source in wider:
                origins[name] = wider[source]
    return ModelTransform(
        model,
        origins,
        moved=moved,
        compared_ids=None if sizes.vocab_size is None else now.vocab_size,
        model_settings=settings_after(config, sizes, sources),
    )


def _refused(error: CannotGrow, key: str) -> ConfigError:
    reasons = [(place.removeprefix("model."), why, HINT) for place, why in error.reasons.items()]
    return ConfigError(
        replace(problem, key=key, message=f"{problem.key}: {problem.message}")
        for problem in problems_by_message(reasons)
    )


def sizes_after(config: Config) -> Sizes:
    """What grows; sizes that the model of ``config`` has already stay."""
    settings, model = settings_of(config), config.model
    heads = heads_after(config)
    kv_heads = (model.num_kv_heads or model.num_heads) * heads // model.num_heads
    grows = heads != model.num_heads
    return Sizes(
        d_model=settings.d_model,
        num_heads=heads if grows else None,
        num_kv_heads=kv_heads if grows else None,
        d_ff=settings.d_ff,
        vocab_size=settings.vocab_size,
    )


def sources_of_blocks(config: Config, blocks: int) -> list[int]:
    """For each block after the growth the number of that which it is, or is like: the first of a
    number is the old one."""
    settings = settings_of(config)
    total = settings.num_layers or blocks
    if settings.insert_after is None:
        return [number * blocks // total for number in range(total)]
    # A model that is tried in the place of the profile's may have fewer blocks.
    places = [min(place, blocks - 1) for place in settings.insert_after]
    return sorted([*range(blocks), *places])


def settings_after(config: Config, sizes: Sizes, sources: list[int]) -> dict[str, Any]:
    """The settings of ``model`` that are others after the growth."""
    model, settings = config.model, settings_of(config)
    after: dict[str, Any] = {
        key: size
        for key, size in vars(sizes).items()
        if size is not None and (key != "num_kv_heads" or model.num_kv_heads is not None)
    }
    if sizes.d_model is not None:
        if model.norm_name == "rmsnorm":
            eps = model.norm.eps * model.d_model / sizes.d_model
            after["norm"] = model.norm.model_copy(update={"eps": eps})
        rank = model.vft.rank_in(model.d_model)
        after["vft"] = model.vft.model_copy(update={"rank": rank})
    if settings.num_layers is not None:
        after["num_layers"] = len(sources)
        names = model.attention_names
        if model.attention_pattern is not None:
            after["attention_pattern"] = tuple(names[source % len(names)] for source in sources)
    assert head_width(config) is None or sizes.d_model is None or sizes.num_heads is not None
    return after
