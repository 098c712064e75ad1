"""Log lines: plain and whole on the console, with times in the file, gone when the run is over."""

from __future__ import annotations

import logging
import logging.config
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import Context
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from apt_core.log import ROOT, TolerantStream, get_logger, logging_to, of_one_run

log = logging.getLogger("apt.somewhere")
LONG = "a line that is longer than a terminal is wide, with [brackets] and 123 " + "x" * 100


def test_lines_in_a_pipe_are_plain_and_whole() -> None:
    out = StringIO()
    with logging_to(Console(file=out)):
        log.info(LONG)
        log.warning("plugin %s failed", "mine")
        log.error("stopped")
        log.debug("details")
    assert out.getvalue() == f"{LONG}\nwarning: plugin mine failed\nerror: stopped\n"


def test_the_level_decides_what_is_shown() -> None:
    out = StringIO()
    with logging_to(Console(file=out), level="DEBUG"):
        log.debug("details")
    assert out.getvalue() == "details\n"


def test_the_file_has_times_and_levels_and_is_appended_to(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    for text in ("once", "naïve [bold]again"):
        with logging_to(file=file):
            log.warning(text)
    first, second = file.read_text(encoding="utf-8").splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING apt\.somewhere: "
    assert re.fullmatch(stamp + "once", first)
    assert re.fullmatch(stamp + re.escape("naïve [bold]again"), second)


def test_console_and_file_together(tmp_path: Path) -> None:
    out, file = StringIO(), tmp_path / "log.txt"
    with logging_to(Console(file=out)), logging_to(file=file):
        log.info("both")
    assert out.getvalue() == "both\n"
    assert file.read_text(encoding="utf-8").endswith("both\n")


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_logging_is_as_it_was(tmp_path: Path, fails: bool) -> None:
    before = (ROOT.level, ROOT.propagate, list(ROOT.handlers))
    try:
        with logging_to(Console(file=StringIO()), file=tmp_path / "log.txt"):
            assert not ROOT.propagate
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert (ROOT.level, ROOT.propagate, list(ROOT.handlers)) == before


def test_a_message_that_cannot_be_formatted_stops_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = StringIO()
    with logging_to(Console(file=out)):
        log.info("%d steps", "three")
        log.info("on")
    assert out.getvalue() == "on\n"
    assert "--- Logging error ---" in capsys.readouterr().err


SILENCING: dict[str, Callable[[logging.Logger], object]] = {
    "disabled": lambda logger: setattr(logger, "disabled", True),
    "all disabled": lambda logger: logging.disable(logging.CRITICAL),
    "a level": lambda logger: ROOT.setLevel(logging.CRITICAL),
    "a filter": lambda logger: logger.addFilter(lambda record: False),
    "no handlers": lambda logger: ROOT.handlers.clear(),
    "not passed on": lambda logger: setattr(logger, "propagate", False),
}


@pytest.mark.parametrize("what", SILENCING)
def test_nobody_silences_the_kernels_log_of_a_run(what: str) -> None:
    out, logger = StringIO(), get_logger("apt.silenced")
    before, handlers = logging.root.manager.disable, list(ROOT.handlers)
    try:
        with logging_to(Console(file=out)):
            SILENCING[what](logger)
            logger.info("heard")
    finally:
        logging.disable(before)
        ROOT.handlers[:] = handlers
        logging.root.manager.loggerDict.pop("apt.silenced")
    assert out.getvalue() == "heard\n"


SETTINGS: dict[str, Callable[[StringIO], object]] = {
    "basicConfig": lambda out: logging.basicConfig(stream=out, level=logging.DEBUG),
    "basicConfig by force": lambda out: logging.basicConfig(stream=out, force=True, level=10),
    "dictConfig": lambda out: logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": True,
            "handlers": {"all": {"class": "logging.StreamHandler", "stream": out}},
            "root": {"handlers": ["all"], "level": "DEBUG"},
        }
    ),
}


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize("how", SETTINGS)
def test_settings_of_other_libraries_neither_double_nor_silence_a_line(how: str, when: str) -> None:
    out, root = StringIO(), logging.root
    kept = root.handlers[:], root.level, [logger.disabled for logger in _loggers()]
    root.handlers[:] = []
    try:
        if when == "before":
            SETTINGS[how](out)
        with logging_to(Console(file=out)):
            if when == "while":
                SETTINGS[how](out)
            get_logger("apt.told").info("once")
            logging.getLogger(f"foreign.{how}.{when}").warning("of others")
        assert out.getvalue().splitlines() == ["once", "of others"] or [
            line.rpartition(":")[2] for line in out.getvalue().splitlines()
        ] == ["once", "of others"]
    finally:
        for logger, disabled in zip(_loggers(), kept[2], strict=False):
            logger.disabled = disabled
        root.handlers[:], root.level = kept[0], kept[1]


def _loggers() -> list[logging.Logger]:
    known = [
        logging.root.manager.loggerDict[name] for name in sorted(logging.root.manager.loggerDict)
    ]
    return [logger for logger in known if isinstance(logger, logging.Logger)]


def test_runs_in_turns_have_each_its_own_log(tmp_path: Path) -> None:
    own, out = get_logger("apt.own"), StringIO()
    before = ROOT.level, ROOT.propagate
    runs = {name: (Context(), ExitStack(), []) for name in ("one", "two")}

    def say(text: str) -> None:
        log.info(text)  # as plugins do
        own.info(text)

    def start(name: str) -> None:
        _, stack, noted = runs[name]
        stack.enter_context(of_one_run(noted.append))
        stack.enter_context(logging_to(file=tmp_path / name))

    failing = logging.Handler()
    failing.emit = lambda record: int("x")  # type: ignore[method-assign,assignment]
    with logging_to(Console(file=out)):
        say("before")
        for name, (context, _, _) in runs.items():
            context.run(start, name)
        for name in ("one", "two", "one"):
            runs[name][0].run(say, f"of {name}")
        own.addHandler(failing)
        runs["one"][0].run(own.info, "failed")
        own.removeHandler(failing)
        say("of any")
        for name in ("one", "two"):  # not as they came, which is the other way round
            context, stack, _ = runs[name]
            context.run(stack.close)
            say(f"after {name}")

    def lines(name: str) -> list[str]:
        text = (tmp_path / name).read_text(encoding="utf-8")
        return [line.rpartition(": ")[2] for line in text.splitlines()]

    one = ["of one"] * 4 + ["failed", "of any", "of any"]
    assert lines("one") == one
    assert lines("two") == ["of two"] * 2 + ["of any"] * 2 + ["after one"] * 2
    assert [len(noted) for _, _, noted in runs.values()] == [1, 0]
    assert out.getvalue().split("\n").count("of one") == 4
    assert (ROOT.level, ROOT.propagate) == before


@pytest.mark.parametrize("end", ["close", "detach"])
def test_a_stream_that_somebody_ends_is_opened_again(tmp_path: Path, end: str) -> None:
    path = tmp_path / "out"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    tolerant = TolerantStream(stream)
    tolerant.write("one\n")
    kept = getattr(stream, end)()
    if kept is not None:
        kept.flush()
    tolerant.write("two\n")
    tolerant.flush()
    os.close(descriptor)
    assert path.read_text(encoding="utf-8") == "one\ntwo\n"
