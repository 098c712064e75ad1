"""What the keys of a profile say of providers: which are used, whether they can be, and which keys
nothing reads because another provider is used.

A key reaches its reader like this: a key in the table of kinds, or one that a plugin's section
declares (``SectionSpec.names``), names a provider; its ``ProviderSpec`` in the catalogue says which
``section`` holds its settings and which other keys it ``reads``; the registry builds it with that
section.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from apt_core.catalogue import Catalogue
from apt_core.config import Config, InactiveKey, Source
from apt_core.errors import Problem
from apt_core.kinds import KINDS, Named, named_providers, naming_keys
from apt_core.providers.dataset import SourceSection
from apt_core.types import CORE, Inactive, SectionSpec

DATA_PATHS = ("train_path", "val_path")
"""The keys of ``data`` that may be files."""


def used_providers(config: Config, sections: Sequence[SectionSpec]) -> Named:
    """The providers that a checked profile uses, each with the key that names it."""
    data = config.to_dict()
    mixture = config.data.mixture
    # Where no text is named, it is a built-in one; beside a mixture none is read.
    data["data"]["source"] = config.data.text_source if mixture is None else None
    data["data"]["loader"] = config.data.loader if mixture is None else None
    for item, row in zip(mixture or (), data["data"]["mixture"] or (), strict=True):
        row["source"] = item.text_source
    return named_providers(data, sections)


def check_providers(named: Named, known: Catalogue, source: Source) -> list[Problem]:
    """Problems of unknown providers and of providers that conflict."""
    problems = [
        known.check_name(kind, name, key=key, where=source.where(key))
        for (kind, name), key in named.items()
    ]
    conflicts = known.check_conflicts(f"{kind}:{name}" for kind, name in named)
    return [problem for problem in problems if problem] + conflicts


def inactive_provider_settings(
    named: Named, known: Catalogue, sections: Sequence[SectionSpec]
) -> Iterator[Inactive]:
    """Sections and keys that only providers read which the profile does not use."""
    deciding: dict[str, tuple[str, ...]] = {}
    for kind, keys in naming_keys(sections):
        deciding[kind] = deciding.get(kind, ()) + keys
    specs = known.specs()
    used = [spec for spec in specs if (spec.kind, spec.name) in named]
    may_fall_back = {kind for kind, _ in named} - {s.kind for s in used if s.plugin == CORE}
    may_fall_back |= {spec.kind for spec in used if spec.plugin != CORE}
    read_sections = {spec.section for spec in used} | {
        spec.section for spec in specs if spec.default and spec.kind in may_fall_back
    }
    # A plugin may read its section itself, whichever provider is used.
    shared = {section.path for section in sections}
    silent = {spec.kind for spec in used if spec.reads is None}
    silent |= {kind for kind, _ in named.keys() - {(spec.kind, spec.name) for spec in used}}
    read = {key for spec in used for key in spec.reads or ()}
    for spec in specs:
        because = deciding[spec.kind]
        own = spec.section.startswith("model.") and spec.section not in shared
        own = own or (not KINDS[spec.kind].fallback and spec.section not in ("", "data"))
        if own and spec.section not in read_sections:
            yield Inactive(spec.section, f"{spec.key} is not used", because)
        for key in spec.reads or ():
            if key not in read and spec.kind not in silent:
                names = ", ".join(other.name for other in used if other.kind == spec.kind)
                yield Inactive(key, f"{spec.kind}:{names} does not read it", because)


def data_files(config: Config, known: Catalogue) -> tuple[str, ...]:
    """The keys that the dataset providers in use say they read as files."""
    return tuple(
        f"{section}.{key}"
        for section, settings in config.data.sections()
        for key in DATA_PATHS
        if key in (_declared_files(settings, known) or ())
    )


def unread_paths(config: Config, known: Catalogue) -> Iterator[InactiveKey]:
    """Paths that the dataset provider of their section says it does not read."""
    for section, settings in config.data.sections():
        declared = _declared_files(settings, known)
        if declared is None:
            continue
        for key in DATA_PATHS:
            if getattr(settings, key) is not None and key not in declared:
                reason = f"dataset:{settings.dataset_name} does not read it"
                yield InactiveKey(f"{section}.{key}", reason)


def _declared_files(settings: SourceSection, known: Catalogue) -> Sequence[str] | None:
    name = settings.dataset_name
    return next((spec.files for spec in known.specs("dataset") if spec.name == name), None)
