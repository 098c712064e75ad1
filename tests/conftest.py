"""What holds for every test: property tests draw the same examples in every run, and signals are
heard as in a terminal."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import inspect
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import settings

# Broken on purpose: importing them, as the collector of doctests does, would end pytest.
collect_ignore = ["distributions/data"]

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

# A job in the background of a shell ignores SIGINT, one under nohup SIGHUP, and so would its runs.
for number, default in [
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
]:
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)


class _NotImported:
    """Leaves a module out of the search for doctests whose import takes seconds, and which is then
    in each fork. A hook of this file is not asked about folders beside it."""

    @staticmethod
    def pytest_ignore_collect(collection_path: Path) -> bool | None:
        return collection_path.name == "lm_eval_model.py" or None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_NotImported())


# Collecting makes many objects and drops few: looking for those took a third of its time.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what computes on a GPU where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Give back the memory that a module of tests has left: each fork copies its page tables."""
    if nextitem is None or nextitem.path != item.path:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB. The test is skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class _Fork(subprocess.Popen[Any]):
    """Runs Python as a fork of this process, which has imported torch already: an interpreter of
    its own takes seconds for that. Every other program is started as usual."""

    def _execute_child(self, *arguments: Any) -> None:
        execute = super()._execute_child  # type: ignore[misc]
        call = inspect.signature(execute).bind(*arguments).arguments
        program, *words = map(os.fspath, call["args"])
        while words and words[0] in ("-B", "-P", "-u"):
            del words[0]
        options = words and words[0].startswith("-") and words[0] not in ("-c", "-m")
        # pip starts interpreters for builds, which need a fresh one.
        builds = words[:2] == ["-m", "pip"]
        # A fork of another thread crashes where torch has compiled in this process.
        thread = threading.current_thread() is not threading.main_thread()
        if program != sys.executable or not words or options or builds or call["shell"] or thread:
            return execute(*arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads are not needed there
            self.pid = os.fork()
        if not self.pid:
            _become_python(words, call)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(call[name] for name in pipes))  # type: ignore[attr-defined]


def _become_python(words: Sequence[str], call: dict[str, Any]) -> NoReturn:
    """Become what ``python WORDS`` is, in the fork that has just begun, and end it."""
    code = 1
    gc.freeze()  # a collection would write to, and so copy, all that the tests have left
    try:
        if call["cwd"] is not None:
            os.chdir(call["cwd"])
        if call["start_new_session"]:
            os.setsid()
        for number, source in enumerate(("p2cread", "c2pwrite", "errwrite")):
            if call[source] >= 0:
                os.dup2(call[source], number)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]:
            with suppress(OSError):  # the one of the listing
                os.fstat(number)
                os.dup2(nothing, number)  # objects still have it, so a new file must not get it
        logging.getLogger().handlers.clear()
        for each in signal.valid_signals():
            if callable(signal.getsignal(each)):
                signal.signal(each, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if call["env"] is not None:
            os.environ.clear()
            os.environ.update({os.fsdecode(k): os.fsdecode(v) for k, v in call["env"].items()})
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
        escaped = {"errors": "backslashreplace", "closefd": False}
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, **escaped)
        faulthandler.enable(sys.stderr)  # pytest's writes to a file that is closed here
        importlib.reload(warnings)  # pytest collects them
        sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        flag, *rest = words
        if flag == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif flag == "-m":
            sys.argv = rest
            sys.modules.pop(f"{rest[0]}.__main__", None)  # doctests have imported it
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(flag))
            runpy.run_path(flag, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@pytest.fixture(scope="session")
def late_imports() -> None:
    """What a run imports late, once here rather than in each fork of this process."""
    for name in ("torch._dynamo", "torch.distributed.fsdp", "apt_core.training"):
        importlib.import_module(name)


TORCHRUN_STARTS = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"


@contextmanager
def _forks() -> Iterator[None]:
    import torch

    if torch.cuda.is_available():  # CUDA survives no fork
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork loses the others
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", _Fork)
            patch.setattr(f"{TORCHRUN_STARTS}.Popen", _Fork)
            yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def forks(late_imports: None) -> Callable[[], AbstractContextManager[None]]:
    """``with forks():`` processes of this interpreter are forks of this one, and so are those that
    they start. It is for tests of what a process does, not of how an interpreter starts."""
    return _forks


@pytest.fixture
def forked(forks: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """The test is run ``with forks()``."""
    with forks():
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave nothing in the cache of whoever runs them, and find nothing of earlier runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
