"""Whatever stands in a profile: ConfigError while reading, problems while validating, no crash."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_core.config import (
    Config,
    Section,
    Source,
    check_files,
    parse_override,
    read_profile,
    validate,
)
from apt_core.config.yaml_text import parse_yaml
from apt_core.errors import ConfigError
from apt_core.schedules import check_schedules
from apt_core.types import SectionSpec

NAMES = ("base", "tiny_debug", "gpt5_moe_reasoning")
PROFILES = [read_profile(name).data for name in NAMES]
TEXT = "\n".join(
    line
    for line in yaml.safe_dump(PROFILES[2], sort_keys=False).splitlines()
    if not line.startswith(("hardware", "debug"))
)[:900].encode()


class Moe(Section):
    enabled: bool = True
    experts: int = 4


SECTIONS = [SectionSpec("model.moe", Moe), SectionSpec("mine.deep", Moe)]


def quick(examples: int) -> Any:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        found += paths_of(item, (*path, key))
    return found


PATHS = [paths_of(profile)[1:] for profile in PROFILES]
KEYS = sorted({key for paths in PATHS for path in paths for key in path if isinstance(key, str)})

keys = st.sampled_from(KEYS) | st.text(max_size=6) | st.sampled_from(
    ["extends", "mine", "deep", "enable__at_epoch", "enable_x_at_step", "数据", "<<", "a.b", "[0]"]
)  # fmt: skip
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.0, 1e300, 1e-320])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["cuda", "cpu", "auto", "mha", "epoch", "step", "token", "pydoc", "Ünï", ""])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
ramps = st.fixed_dictionaries(
    {"start": scalars, "end": scalars},
    optional={"by": scalars, "shape": scalars, "until": scalars, "warmup": scalars},
)


def deep(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"model": value}
    return value


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A real profile with one to six keys replaced, deleted, renamed or put in."""
    which = draw(st.integers(0, 2))
    profile = copy.deepcopy(PROFILES[which])
    for _ in range(draw(st.integers(1, 6))):
        path = draw(st.sampled_from(PATHS[which]))
        section: Any = profile
        for key in path[:-1]:
            if not isinstance(section, dict) or not isinstance(section.get(key), dict | list):
                break
            section = section[key]
        if not isinstance(section, dict):
            continue
        last = path[-1]
        match draw(st.sampled_from(["replace", "delete", "rename", "insert", "ramp", "deep"])):
            case "replace":
                section[last] = draw(values)
            case "delete":
                section.pop(last, None)
            case "rename":
                section[draw(keys)] = section.pop(last, None)
            case "insert":
                section[draw(keys)] = draw(values)
            case "ramp":
                profile["schedules"] = {draw(keys): draw(ramps), draw(keys): draw(scalars)}
            case "deep":
                section[last] = deep(draw(st.integers(1, 36)))
    return profile


def use(source: Source) -> None:
    """Everything that a command does with a profile before it builds anything."""
    config: Config | None = None
    for sections, inert in (([], {}), (SECTIONS, {"mine": "blocked", "training": "blocked"})):
        checked = validate(source, sections, inert=inert)
        config = checked.config
        assert (config is None) == bool(checked.problems)
        for problem in checked.problems:
            str(problem).encode()
        check_schedules(
            config, source, plugins={"moe"}, params={"route_temp": "moe"}, blocked={"align": "no"}
        )
        for item in checked.inactive:
            source.where(item.key)
    if config is not None:
        check_files(config, source, ("train_path", "val_path"))
        again = Source.from_dict(parse_yaml(config.to_yaml(), "x").data)
        assert validate(again, SECTIONS).require() == config


@quick(3000)
@given(mutated())
def test_no_mutated_profile_crashes_validation(profile: dict[str, Any]) -> None:
    try:
        source = Source.from_dict(profile)
    except ConfigError:
        return
    use(source)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


@quick(1000)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(TEXT)),
            st.integers(0, 6),
            st.binary(max_size=4)
            | st.sampled_from(
                [b"\n", b"\t", b": ", b"- ", b"[", b"{", b"&a ", b"*a", b"!!", b"'", b'"', b"|\n",
                 b"<<: ", b"%", b"---\n", b"? ", b"\xef\xbb\xbf", b"\x00", b"\xff", "é".encode()]
            ),
        ),
        min_size=1,
        max_size=5,
    )
)  # fmt: skip
def test_no_mutated_text_crashes_reading(folder: Path, edits: list[tuple[int, int, bytes]]) -> None:
    text = TEXT
    for at, length, insertion in edits:
        text = text[:at] + insertion + text[at + length :]
    file = folder / "mutated.yaml"
    file.write_bytes(text)
    try:
        source = read_profile(file)
    except ConfigError as error:
        assert error.problems
        return
    use(source)


@quick(500)
@given(
    st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "ignore"))
)
def test_no_random_text_crashes_reading(folder: Path, text: bytes) -> None:
    file = folder / "random.yaml"
    file.write_bytes(text)
    try:
        source = read_profile(file)
    except ConfigError:
        return
    use(source)


@quick(500)
@given(
    st.text(max_size=20)
    | st.builds("{}={}".format, st.sampled_from(["model.tva", "plugins", "a.b", "name"]), values)
)
def test_no_override_crashes(text: str) -> None:
    try:
        override = parse_override(text, where="--set")
    except ConfigError:
        return
    use(Source.from_dict(PROFILES[1]).with_overrides([override]))


def test_the_deepest_profile_that_is_read_does_not_exhaust_the_stack() -> None:
    limit = sys.getrecursionlimit()
    assert limit <= 10_000
    for depth in (30, 39, 41, 900, 100_000):
        text = "a: " + "[" * depth + "]" * depth
        try:
            validate(Source.from_dict(parse_yaml(text, "x").data))
        except ConfigError as error:
            assert depth > 30 and "nested" in str(error)
