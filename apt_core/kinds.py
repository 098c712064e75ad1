"""The kinds of providers: what holds for every provider of one kind, and which keys name it.

A key of the core that names a provider stands in KINDS; one in a plugin's section is declared
with the section (``SectionSpec.names``). Nothing else knows these keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from apt_core.task_names import is_task_file
from apt_core.types import SectionSpec


@dataclass(frozen=True)
class Kind:
    """One kind of provider.

    ``keys`` of the profile name the providers in use, one or a list; a later key that names any
    takes the place of those before. ``default`` is used where none is named, and where one that
    is named cannot be used, unless the kind has no ``fallback``: other text, or other ids, would be
    another experiment. ``optional``: the key may say none. Providers are looked at for their
    ``methods`` when they are built; those of a kind that is ``probed`` build a layer, which is
    tried before it is used. ``section`` has the settings of providers that name no section.
    """

    name: str
    keys: tuple[str, ...] = ()
    default: str = ""
    methods: tuple[str, ...] = ()
    fallback: bool = True
    optional: bool = False
    probed: bool = False
    section: str = ""


_LAYER = ("create_layer",)

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "attention",
            keys=("model.attention_name", "model.attention_pattern"),
            default="tva_default",
            methods=_LAYER,
            probed=True,
        ),
        Kind("ffn", keys=("model.ffn_name",), default="default", methods=_LAYER, probed=True),
        Kind("norm", keys=("model.norm_name",), default="rmsnorm", methods=_LAYER, probed=True),
        Kind(
            "position",
            keys=("model.position_name",),
            default="rope",
            methods=("create_rotary", "create_embedding"),
            optional=True,
        ),
        Kind("backbone", keys=("model.backbone_name",), default="gpt", methods=("create_model",)),
        Kind("router", methods=("create_router",)),
        Kind("align", methods=("terms",)),
        Kind("retrieval"),
        Kind(
            "tokenizer",
            keys=("data.tokenizer_name",),
            default="byte",
            methods=("encode", "decode"),
            fallback=False,
        ),
        Kind(
            "dataset",
            keys=("data.loader", "data.source"),
            default="text_default",
            methods=("documents",),
            fallback=False,
            section="data",
        ),
        Kind("optimizer", keys=("training.optimizer_name",), default="adamw", methods=("create",)),
        Kind(
            "lr_schedule",
            keys=("training.lr_schedule_name",),
            default="cosine",
            methods=("factor",),
        ),
        Kind("task", keys=("evaluation.tasks",), methods=("items",), fallback=False),
        Kind("exporter", methods=("check", "write"), fallback=False),
    )
}
"""Every kind by its name, in the order in which listings show them."""

Named = Mapping[tuple[str, str], str]
"""Maps kind and name of each provider to the key of the profile that names it."""


def naming_keys(sections: Iterable[SectionSpec] = ()) -> list[tuple[str, tuple[str, ...]]]:
    """Each kind with keys that name its providers: the core's, then those of plugins'
    ``sections``."""
    own = [(kind.name, kind.keys) for kind in KINDS.values()]
    return own + [
        (kind, (f"{section.path}.{key}",))
        for section in sections
        for key, kind in section.names.items()
    ]


def named_providers(data: Mapping[str, Any], sections: Iterable[SectionSpec] = ()) -> Named:
    """The providers that a profile, which may be unchecked, names by its own keys and those of
    ``sections``."""
    named: dict[tuple[str, str], str] = {}
    for kind, keys in naming_keys(sections):
        for key in reversed(keys):
            none = "none" if KINDS[kind].optional else ""
            names = [name for name in _texts(data, key) if name != none]
            if kind == "task":
                names = [name for name in names if not is_task_file(name)]
            for name in names:
                named.setdefault((kind, name), key)
            if names:
                break
    for place, item in _mixture(data):
        for key in ("source", "loader"):
            if names := list(_texts(item, key)):
                named.setdefault(("dataset", names[0]), f"{place}.{key}")
                break
    return named


def _mixture(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The sources of ``data.mixture``, each with its key."""
    section = data.get("data")
    mixture = section.get("mixture") if isinstance(section, Mapping) else None
    for at, item in enumerate(mixture if isinstance(mixture, list) else ()):
        yield f"data.mixture[{at}]", item


def _texts(data: Any, path: str) -> Iterator[str]:
    """The text, or the texts in the list, at a dotted path."""
    for key in path.split("."):
        data = data.get(key) if isinstance(data, Mapping) else None
    for item in data if isinstance(data, list | tuple) else (data,):
        if isinstance(item, str) and item:
            yield item
