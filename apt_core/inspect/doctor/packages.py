"""The installed packages that APT needs or can use, by the metadata of its own distribution."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path

from apt_core import __version__
from apt_core.distributions import OWN as DISTRIBUTION
from apt_core.distributions import source_folder
from apt_core.error_text import one_line
from apt_core.files import read_file
from apt_core.inspect.doctor.checks import BROKEN, NOTE, OK, Check, in_gib
from apt_core.plugin_names import normalized_name
from apt_core.requirements import unmet

FOR_DEVELOPMENT = {"all", "bench", "dev", "test"}
"""Extras that no feature needs."""

MAX_VERSION_FILE = 2**20
IMPORT_SECONDS = 300
"""After which an import is given up."""

_EXTRA = re.compile(r"""\bextra\s*==\s*["']([\w.-]+)["']""")
_TOP_LEVEL = re.compile(r"^(?:([A-Za-z_]\w*)/__init__|([A-Za-z_]\w*))\.(?:py|[\w.-]*so),", re.M)


@dataclass(frozen=True)
class TorchBuild:
    """The version of torch, and that of CUDA or ROCm it is built for; empty for none."""

    version: str
    cuda: str
    rocm: str


def apt() -> Iterator[Check]:
    where = Path(__file__).resolve().parents[3]
    try:
        found = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield Check(
            "APT",
            NOTE,
            f"{__version__} in {where}, not installed: commands and shipped plugins are not found",
            f"pip install -e {where}",
        )
        return
    kind = "editable, " if source_folder() else ""
    detail = f"{__version__} ({kind}{where})"
    if found != __version__:
        yield Check(
            "APT",
            NOTE,
            f"{detail}; its metadata is that of {found}: entry points and extras may be old",
            f"{install_command()}",
        )
    else:
        yield Check("APT", OK, detail)


def torch() -> Iterator[Check]:
    """Whether torch is there, in the version that APT needs, and what it is built for."""
    text = next((text for text in requirements() if _name_in(text) == "torch"), "torch")
    built = torch_build()
    if built is None:
        if reasons := unmet([text]):
            yield Check(
                "torch",
                BROKEN,
                f"{_without_hint(reasons[0])}: only listings and checks of profiles work",
                f'pip install "{text}"',
            )
        else:
            yield Check(
                "torch",
                BROKEN,
                "its files are not where it was installed",
                f'pip install --force-reinstall "{text}"',
            )
        return
    kinds = [f"CUDA {built.cuda}" if built.cuda else "", f"ROCm {built.rocm}" if built.rocm else ""]
    detail = f"{built.version}, built for {' '.join(filter(None, kinds)) or 'CPUs'}"
    if reasons := unmet([text]):
        yield Check(
            "torch", BROKEN, f"{detail}: {_without_hint(reasons[0])}", f'pip install "{text}"'
        )
    else:
        yield Check("torch", OK, detail)


def torch_build() -> TorchBuild | None:
    """What torch's file of versions says, without importing it; None where there is none."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "version.py"
        if file.is_file():
            text = read_file(file, MAX_VERSION_FILE).decode(errors="replace")
            found = dict(re.findall(r"^(\w+)(?::[^=\n]*)?\s*=\s*(['\"].*['\"])\s*$", text, re.M))
            told = {name: str(ast.literal_eval(value)) for name, value in found.items()}
            return TorchBuild(
                told.get("__version__", "unknown"), told.get("cuda", ""), told.get("hip", "")
            )
    return None


def needed() -> Iterator[Check]:
    """The packages without which APT does not work, except torch."""
    texts = [text for text in requirements() if _name_in(text) != "torch"]
    if not texts:
        return
    reasons = [*unmet(texts), *damages(texts)]
    if reasons:
        for reason in reasons:
            yield Check("packages", BROKEN, _without_hint(reason), _hint(reason))
    else:
        versions = [f"{_name_in(text)} {metadata.version(_name_in(text))}" for text in texts]
        yield Check("packages", OK, ", ".join(versions))


def extras() -> Iterator[Check]:
    """Each extra: whether what it installs is there."""
    found: dict[str, list[str]] = {}
    for line in _required():
        if _extra_of(line):
            found.setdefault(_extra_of(line), []).append(line.partition(";")[0].strip())
    shown = [extra for extra in sorted(found) if extra not in FOR_DEVELOPMENT]
    needed = {extra: list(dict.fromkeys(_flattened(extra, found))) for extra in shown}
    # Extras share most of what they need, which is looked at once.
    judged = {text: (unmet([text]), damages([text])) for text in set(chain(*needed.values()))}
    for extra, texts in needed.items():
        reasons = [reason for text in texts for reason in judged[text][0]]
        damaged = [reason for text in texts for reason in judged[text][1]]
        name = f"extra {extra}"
        if damaged:
            yield from (Check(name, BROKEN, _without_hint(each), _hint(each)) for each in damaged)
        elif reasons:
            missing = "; ".join(map(_without_hint, reasons))
            yield Check(name, NOTE, missing, install_command(extra))
        else:
            yield Check(name, OK, "installed")


def imports() -> Iterator[Check]:
    """Whether torch and the installed libraries of the extras can be imported, and which devices
    torch finds. Each is imported in a process of its own."""
    yield _torch_imported()
    texts = [line.partition(";")[0].strip() for line in _required() if _extra_of(line)]
    names = dict.fromkeys(_name_in(text) for text in texts if not unmet([text]))
    imported = []
    for name in names:
        for module in modules_of(name)[:1] if normalized_name(name) != _OWN else ():
            failure = _import_failure(f"import {module}")
            if failure:
                yield Check(
                    f"import {module}", BROKEN, failure, f"pip install --force-reinstall {name}"
                )
            else:
                imported.append(module)
    if imported:
        yield Check("imports", OK, ", ".join(imported))


_TORCH = """
import json, torch
cuda = torch.cuda
print(json.dumps({
    "threads": torch.get_num_threads(),
    "mps": torch.backends.mps.is_available(),
    "gpus": [[cuda.get_device_name(i), cuda.get_device_properties(i).total_memory]
             for i in range(cuda.device_count())] if cuda.is_available() else [],
}))
"""


def _torch_imported() -> Check:
    try:
        told = json.loads(_output_of(_TORCH).splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        return Check("import torch", BROKEN, _failure_of(error), "reinstall torch")
    gpus = [f"{name} ({in_gib(size)})" for name, size in told["gpus"]]
    devices = ", ".join([*gpus, *["mps"] * told["mps"]]) or "no GPU"
    return Check("import torch", OK, f"it finds {devices}, and takes {told['threads']} threads")


def _import_failure(code: str) -> str:
    """Why ``code`` fails in a process of its own, in a line; empty if it does not."""
    try:
        _output_of(code)
    except (OSError, subprocess.SubprocessError) as error:
        return _failure_of(error)
    return ""


def _output_of(code: str) -> str:
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=IMPORT_SECONDS,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    return done.stdout


def _failure_of(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line.strip() for line in (error.stderr or "").splitlines() if line.strip()]
        died = f"it ended by signal {-error.returncode}" if error.returncode < 0 else ""
        return died or (lines[-1] if lines else f"exit code {error.returncode}")[:300]
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it takes longer than {IMPORT_SECONDS} s"
    return one_line(error)


# What is installed ------------------------------------------------------------------------------

_OWN = normalized_name(DISTRIBUTION)


def requirements() -> list[str]:
    """What APT itself requires, without its extras."""
    return [line.partition(";")[0].strip() for line in _required() if not _extra_of(line)]


def install_command(extra: str = "") -> str:
    """The command that installs APT with an extra, as it was installed here."""
    wanted, folder = f"[{extra}]" if extra else "", source_folder()
    if folder is not None:
        return f"pip install -e '{folder}{wanted}'"
    return f'pip install "{DISTRIBUTION}{wanted}"'


def _required() -> list[str]:
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []


def _extra_of(line: str) -> str:
    found = _EXTRA.search(line)
    return found[1] if found else ""


def _flattened(
    extra: str, found: dict[str, list[str]], seen: tuple[str, ...] = ()
) -> Iterator[str]:
    """The requirements of an extra, with those of the extras that it names."""
    for text in found.get(extra, ()):
        if normalized_name(_name_in(text)) != _OWN:
            yield text
            continue
        named = re.search(r"\[([^\]]*)\]", text)
        for other in (named[1] if named else "").split(","):
            known = next((e for e in found if normalized_name(e) == normalized_name(other)), "")
            if known and known not in (extra, *seen):
                yield from _flattened(known, found, (*seen, extra))


def _name_in(text: str) -> str:
    found = re.match(r"[\w.-]+", text)
    return found[0] if found else text


def _without_hint(reason: str) -> str:
    return reason.partition(" (pip install")[0]


def _hint(reason: str) -> str:
    _, marker, hint = reason.partition(" (pip install")
    return f"pip install{hint.removesuffix(')')}" if marker else ""


def damages(texts: Iterable[str]) -> list[str]:
    """A reason for each required package whose modules are not where it was installed."""
    reasons = []
    for text in texts:
        name = _name_in(text)
        try:
            dist = metadata.distribution(name)
            missing = [m for m in modules_of(name) if not _is_there(dist, m)]
        except metadata.PackageNotFoundError:
            continue
        except Exception as error:
            reasons.append(
                f"{name} cannot be examined: {one_line(error)} "
                f"(pip install --force-reinstall {name})"
            )
            continue
        if missing:
            reasons.append(
                f"{name} is damaged: its module {missing[0]} is not where it was "
                f"installed (pip install --force-reinstall {name})"
            )
    return reasons


def modules_of(name: str) -> list[str]:
    """The importable modules and packages at the top of a distribution, as its list of files tells
    them; empty where it has none, as one that is installed in place."""
    record = metadata.distribution(name).read_text("RECORD") or ""
    found = (package or module for package, module in _TOP_LEVEL.findall(record))
    named = {n: None for n in found if not n.startswith("_")}
    own = normalized_name(name)
    return sorted(named, key=lambda module: (normalized_name(module) != own, module))


def _is_there(dist: metadata.Distribution, module: str) -> bool:
    base = os.fspath(dist.locate_file(""))  # type: ignore[call-overload]
    if os.path.isdir(os.path.join(base, module)):
        return os.path.isfile(os.path.join(base, module, "__init__.py"))
    return importlib.util.find_spec(module) is not None
