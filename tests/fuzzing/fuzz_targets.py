"""What is fuzzed: for each target how an input is made, and the code of a command that reads it.

An input is judged by what comes out of :meth:`Target.feed`: it returns the outcome in a word, or
raises what a command would die of. It is called in an empty working directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any, ClassVar

import yaml
from fuzz_mutate import WORDS, damaged, mutated, scalar, value

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
from apt_core.errors import AptError, ConfigError
from apt_core.printable import printable
from apt_core.schedules import check_schedules
from apt_core.types import SectionSpec

TINY: dict[str, Any] = {
    "extends": "tiny_debug",
    "model": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32, "max_seq_len": 16},
    "training": {"batch_size": 1, "max_steps": 4, "save_every_steps": 2, "ema_decay": 0.9},
    "evaluation": {"eval_freq": 0, "eval_batches": 1, "sample_tokens": 2},
    "hardware": {"device": "cpu"},
}


class Unexpected(Exception):
    """What came of an input is no declared error, though nothing was raised."""


class Target:
    """One kind of input. ``share`` is its part of a run, in thousandths: what is slow gets less."""

    name: ClassVar[str]
    share: ClassVar[int]

    def __init__(self, kept: Path) -> None:
        """Make in the folder ``kept`` what all inputs begin with."""

    def make(self, rng: random.Random) -> Any:
        """An input: plain data, bytes or text."""
        raise NotImplementedError

    def feed(self, given: Any) -> str:
        """Give it to the code; returns how that ended, in a word."""
        raise NotImplementedError


class Moe(Section):
    enabled: bool = True
    experts: int = 4


SECTIONS = [SectionSpec("model.moe", Moe), SectionSpec("mine.deep", Moe)]


def use(source: Source) -> str:
    """Everything that a command does with a profile before it builds anything."""
    config: Config | None = None
    for sections, inert in (([], {}), (SECTIONS, {"mine": "blocked", "training": "blocked"})):
        checked = validate(source, sections, inert=inert)
        config = checked.config
        assert (config is None) == bool(checked.problems)
        for problem in checked.problems:
            printable(str(problem)).encode()
        check_schedules(
            config, source, plugins={"moe"}, params={"route_temp": "moe"}, blocked={"align": "no"}
        )
        for item in checked.inactive:
            source.where(item.key)
    if config is None:
        return "refused"
    check_files(config, source, ("data.train_path", "data.val_path"))
    again = Source.from_dict(parse_yaml(config.to_yaml(), "x").data)
    assert validate(again, SECTIONS).require() == config
    return "accepted"


def profiles() -> list[dict[str, Any]]:
    return [read_profile(name).data for name in ("base", "tiny_debug", "gpt5_moe_reasoning")]


def profile_value(rng: random.Random) -> Any:
    """What may stand in a profile, ramps and lists of plugins more often than by chance."""
    match rng.randrange(8):
        case 0:
            keys = ("start", "end", "by", "shape", "until", "warmup")
            return {key: scalar(rng) for key in keys if rng.random() < 0.7}
        case 1:
            items = [rng.choice(WORDS), {"name": rng.choice(WORDS), "priority": scalar(rng)}]
            return [rng.choice(items) for _ in range(rng.randrange(4))]
        case _:
            return value(rng)


class ProfileTree(Target):
    """A profile that a program hands over."""

    name, share = "profile-tree", 90

    def __init__(self, kept: Path) -> None:
        self.profiles = profiles()

    def make(self, rng: random.Random) -> Any:
        return mutated(rng, rng.choice(self.profiles), profile_value, most=6)

    def feed(self, given: Any) -> str:
        return use(Source.from_dict(given))


class ProfileText(Target):
    """Files of profiles that extend each other, and values from the command line on top."""

    name, share = "profile-text", 45
    parents = ("base", "tiny_debug", "./b.yaml", "./a.yaml", "c", ".", "../b.yaml", "b", "nowhere")

    def __init__(self, kept: Path) -> None:
        dumped = [yaml.safe_dump(profile, sort_keys=False) for profile in profiles()]
        self.texts = [text[:1200].encode() for text in dumped]
        self.texts += [text[-900:].encode() for text in dumped]
        self.trees = profiles()

    def make(self, rng: random.Random) -> Any:
        files = {}
        for name in ("a.yaml", "b.yaml")[: rng.randint(1, 2)]:
            if rng.random() < 0.5:
                text = damaged(rng, rng.choice(self.texts))
            else:
                tree = mutated(rng, {k: v for k, v in rng.choice(self.trees).items()
                                     if rng.random() < 0.3}, profile_value)  # fmt: skip
                text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode(
                    "utf-8", "surrogatepass"
                )
            if rng.random() < 0.5:
                text = f"extends: {rng.choice(self.parents)}\n".encode() + text
            files[name] = text
        texts = []
        for _ in range(rng.randrange(3)):
            key = rng.choice(["model.tva", "plugins", "a.b", "name", "training.max_steps", *WORDS])
            spelled = damaged(rng, str(value(rng)).encode("utf-8", "replace"))
            texts.append(f"{key}={spelled.decode('utf-8', 'surrogateescape')}")
        return files, texts

    def feed(self, given: Any) -> str:
        files, texts = given
        for name, text in files.items():
            Path(name).write_bytes(text)
        return use(read_profile("./a.yaml", [parse_override(text, "--set") for text in texts]))


class Commands(Target):
    """Command lines: apt-hooks, apt-train with --dry-run, enable and disable."""

    name, share = "commands", 4
    train = ("--profile", "-p", "--plugin", "--set", "--dry-run", "--json", "--strict", "--nproc",
             "--stop-at-step", "--allow-change", "--verify-resume", "--model.d_model",
             "--training.max_steps", "--data.source", "--schedules.x", "--hep", "-x")  # fmt: skip
    hooks = ("list", "show", "plugins", "providers", "info", "enable", "disable", "schema", "x")
    words = ("a.yaml", "a", "tiny_debug", "base", "moe", "no:moe", "p.py", "gone.py", "align",
             "attention", "mha", "on_step_end", "3", "-1", "0", "{}", "[1", "a.b=1", "name=x",
             "training.max_steps=3", "plugins=[p.py]", "report,moe", "x" * 300)  # fmt: skip

    def __init__(self, kept: Path) -> None:
        self.texts = [yaml.safe_dump(profile, sort_keys=False).encode() for profile in profiles()]
        self.texts += [b"extends: tiny_debug\nplugins: [moe]\n", b"extends: base\nplugins:\n- a\n"]

    def make(self, rng: random.Random) -> Any:
        text = rng.choice(self.texts)
        if rng.random() < 0.5:
            text = damaged(rng, text)
        if rng.random() < 0.15:
            line = ["-p", rng.choice(["tiny_debug", "./a.yaml"]), "--dry-run"]
            options = self.train
            command = "apt-train"
        else:
            line = [rng.choice(self.hooks)]
            options = ("-p", "--profile", "--plugin", "--json", "--all", "--markdown", "--x")
            command = "apt-hooks"
        for _ in range(rng.randrange(5)):
            known = options if rng.random() < 0.5 else self.words
            line.append(rng.choice(known) if rng.random() < 0.9 else rng.choice(WORDS))
        if command == "apt-train" and "--dry-run" not in line[:3]:
            line.append("--dry-run")
        return command, line, text

    def feed(self, given: Any) -> str:
        from apt_core.cli import hooks, train

        command, line, text = given
        Path("a.yaml").write_bytes(text)
        Path("p.py").write_text("def on_step_end(step): pass\n")
        return run(train.app if command == "apt-train" else hooks.app, command, line)


def run(app: Any, command: str, line: list[str]) -> str:
    """Run a command in this process. Raises Unexpected for an end that no command has."""
    from apt_core.cli.run_command import run_command

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run_command(app, command, line)
    text = said.getvalue()
    if code not in (0, 1, 2) or "unexpected failure" in text or "Traceback" in text:
        raise Unexpected(f"exit code {code}: {text[-2000:]}")
    if code and "error: " not in text and "warning: " not in text:
        raise Unexpected(f"exit code {code}, and nothing is said: {text[-500:]}")
    return {0: "accepted", 1: "failed", 2: "refused"}[code]


class Data(Target):
    """Texts to train on, and JSON lines."""

    name, share = "data", 800

    def make(self, rng: random.Random) -> Any:
        name = rng.choice(["t.txt", "t.jsonl", "t.ndjson", "t.json", "t", "t.JSONL", "\u0442.txt"])
        encoding = rng.choice(["utf-8", "utf-8", "utf-16", "latin-1", "utf-8-sig", "utf-32"])
        if name.lower().endswith(("l", "json")) or rng.random() < 0.2:
            rows = [mutated(rng, rng.choice([{"text": "a text"}, {"prompt": "p", "response": "r"}]))
                    for _ in range(rng.randrange(6))]  # fmt: skip
            ascii, between = rng.random() < 0.5, rng.choice(["\n", "\n", ","])
            text = between.join(json.dumps(row, ensure_ascii=ascii) for row in rows)
            text = f"[{text}]" if between == "," else text
        else:
            text = "A line.\n\nAnother: äöü 数据.\n" * rng.choice([0, 1, 3, 500])
        return name, damaged(rng, text.encode(encoding, "replace")), rng.random() < 0.3

    def feed(self, given: Any) -> str:
        from apt_core.data.sources.text_default import TextDataset
        from apt_core.data.store.build import build_store
        from apt_core.data.tokenizers.byte import ByteTokenizer
        from apt_core.providers.dataset import DataSection

        name, text, twice = given
        Path(name).write_bytes(text)
        section = DataSection(train_path=name, val_path=name if twice else None)
        store = build_store(TextDataset(section), ByteTokenizer(), section, workers=1)
        store.part("val").read(0, 100)
        return "accepted"


HOOKS = ("on_step_end", "on_metrics", "apt_register_providers", "apt_configure", "apt_loss_terms",
         "apt_declare_sections", "on_training_start", "apt_state_dict", "on_stepend")  # fmt: skip

RETURNS = ("None", "1", "[]", "[None]", "{}", "'x'", "object()", "iter(())",
           "[ProviderSpec('ffn', 'x', None)]", "[SectionSpec('mine', M)]",
           "SectionSpec('model', M)", "[SectionSpec(3, M)]", "M",
           "ProviderSpec(kind='nosuch', name='', factory=1)", "1/0", "sys.exit(3)", "raise_()",
           "{'a': float('nan')}", "[[]] * 1000", "[SectionSpec('x', M, ('p', 1))]")  # fmt: skip

SIGNATURES = ("", "step", "*args", "**kwargs", "self", "step, no_such", "step=1", "step, /",
              "*, step", "step: NoSuch", "config, registry", "trainer")  # fmt: skip

DECORATORS = ("", "@hookimpl", "@hookimpl()", "@hookimpl(priority=3)", "@hookimpl(priority='x')",
              "@hookimpl(priority=10**30)", "@hookimpl(wrapper=True)", "@hookimpl(specname='on_x')",
              "@hookimpl(nothing=1)", "@staticmethod", "@property", "@hookimpl(priority=-1)",
              "@hookimpl(specname=3)", "@no_such")  # fmt: skip

EXTRAS = ("", "raise ValueError('\\x1b[2J')", "import no_such_module", "__file__ = 5",
          "__name__ = 5", "APT_PLUGIN = 3", "plugin_info = {'name': 3}", 
          "__version__ = object()", "__doc__ = 5",
          "apt_plugin = lambda: 1/0", "__all__ = 5", "del hookimpl", "raise SystemExit('x')",
          "raise BaseException", "def __getattr__(name): raise RuntimeError(name)", "__dict__ = 3",
          "import sys; sys.modules.pop(__name__)", "__spec__ = None", "__path__ = 3", "x = = 1",
          "def __dir__(): return 5", "on_step_end = 3", "on_metrics = type", "'''" , "\ttab = 1",
          "# -*- coding: no-such -*-", "__class__ = 3", "PLUGIN = 10 ** 400",
          "class Meta(type):\n    def __getattribute__(c, n): raise KeyError(n)\n"
          "class on_step_end(metaclass=Meta): pass")  # fmt: skip


class Tasks(Target):
    """Files of tasks with their items, and the scores that a run keeps."""

    name, share = "tasks", 45
    trees: tuple[dict[str, Any], ...] = (
        {"kind": "passages", "items": ["a", {"text": "b"}], "template": "text"},
        {"kind": "choices", "items": [{"prompt": "a", "choices": ["b", "c"], "answer": 1}]},
        {"kind": "questions", "items_file": "rows.jsonl", "validators": ["json", "balanced"],
         "keys": {"a": "string"}, "stop": ["x"], "num_samples": 2, "temperature": 0.5},
    )  # fmt: skip
    scores: ClassVar[dict[str, Any]] = {
        "version": 1,
        "scores": [{"task": "a", "metrics": {"b": {"value": 0.5, "low": None}}, "step": 3}],
    }

    def make(self, rng: random.Random) -> Any:
        tree = mutated(rng, rng.choice(self.trees), most=4)
        text = json.dumps(tree).encode()  # YAML too, and of any depth
        rows = [mutated(rng, {"prompt": "a", "answer": "b"}) for _ in range(rng.randrange(4))]
        lines = "\n".join(map(json.dumps, rows)).encode()
        scores = json.dumps(mutated(rng, self.scores)).encode()
        return [text, lines, scores] if rng.random() < 0.5 else [
            damaged(rng, each) if rng.random() < 0.5 else each for each in (text, lines, scores)
        ]  # fmt: skip

    def feed(self, given: Any) -> str:
        from apt_core.evaluation.scoring import Scoring, items_of
        from apt_core.evaluation.tasks.file import read_task
        from apt_core.runs.task_scores import add_scores, read_scores

        text, lines, scores = given
        Path("mine.yaml").write_bytes(text)
        Path("rows.jsonl").write_bytes(lines)
        Path("scores.json").write_bytes(scores)
        with contextlib.suppress(AptError):
            before = len(read_scores(Path()))
            add_scores(Path(), [{"task": "b", "metrics": {}}])
            assert len(read_scores(Path())) == before + 1
        task = read_task(Path("mine.yaml"))
        for item in items_of("mine", task, Scoring(limit=3)).chosen:
            if hasattr(task, "score"):
                assert task.score(item, "{}").keys() == task.metrics.keys()
        return "accepted"


class Plugins(Target):
    """Files of plugins: what they are when imported, their signatures, and what they declare."""

    name, share = "plugins", 8

    def __init__(self, kept: Path) -> None:
        self.profile = {"name": "x"}
        self.head = (
            "import sys\nfrom apt_core import hookimpl\n"
            "from apt_core.types import ProviderSpec, SectionSpec\nfrom pydantic import BaseModel\n"
            "class M(BaseModel):\n    a: int = 1\n"
        )

    def make(self, rng: random.Random) -> Any:
        lines = [self.head]
        in_class = rng.random() < 0.3
        if in_class:
            lines.append(rng.choice(["class Plugin:", "class Plugin(dict):", "class Plugin(M):"]))
        for _ in range(rng.randint(1, 4)):
            indent = "    " if in_class else ""
            asynchronous = rng.choice(["", "", "", "async "])
            body = rng.choice(["return", "return", "yield", "raise"])
            lines += [
                f"{indent}{rng.choice(DECORATORS)}",
                f"{indent}{asynchronous}def {rng.choice(HOOKS)}({rng.choice(SIGNATURES)}):",
                f"{indent}    {body} {rng.choice(RETURNS)}",
            ]
        if in_class and rng.random() < 0.7:
            lines.append(rng.choice(["plugin = Plugin()", "apt_plugin = Plugin", "p = Plugin()"]))
        lines += [rng.choice(EXTRAS) for _ in range(rng.randrange(3))]
        text = "\n".join(lines).encode()
        if rng.random() < 0.2:
            text = damaged(rng, text)
        name = rng.choice(["p.py", "p.py", "os.py", "torch.py", "a b.py", "-.py", "1.py", "ü.py",
                           "moe.py", "x.y.py", ".py", "p.txt"])  # fmt: skip
        return name, text, rng.random() < 0.3

    def feed(self, given: Any) -> str:
        from apt_core.inspect.listing import implementation_rows, plugin_rows, provider_rows, survey
        from apt_core.kernel import boot

        name, text, strict = given
        Path(name).write_bytes(text)
        listing = survey("", [f"./{name}"])
        for rows in (implementation_rows, plugin_rows, provider_rows):
            json.dumps(rows(listing), default=str)
        boot(self.profile, plugins=[f"./{name}"], strict=strict, files=False)
        return "accepted"


class Run(Target):
    """What all targets share that read the folder of a run: one run of four steps."""

    def __init__(self, kept: Path) -> None:
        from apt_core.kernel import boot
        from apt_core.training import Trainer

        self.kept = kept
        self.text = kept / "text.txt"
        self.run = kept / "run"
        self.profile = {**TINY, "data": {"train_path": str(self.text)}}
        self.profile = {**self.profile, **{"name": "fuzzed"}}
        self.profile.pop("extends")
        if not self.run.exists():
            kept.mkdir(parents=True, exist_ok=True)
            self.text.write_text("Some text, again and again.\n" * 60, encoding="utf-8")
            Trainer(boot(self.profile), output=self.run).fit()
        self.files = sorted(
            str(path.relative_to(self.run)) for path in self.run.rglob("*") if path.is_file()
        )

    def damage(self, rng: random.Random, name: str) -> bytes:
        """The file of the run, other than it was."""
        kept = (self.run / name).read_bytes()
        chance = rng.random()
        if name.endswith(".json") and chance < 0.6:
            return json.dumps(mutated(rng, json.loads(kept))).encode()
        if name.endswith(".jsonl") and chance < 0.6:
            rows = [json.loads(line) for line in kept.splitlines()]
            return b"".join(
                json.dumps(mutated(rng, row) if rng.random() < 0.4 else row).encode() + b"\n"
                for row in rows * rng.choice([1, 1, 3])
            )
        if name.endswith(".yaml") and chance < 0.6:
            tree = mutated(rng, yaml.safe_load(kept), profile_value)
            return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
        return damaged(rng, kept)


class Reports(Run):
    """The folder of a run as apt-report reads it."""

    name, share = "reports", 4

    def make(self, rng: random.Random) -> Any:
        names = [name for name in self.files if not name.startswith("checkpoints")]
        chosen = rng.sample(names, rng.randint(1, 2))
        return {name: None if rng.random() < 0.1 else self.damage(rng, name) for name in chosen}

    def feed(self, given: Any) -> str:
        from apt_plugins.report.command import app

        shutil.copytree(self.run, "run", ignore=shutil.ignore_patterns("*.safetensors"))
        put(given, Path("run"))
        return run(app, "apt-report", ["run"])


class Checkpoints(Run):
    """A run that is taken up again: checkpoints and records that were changed, also such as have
    valid hashes."""

    name, share = "checkpoints", 4

    def make(self, rng: random.Random) -> Any:
        newest = [name for name in self.files if "step-00000004" in name]
        newest = newest or [name for name in self.files if "checkpoints" in name]
        records = [name for name in self.files if not name.startswith("checkpoints")]
        chosen = rng.sample(newest, rng.randint(1, 2)) if rng.random() < 0.8 else []
        chosen = chosen or rng.sample(records, 1)
        # Mostly text: of a tensor's bytes, hashed anew, any is a weight.
        if rng.random() < 0.7:
            chosen = [name for name in chosen if not name.endswith(".safetensors")] or chosen
        files = {name: None if rng.random() < 0.05 else self.damage(rng, name) for name in chosen}
        return files, rng.random() < 0.7

    def feed(self, given: Any) -> str:
        from apt_core.kernel import boot
        from apt_core.training import Trainer

        class Reopens(Trainer):
            """Takes a run up again, and trains no step of it."""

            def _run(self) -> Any:
                return None

        files, seals = given
        shutil.copytree(self.run, "run")
        put(files, Path("run"))
        if seals:
            for folder in sorted(Path("run/checkpoints").glob("step-*")):
                seal(folder)
        Reopens(boot(self.profile, files=False), output="run", resume=True).fit()
        return "accepted"


def put(files: dict[str, bytes | None], folder: Path) -> None:
    for name, text in files.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(text)


def seal(folder: Path) -> None:
    """Make the hashes of a checkpoint those of what it holds, as far as it can be read."""
    with contextlib.suppress(ValueError, OSError, RecursionError, AttributeError, TypeError):
        file = folder / "manifest.json"
        manifest = json.loads(file.read_text())
        manifest["sha256"] = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in manifest["sha256"]
            if (folder / name).is_file()
        }
        manifest.pop("manifest_sha256", None)
        text = json.dumps(manifest, sort_keys=True)
        manifest["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        file.write_text(json.dumps(manifest))


TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (ProfileTree, ProfileText, Commands, Data, Tasks, Plugins, Reports, Checkpoints)
}

DECLARED = (AptError, ConfigError)


def empty(folder: Path) -> None:
    """Take everything out of a folder."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)
