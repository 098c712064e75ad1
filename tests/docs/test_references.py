"""The references that are generated are those of the code, and nothing is missing from them."""

from __future__ import annotations

import configparser
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
from pydantic import BaseModel

from apt_core.catalogue import Catalogue
from apt_core.cli.verbs import VERBS, WITHOUT_COMMAND, every_app
from apt_core.config import Config
from apt_core.errors import ConfigError
from apt_core.hookspecs import POLICIES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SCRIPT = runpy.run_path(str(DOCS / "references.py"))
try:
    PAGES: dict[str, str] = SCRIPT["references"]()
    SHIPPED: dict[str, Any] = SCRIPT["shipped"]()
except ConfigError as error:
    pytest.skip(f"the references need every extra: {error}", allow_module_level=True)
GENERATED = ("hooks.md", "providers.md", "commands.md")


@pytest.mark.parametrize("page", PAGES)
def test_no_reference_is_stale(page: str) -> None:
    kept = (DOCS / page).read_text(encoding="utf-8")
    assert kept == PAGES[page], "python docs/references.py writes it"


def test_every_hook_and_every_provider_has_its_part() -> None:
    assert headings("hooks.md", 2) == [*POLICIES]
    catalogue = Catalogue((name, each.providers) for name, each in SHIPPED.items())
    assert len(catalogue.specs()) > 40
    assert sorted(headings("providers.md", 3)) == sorted(spec.key for spec in catalogue.specs())
    for spec in catalogue.specs():
        part = part_of("providers.md", f"### {spec.key}")
        facts = catalogue.get_info(spec.kind, spec.name)
        told = re.search(r"^Those of `(.+)`\.$", part, re.M)
        part = part_of("providers.md", f"### {told[1]}") if told else part
        missing = [
            key for key in facts["config"]["schema"].get("properties", ()) if key not in part
        ]
        assert missing == [], spec.key


def test_every_key_has_its_row() -> None:
    page = (DOCS / "profiles.md").read_text(encoding="utf-8")
    rows = {
        (section.partition("\n")[0], key)
        for section in re.split(r"^### ", page, flags=re.M)[1:]
        for key in re.findall(r"^\| `(\w+)` \|", section, re.M)
    }
    keys = set(keys_of("", Config))
    for declared in SHIPPED.values():
        for section in declared.sections:
            if section.model is not None:
                keys |= set(keys_of(section.path, section.model))
    assert len(keys) > 250
    assert {f"{path or 'top'}: {key}" for path, key in keys} == {
        f"{'top' if path == 'Top of the profile' else path}: {key}" for path, key in rows
    } - {"top: extends"}


def keys_of(path: str, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """The keys of a section and of those in it, with the paths of their sections."""
    for name, field in model.model_fields.items():
        key, below = field.alias or name, f"{path}.{field.alias or name}".lstrip(".")
        several, inner = section_in(field.annotation)
        if inner is None:
            yield path, key
        else:
            if several:
                yield path, key
            yield from keys_of(f"an entry of {below}" if several else below, inner)


def section_in(annotation: Any) -> tuple[bool, type[BaseModel] | None]:
    """The section that a field holds, and whether it holds several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return False, annotation
    several = getattr(annotation, "__origin__", None) in (list, tuple, dict)
    for part in get_args(annotation):
        more, inner = section_in(part)
        if inner is not None:
            return several or more, inner
    return False, None


def test_every_command_and_every_option_has_its_row() -> None:
    setup = configparser.ConfigParser(delimiters="=")
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    points = setup["options.entry_points"]
    installed, of_plugins = (
        dict(line.split(" = ") for line in points[group].strip().splitlines())
        for group in ("console_scripts", "apt.commands")
    )
    verbs = {f"apt-{verb}" for verb in VERBS if verb not in WITHOUT_COMMAND}
    assert installed.keys() == verbs | of_plugins.keys()
    apps = every_app(of_plugins)
    assert sorted(headings("commands.md", 2)) == sorted(apps)
    for name, app in apps.items():
        command = typer.main.get_command(app)
        verbs_of = dict(getattr(command, "commands", {}))
        if not verbs_of or getattr(command, "invoke_without_command", False):
            verbs_of[""] = command
        for verb, each in verbs_of.items():
            heading = f"### {name} {verb}" if verb else f"## {name}"
            part = part_of("commands.md", heading)
            for parameter in each.params:
                options = [*parameter.opts, *parameter.secondary_opts]
                if parameter.param_type_name == "option" and not parameter.hidden:
                    assert [o for o in options if f"`{o}`" not in part] == [], heading
                assert (parameter.help or "")[:20] in part.replace("\\", ""), heading


@pytest.mark.parametrize("text", ["README.md", "README.zh-CN.md"])
def test_the_readme_names_every_command(text: str) -> None:
    page = (ROOT / text).read_text(encoding="utf-8")
    commands = [name for name in headings("commands.md", 2) if name.startswith("apt-")]
    assert [name for name in commands if f"`{name}" not in page] == []


def test_every_shipped_plugin_is_told_of_by_a_guide() -> None:
    guides = "".join(
        path.read_text(encoding="utf-8").partition("### Top of the profile")[0]
        for path in DOCS.glob("*.md")
        if path.name not in (*GENERATED, "performance.md")
    )
    ways = ("`{}`", "apt-{}", "--plugin {}")
    assert [n for n in SHIPPED if not any(way.format(n) in guides for way in ways)] == []


def headings(page: str, level: int) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^{'#' * level} (.+)$", text, re.M)


def part_of(page: str, heading: str) -> str:
    """What stands under a heading, up to the next one."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return text[text.index(f"\n{heading}\n") :].lstrip().partition("\n#")[0]
