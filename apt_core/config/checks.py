"""Finds contradictions between keys by small collectors, so that all are reported at once.

A collector asks its :class:`View` for values. Where a value is not known because it is wrong
itself, the collector is left out: one mistake is reported once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from apt_core.config.schema import Config
from apt_core.config.source import Source, parse_path
from apt_core.config.switches import Switch, looks_like_switch, read_switch
from apt_core.config.yaml_text import KeyPath
from apt_core.errors import Problem, did_you_mean
from apt_core.kinds import KINDS
from apt_core.profile_paths import is_pattern, is_url, matches
from apt_core.providers.attention import TVASettings
from apt_core.providers.dataset import SourceSection
from apt_core.sections import Ramp
from apt_core.task_names import is_task_file

ROTATES = "rope turns pairs of dimensions"


class Unknown(Exception):
    """A collector has asked for a value that is invalid itself."""


class View:
    """The valid values of a profile."""

    def __init__(self, config: Config, source: Source, bad: Collection[KeyPath]) -> None:
        self.config, self.source, self.bad = config, source, bad

    def __getitem__(self, key: str) -> Any:
        path = parse_path(key)
        if any(path[: len(bad)] == bad for bad in self.bad):
            raise Unknown(key)
        value: Any = self.config
        for part in path:
            value = value[part] if isinstance(part, int) else getattr(value, part, None)
        return value

    def problem(self, message: str, keys: str, hint: str = "") -> Problem:
        """A problem of the first of the ``keys`` (separated by spaces) that was written down."""
        names = keys.split()
        key = next((name for name in names if self.source.has(name)), names[0])
        return Problem(message, key, self.source.where(key), hint)

    def attention_names(self) -> tuple[str, ...]:
        pattern: tuple[str, ...] | None = self["model.attention_pattern"]
        return pattern or (self["model.attention_name"],)


def find_contradictions(
    config: Config, source: Source, bad: Collection[KeyPath] = ()
) -> list[Problem]:
    """Problems of several keys together. ``bad`` are paths whose values are invalid."""
    view = View(config, source, bad)
    problems: list[Problem] = []
    for collector in COLLECTORS:
        try:
            problems += collector(view)
        except Unknown:
            continue
    return problems


def check_files(config: Config, source: Source, files: Sequence[str]) -> list[Problem]:
    """Data files that the profile names and that are not there; what a URL leads to is not asked.

    ``files`` are the keys that the providers in use read as files (``data.train_path``).
    """
    view = View(config, source, ())
    problems = []
    for key in files:
        paths = view[key]
        for path in [paths] if isinstance(paths, str) else paths or ():
            if is_url(path) or os.path.exists(path):
                continue
            if not is_pattern(path):
                message = f"there is no file {path!r}"
            elif not matches(path):
                message = f"no file matches {path!r}"
            else:
                continue
            hint = (
                "a path is looked for beside the profile that says it, then in the folder that the "
                f"command runs in; {_without(key)}"
            )
            problems.append(Problem(message, key, source.where(key), hint))
    return problems


def check_task_files(config: Config, source: Source) -> list[Problem]:
    """Files of tasks that the profile names and that are not there."""
    key = "evaluation.tasks"
    hint = (
        "a path is looked for beside the profile that says it, then in the folder that the command "
        "runs in"
    )
    return [
        Problem(f"there is no file {name!r}", key, source.where(key), hint)
        for name in config.evaluation.tasks
        if is_task_file(name) and not os.path.exists(name)
    ]


def _without(key: str) -> str:
    """What a run does without the path at ``key``."""
    if key.endswith("val_path"):
        return "without val_path, a share of train_path is held out"
    return "without train_path, the embedded text is used"


def _heads(view: View) -> Iterator[Problem]:
    width, heads = view["model.d_model"], view["model.num_heads"]
    if set(view.attention_names()) == {"mha"} and view["model.mha.head_dim"] is not None:
        return
    if width % heads:
        yield view.problem(
            f"{width} is not divisible by the {heads} heads of model.num_heads",
            "model.d_model model.num_heads",
            f"{width // heads * heads} and {(width // heads + 1) * heads} are"
            if width > heads
            else f"a head is at least 1 wide: choose a d_model of {heads}, or fewer heads",
        )


def _kv_heads(view: View) -> Iterator[Problem]:
    heads, kv_heads = view["model.num_heads"], view["model.num_kv_heads"]
    if kv_heads is not None and heads % kv_heads:
        yield view.problem(
            f"{kv_heads} does not divide the {heads} heads of model.num_heads",
            "model.num_kv_heads",
            f"choose a divisor of {heads}",
        )


def _tva_rank(view: View) -> Iterator[Problem]:
    if not set(view.attention_names()) & set(TVASettings.ATTENTIONS):
        return
    width, heads = view["model.d_model"], view["model.num_heads"]
    ratio, asked = view["model.tva.r"], view["model.tva.rank"]
    if width % heads:
        return
    settings, head = view["model.tva"], width // heads
    rank = settings.rank_in(head)
    keys = "model.tva.r model.num_heads model.d_model" if asked is None else "model.tva.rank"
    if (fault := settings.rank_fault(head)) is not None:
        message, hint = fault
        yield view.problem(message, keys, hint)
    elif not rank % 2 or view["model.position_name"] != "rope":
        return
    elif asked is not None:
        yield view.problem(
            f"the rank {rank} is odd, and {ROTATES}",
            keys,
            "choose an even rank, or another model.position_name",
        )
    else:
        of = settings.WIDTH.format(head)
        yield view.problem(
            f"model.tva.r = {ratio} gives the odd rank {rank} of {of}, and {ROTATES}",
            keys,
            "choose another r, an even model.tva.rank, or another model.position_name",
        )


def _mha_width(view: View) -> Iterator[Problem]:
    if "mha" not in view.attention_names() or view["model.position_name"] != "rope":
        return
    width, heads = view["model.d_model"], view["model.num_heads"]
    head = view["model.mha.head_dim"]
    if head is not None:
        if head % 2:
            yield view.problem(
                f"{head} is odd, and {ROTATES}",
                "model.mha.head_dim",
                "choose an even width, or another model.position_name",
            )
        return
    head = width // heads
    if not width % heads and head % 2:
        yield view.problem(
            f"{width} gives each of the {heads} heads (model.num_heads) of mha the odd width "
            f"{head}, and {ROTATES}",
            "model.d_model model.num_heads",
            f"choose a d_model of {heads * (head + 1)}, or another model.position_name",
        )


def _rope_scaling(view: View) -> Iterator[Problem]:
    scaling = view["model.rope.scaling"]
    if view["model.position_name"] != "rope" or scaling is None:
        return
    for key, message, hint in scaling.faults():
        section = scaling.SECTION
        yield view.problem(message, f"{section}.{key} {section}.type {section}", hint)


def _vft_rank(view: View) -> Iterator[Problem]:
    if view["model.ffn_name"] != "vft":
        return
    width, _, asked = view["model.d_model"], view["model.vft.r"], view["model.vft.rank"]
    if (fault := view["model.vft"].rank_fault(width)) is not None:
        message, hint = fault
        keys = "model.vft.r model.d_model" if asked is None else "model.vft.rank"
        yield view.problem(message, keys, hint)


def _ngram(view: View) -> Iterator[Problem]:
    if view["model.ngram"] is None:
        return
    orders, buckets = view["model.ngram.orders"], view["model.ngram.buckets"]
    if not orders:
        yield view.problem(
            "must not be empty", "model.ngram.orders", "leave model.ngram out to have no n-grams"
        )
    elif len(set(orders)) != len(orders):
        yield view.problem(f"{list(orders)} has an order twice", "model.ngram.orders", "keep one")
    elif len(orders) != len(buckets):
        yield view.problem(
            f"{len(orders)} orders and {len(buckets)} tables: every order has a table",
            "model.ngram.buckets model.ngram.orders model.ngram",
            "give as many numbers to model.ngram.buckets as to model.ngram.orders",
        )


def _pattern(view: View) -> Iterator[Problem]:
    pattern, layers = view["model.attention_pattern"], view["model.num_layers"]
    if pattern is not None and not pattern:
        yield view.problem(
            "must not be empty", "model.attention_pattern", "leave it out to use attention_name"
        )
    elif pattern is not None and len(pattern) > layers:
        yield view.problem(
            f"names {len(pattern)} layers, and model.num_layers is {layers}",
            "model.attention_pattern",
            "shorten it, or raise model.num_layers",
        )


def _lengths(view: View) -> Iterator[Problem]:
    length, longest = view["data.max_length"], view["model.max_seq_len"]
    if length is not None and length > longest:
        yield view.problem(
            f"{length} tokens are more than the {longest} of model.max_seq_len",
            "data.max_length model.max_seq_len",
            "lower it, or raise model.max_seq_len",
        )


def _warmup(view: View) -> Iterator[Problem]:
    warmup, steps = view["training.warmup_steps"], view["training.max_steps"]
    keys = ("training.warmup_steps", "training.max_steps")
    # Shortening a run from the command line, to try something, is no mistake.
    in_profile = not view.source.recorded and all(
        view.source.has(key) and not view.source.where(key).startswith("--") for key in keys
    )
    if in_profile and steps is not None and warmup >= steps:
        yield view.problem(
            f"a warm-up of {warmup} steps does not end within training.max_steps = {steps}",
            "training.warmup_steps",
            "lower it, or raise training.max_steps",
        )


def _begins_early(view: View) -> Iterator[Problem]:
    """What a run needs whose length cannot depend on the data."""
    config, key = view.config, "data.begin_early"
    if not view[key]:
        return
    if view["training.max_steps"] is None:
        yield view.problem(
            "needs training.max_steps: how many windows an epoch has is not known at the start",
            key,
            "say how long the run is, or leave it out",
        )
    if config.data.mixture is not None:
        yield view.problem("goes without data.mixture", key, "build the data first: apt-data build")
    if config.data.packing != "concat":
        yield view.problem(
            "needs data.packing: concat: the others choose windows by all documents",
            key,
            "set data.packing to concat, or leave it out",
        )
    for name, value in config.schedules.items():
        if name.endswith("_at_epoch") or getattr(value, "by", "") == "epoch":
            yield view.problem(
                f"counts by epoch, of which a run with {key} has one",
                f"schedules.{name}",
                "count by step or by token",
            )


def _sources(view: View) -> Iterator[Problem]:
    for section, _ in view.config.data.sections():
        source, path = view[f"{section}.source"], view[f"{section}.train_path"]
        if source is not None and path is not None:
            yield view.problem(
                f"{section}.source is {source!r} and {section}.train_path is {path!r}: only one "
                "can be read",
                f"{section}.source",
                "leave one of them out",
            )
        loader = view[f"{section}.loader"]
        if source is not None and loader not in (source, KINDS["dataset"].default):
            yield view.problem(
                f"{section}.source is {source!r} and {section}.loader is {loader!r}: only one "
                "provides the text",
                f"{section}.source",
                "leave one of them out; null takes an inherited one back",
            )


def _packing(view: View) -> Iterator[Problem]:
    packing, padding = view["data.packing"], view["data.padding"]
    if packing == "pad" and padding in (False, "do_not_pad"):
        yield view.problem(
            "data.packing is pad, and data.padding says not to pad",
            "data.padding",
            "leave one of them out",
        )
    shortest, longest = view["data.min_chars"], view["data.max_chars"]
    if longest is not None and shortest > longest:
        yield view.problem(
            f"no document is longer than {shortest} and shorter than {longest} characters",
            "data.min_chars",
            "lower it, or raise data.max_chars",
        )


def _mixture(view: View) -> Iterator[Problem]:
    mixture = view["data.mixture"]
    if mixture is None:
        return
    if not mixture:
        yield view.problem("names no source", "data.mixture", "leave it out, or add one")
    elif not any(item.weight for item in mixture) and not view["schedules"]:
        yield view.problem(
            "all weights are 0: nothing can be drawn", "data.mixture", "give a source a weight"
        )
    for key, field in SourceSection.model_fields.items():
        if view[f"data.{key}"] != field.get_default(call_default_factory=True):
            yield view.problem(
                "nothing reads it beside data.mixture, of which each source has its own",
                f"data.{key}",
                f"move it into the sources; {key}: null takes an inherited one back",
            )


def _ramps(view: View) -> Iterator[Problem]:
    for key, ramp in view["schedules"].items():
        if not isinstance(ramp, Ramp):
            continue
        at = f"schedules.{key}"
        if ramp.by == "token" and ramp.until is None and ramp.warmup is None:
            yield view.problem(
                "a ramp by token needs its last position: it does not end with the run",
                at,
                "add until: N, or warmup: N",
            )
        if ramp.until is not None and ramp.warmup is not None:
            yield view.problem("until and warmup both say where the ramp ends", at, "keep one")
        # Not their product, which may round to 0.
        one_sign = min(ramp.start, ramp.end) > 0 or max(ramp.start, ramp.end) < 0
        if ramp.shape == "exponential" and not one_sign:
            yield view.problem(
                f"an exponential ramp cannot go from {ramp.start} to {ramp.end}",
                at,
                "use values of the same sign, neither of them 0, or another shape",
            )


def _switches(view: View) -> Iterator[Problem]:
    first: dict[tuple[str, bool], str] = {}
    switches: dict[str, dict[bool, Switch]] = {}
    for key, value in view["schedules"].items():
        if not looks_like_switch(key):
            continue
        at = f"schedules.{key}"
        switch = read_switch(key, value)
        if switch is None:
            words = "write enable_PLUGIN_at_epoch, _at_step or _at_token, or disable_…"
            forms = [f"{key.split('_at_')[0]}_at_{unit}" for unit in ("epoch", "step", "token")]
            yield view.problem("unknown key", at, did_you_mean(key, forms) or words)
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield view.problem(f"must be a whole number of at least 1, not {value!r}", at)
            continue
        earlier = first.setdefault((switch.plugin, switch.enables), key)
        if earlier != key:
            yield view.problem(f"says the same as {earlier}, in another unit", at, "keep one")
        switches.setdefault(switch.plugin, {})[switch.enables] = switch
    for plugin, pair in switches.items():
        if (
            len(pair) == 2
            and pair[True].unit == pair[False].unit
            and pair[False].at <= pair[True].at
        ):
            yield view.problem(
                f"{plugin} is disabled before it is enabled", f"schedules.{pair[False].key}"
            )


COLLECTORS: tuple[Callable[[View], Iterator[Problem]], ...] = (
    _heads,
    _kv_heads,
    _tva_rank,
    _mha_width,
    _rope_scaling,
    _vft_rank,
    _ngram,
    _pattern,
    _lengths,
    _warmup,
    _begins_early,
    _sources,
    _packing,
    _mixture,
    _ramps,
    _switches,
)
