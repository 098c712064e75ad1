"""What a faulty plugin does: kinds of fault by name, and when the plugin commits one.

A plugin whose implementation of a hook is ``return fault_kinds.act(hook, arguments)`` commits the
fault that was planned with :func:`plan`, at the calls that were planned, and nothing elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import locale
import logging
import logging.config
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

import fault_values
import numpy
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from apt_core.errors import ConfigError, PluginError, StopTraining

Arguments = Mapping[str, Any]
Fault = Callable[[str, Arguments], Any]
"""Called with the hook's name and the arguments that it was given, which may be few of them."""


@dataclass
class Plan:
    """``first`` is the call of the hook, from 1, at which ``kind`` is committed; ``always`` says
    that it is at every later one, too."""

    kind: str = ""
    first: int = 0
    always: bool = False


@dataclass
class Seen:
    """What came of it: by hook, of every call the steps that were taken before it, and the one at
    hand (None: the run has no folder yet), how often the fault was committed, and of an innocent
    plugin how often each hook was called and what it was shown. ``trainer`` is that of the run once
    it has its folder."""

    calls: dict[str, list[tuple[int | None, int | None]]] = field(default_factory=dict)
    committed: int = 0
    innocent: dict[str, int] = field(default_factory=dict)
    shown: dict[str, list[str]] = field(default_factory=dict)
    trainer: Any = None


planned = Plan()
seen = Seen()


def plan(given: Plan) -> None:
    """Commit this from now on, and forget what was seen."""
    global planned, seen
    planned, seen = given, Seen()


def due(hook: str, arguments: Arguments) -> bool:
    """Note a call of the hook: is the planned fault due in it?"""
    trainer = seen.trainer
    calls = seen.calls.setdefault(hook, [])
    calls.append((None, None) if trainer is None else (trainer.step, trainer.manager.step))
    number = len(calls)
    committed = bool(planned.kind) and (
        number >= planned.first if planned.always else number == planned.first
    )
    seen.committed += committed
    return committed


def act(hook: str, arguments: Arguments) -> Any:
    """Commit the planned fault where it is due."""
    if not due(hook, arguments):
        return None
    return (HANGING | kinds_of(hook))[planned.kind](hook, arguments)


def observe(hook: str, arguments: Arguments) -> None:
    """What an innocent plugin does: it counts, and notes what it is shown."""
    seen.innocent[hook] = seen.innocent.get(hook, 0) + 1
    for name in ("metrics", "batch", "state"):
        value = arguments.get(name)
        if isinstance(value, Mapping):
            # Times of plugins come and go with them.
            shown = sorted(str(key) for key in value if not str(key).startswith("time/"))
        elif isinstance(value, list):
            shown = [type(item).__name__ for item in value]
        else:
            continue
        seen.shown.setdefault(f"{hook} {name}", []).append(" ".join(shown))


# Raising ---------------------------------------------------------------------------------------


class Unprintable(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise LookupError("no text")

    __repr__ = __str__


class Exits(Exception):
    """Asking for its text ends the process."""

    def __str__(self) -> str:
        sys.exit("no text")


class Unpicklable(Exception):
    def __init__(self, one: object, two: object) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


class Hollow(Exception):
    """Answers to no attribute."""

    def __getattribute__(self, name: str) -> Any:
        raise AttributeError(name)


class Foreign(BaseException):
    """No Exception, as the timeouts of some libraries are."""


def _raise(error: Callable[[], BaseException]) -> Fault:
    def fault(hook: str, arguments: Arguments) -> Any:
        raise error()

    return fault


def _noted() -> BaseException:
    error = ValueError("has notes")
    error.add_note("a note\nof two lines")
    error.__notes__.append(3)  # type: ignore[arg-type]
    return error


def _cyclic() -> BaseException:
    one, other = ValueError("one"), KeyError("other")
    one.__cause__, other.__context__ = other, one
    return one


def _grouped() -> BaseException:
    inner: Any = ValueError("inner")
    for _ in range(50):
        inner = ExceptionGroup("a group", [inner, KeyError("another")])
    return inner


def _deep(hook: str, arguments: Arguments) -> Any:
    return _deep(hook, arguments)


def _exhausted(hook: str, arguments: Arguments) -> Any:
    next(iter(()))


def _threw(hook: str, arguments: Arguments) -> Any:
    def rows() -> Iterator[None]:
        yield

    generator = rows()
    next(generator)
    generator.throw(GeneratorExit)


def _own_plugin_error() -> BaseException:
    return PluginError("made by the plugin", plugin="other", hook="on_step_end", where="x.py:1")


RAISING: dict[str, Fault] = {
    f"raise-{name}": fault
    for name, fault in {
        "ValueError": _raise(lambda: ValueError("boom 测试")),
        "no-message": _raise(lambda: ValueError()),
        "unprintable": _raise(Unprintable),
        "exiting-text": _raise(Exits),
        "unpicklable": _raise(lambda: Unpicklable(1, 2)),
        "hollow": _raise(Hollow),
        "notes": _raise(_noted),
        "cyclic": _raise(_cyclic),
        "group": _raise(_grouped),
        "base-group": _raise(lambda: BaseExceptionGroup("all", [SystemExit(3), ValueError("x")])),
        "huge": _raise(lambda: ValueError("x" * 10_000_000)),
        "lines": _raise(lambda: ValueError("\n" * 100_000)),
        "surrogate": _raise(lambda: ValueError("caf\udce9")),
        "escapes": _raise(
            lambda: ValueError("\x1b[2J\x1b]0;owned\x07[bold]x[/bold][/red] %s %d {}")
        ),
        "RecursionError": _deep,
        "MemoryError": _raise(lambda: MemoryError("for a plot")),
        "out-of-memory": _raise(lambda: torch.OutOfMemoryError("CUDA out of memory")),
        "AssertionError": _raise(AssertionError),
        "KeyError": _raise(lambda: KeyError("layer")),
        "StopIteration": _exhausted,
        "StopAsyncIteration": _raise(StopAsyncIteration),
        "SystemExit": _raise(lambda: SystemExit(0)),
        "SystemExit-text": _raise(lambda: SystemExit("done")),
        "GeneratorExit": _threw,
        "CancelledError": _raise(asyncio.CancelledError),
        "BaseException": _raise(lambda: Foreign("no Exception")),
        "PluginError": _raise(_own_plugin_error),
        "ENOSPC": _raise(lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        "EIO-file": _raise(lambda: OSError(errno.EIO, os.strerror(errno.EIO), "/dev/null")),
        "BrokenPipeError": _raise(lambda: BrokenPipeError(errno.EPIPE, "Broken pipe")),
        "UnicodeError": _raise(lambda: "\udce9".encode() and ValueError()),  # type: ignore[return-value]
        "Warning": _raise(lambda: UserWarning("raised")),
        "TimeoutError": _raise(TimeoutError),
        "ConfigError": _raise(lambda: ConfigError("model.d_model: not to my liking")),
        "ConfigError-hollow": _raise(lambda: ConfigError.__new__(ConfigError)),
        "KeyboardInterrupt": _raise(KeyboardInterrupt),
        "StopTraining": _raise(lambda: StopTraining("enough")),
        "StopTraining-odd": _raise(lambda: StopTraining(_Oracle())),
    }.items()
}


# Handing over ----------------------------------------------------------------------------------


class _Oracle:
    """Its truth, its length, and what it compares to, raise."""

    def _refuse(self, *_: Any) -> Any:
        raise LookupError("not to be looked at")

    __bool__ = __len__ = __eq__ = __hash__ = __repr__ = __str__ = __iter__ = _refuse


def _giving(value: Any) -> Fault:
    return lambda hook, arguments: _fitted(value, arguments)


def _values_of(hook: str) -> Mapping[str, Fault]:
    """What the hook does not accept; or anything where it looks at nothing."""
    given = {
        f"return-{label.replace(' ', '-')}": _giving(value)
        for label, (value, _) in fault_values.WRONG.get(hook, {}).items()
    }
    return given or ANY


def _fitted(value: Any, arguments: Arguments) -> Any:
    """``value``, with a parameter of the run's model for that of the zoo's."""
    if not (isinstance(value, list) and "model" in arguments):
        return value
    own = next(arguments["model"].parameters())
    return [
        {**group, "params": [own]}
        if type(group) is dict and group.get("params") == [fault_values.MODEL.weight]
        else group
        for group in value
    ]


async def _coroutine() -> None: ...


def _half() -> Iterator[None]:
    yield
    raise LookupError("half")


ANY: dict[str, Fault] = {
    "return-oracle": _giving(_Oracle()),
    "return-tensor": _giving(torch.ones(3, requires_grad=True)),
    "return-stop": _giving(StopTraining("not raised")),
    "return-coroutine": lambda hook, arguments: _coroutine(),
    "return-half-a-generator": lambda hook, arguments: _half(),
}
"""Of what is returned where nothing is looked at."""


def _processor(function: Callable[..., Any]) -> Fault:
    return lambda hook, arguments: [function]


class _Chooser:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.choose = function


def _decoder(function: Callable[..., Any]) -> Fault:
    return lambda hook, arguments: _Chooser(function)


def _boom(*_: Any) -> Any:
    raise ValueError("boom, later")


def _leave(*_: Any) -> Any:
    sys.exit(3)


def _overwrite(input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    input_ids.zero_()
    logits.fill_(float("nan"))
    return logits


LATER: dict[str, dict[str, Fault]] = {
    "apt_logits_processors": {
        "later-raise": _processor(_boom),
        "later-exit": _processor(_leave),
        "later-nothing": _processor(lambda ids, logits: None),
        "later-nan": _processor(lambda ids, logits: logits * float("nan")),
        "later-inf": _processor(lambda ids, logits: logits.masked_fill(logits > 0, float("inf"))),
        "later-none-left": _processor(lambda ids, logits: logits - float("inf")),
        "later-short": _processor(lambda ids, logits: logits[:3]),
        "later-integers": _processor(lambda ids, logits: logits.long()),
        "later-meta": _processor(lambda ids, logits: logits.to("meta")),
        "later-overwrite": _processor(_overwrite),
    },
    "apt_decoder": {
        "later-raise": _decoder(_boom),
        "later-exit": _decoder(_leave),
        "later-far": _decoder(lambda ids, logits: 10**30),
        "later-negative": _decoder(lambda ids, logits: -1),
        "later-nan": _decoder(lambda ids, logits: float("nan")),
        "later-text": _decoder(lambda ids, logits: "the"),
        "later-vector": _decoder(lambda ids, logits: torch.ones(2)),
        "later-overwrite": _decoder(lambda ids, logits: _overwrite(ids, logits) and None),
    },
}
"""What is accepted, and fails when it is called: a failure of the same hook."""


# Mutating what was handed over -----------------------------------------------------------------


def _mutate(hook: str, arguments: Arguments) -> Any:
    """Change all that a hook was handed and that is not the run's own to be changed."""
    for name, value in arguments.items():
        mutation = MUTATIONS.get(name)
        if mutation is not None:
            mutation(value)


def _spoil(value: Any) -> None:
    """Empty a container, and put in what nobody expects."""
    value.clear()
    if isinstance(value, list):
        value += [None, object()]
    else:
        value["step"], value["loss"], value["\udce9"] = "never", object(), float("nan")


def _frozen(*names: str) -> Callable[[Any], None]:
    """Try to set attributes: that raises, which is not what is tried here."""

    def mutation(value: Any) -> None:
        for name in names:
            with contextlib.suppress(FrozenInstanceError, AttributeError, TypeError, ValueError):
                setattr(value, name, None)

    return mutation


def _profile(config: Any) -> None:
    _frozen("training", "model")(config)
    _frozen("learning_rate", "max_steps", "seed")(config.training)
    _frozen("d_model")(config.model)
    config.to_dict()["training"].clear()


def _trainer(trainer: Any) -> None:
    if isinstance(trainer.metrics, dict):
        _spoil(trainer.metrics)
    _profile(trainer.config)
    _frozen("rank", "tokens")(trainer.world)


def _session(session: Any) -> None:
    _profile(session.config)
    _frozen("model", "position", "dtype")(session)
    _frozen("step", "epoch")(session.position)


def _unchangeable(value: Any) -> None:
    """Nothing of it can be changed, or it is the run's own."""


MUTATIONS: dict[str, Callable[[Any], None]] = {
    "batch": lambda batch: _spoil(batch) if isinstance(batch, list) else None,
    "config": _profile,
    "metrics": _spoil,
    "state": _spoil,
    "request": _frozen("prompt", "max_new_tokens", "seed"),
    "result": _frozen("text", "tokens"),
    "event": _frozen("used", "reason"),
    "failure": _frozen("plugin", "quarantined"),
    "spec": _frozen("name", "factory"),
    "trainer": _trainer,
    "session": _session,
    "registry": _unchangeable,
    "trains": _unchangeable,
    "model": _unchangeable,
    "output": _unchangeable,
    "loss": _unchangeable,
    "error": _unchangeable,
    "plugin": _unchangeable,
    "path": _unchangeable,
    "epoch": _unchangeable,
    "from_step": _unchangeable,
    "run": lambda run: (_frozen("folder", "settings")(run), run.settings["training"].clear()),
    "step": _unchangeable,
}
"""By parameter of a hook, how it is changed where the contract says that this has no effect."""


# Changing global state -------------------------------------------------------------------------

kept: list[Any] = []
"""Contexts that were entered and never left."""


def _enter(context: Callable[[], Any]) -> Fault:
    def fault(hook: str, arguments: Arguments) -> Any:
        kept.append(context())
        kept[-1].__enter__()

    return fault


def _do(*actions: Callable[[], Any]) -> Fault:
    def fault(hook: str, arguments: Arguments) -> Any:
        for action in actions:
            action()

    return fault


def _eval_mode(hook: str, arguments: Arguments) -> Any:
    trainer = seen.trainer
    if trainer is not None:
        trainer.model.eval()


def _train_mode(hook: str, arguments: Arguments) -> Any:
    trainer = seen.trainer
    if trainer is not None:
        trainer.model.train()


class _Doubling(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.nn.functional.cross_entropy else result


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


class _Lossy(torch.autograd.graph.saved_tensors_hooks):
    """Keeps what the backward pass needs in half the precision."""

    def __init__(self) -> None:
        super().__init__(lambda t: (t.dtype, t.bfloat16() if t.is_floating_point() else t),
                         lambda packed: packed[1].to(packed[0]))  # fmt: skip


def _close_output() -> None:
    sys.stdout.close()


def _detach_output() -> None:
    sys.stdout.detach()


def _no_output() -> None:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]


def _reconfigure() -> None:
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": True})


class _Post(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise ConnectionError("the chat does not answer")


def _strict_warnings() -> None:
    warnings.simplefilter("error")


def _deaf() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _shallow() -> None:
    sys.setrecursionlimit(max(120, len(_stack()) + 60))


def _stack() -> list[Any]:
    frame, frames = sys._getframe(), []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return frames


def _commas() -> None:
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "tr_TR.UTF-8", "C.UTF-8", "C"):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, name)
            return


def _empty_environment() -> None:
    os.environ.clear()


def _rank_in_environment() -> None:
    os.environ.update(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_PORT="1")


def _elsewhere() -> None:
    os.chdir(tempfile.mkdtemp(dir=os.environ.get("FAULTS_TEMPORARY")))


def _gone() -> None:
    folder = tempfile.mkdtemp(dir=os.environ.get("FAULTS_TEMPORARY"))
    os.chdir(folder)
    os.rmdir(folder)


def _float64() -> None:
    torch.set_default_dtype(torch.float64)


STATE: dict[str, Fault] = {
    f"state-{name}": fault
    for name, fault in {
        "default-dtype": _do(_float64),
        "default-device": _do(lambda: torch.set_default_device("meta")),
        "device-context": _enter(lambda: torch.device("meta")),
        "grad-off": _do(lambda: torch.set_grad_enabled(False)),
        "no-grad": _enter(torch.no_grad),
        "inference-mode": _enter(torch.inference_mode),
        "autocast": _enter(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        "autocast-dtype": _do(lambda: torch.set_autocast_dtype("cpu", torch.float16)),
        "saved-tensors": _enter(_Lossy),
        "save-on-cpu": _enter(torch.autograd.graph.save_on_cpu),
        "anomaly": _do(lambda: torch.autograd.set_detect_anomaly(True)),
        "multithreading": _do(lambda: torch.autograd.set_multithreading_enabled(False)),
        "function-mode": _enter(_Doubling),
        "dispatch-mode": _enter(_Dispatch),
        "eval-mode": _eval_mode,
        "train-mode": _train_mode,
        "threads": _do(lambda: torch.set_num_threads(2)),
        "matmul": _do(lambda: torch.set_float32_matmul_precision("medium")),
        "deterministic": _do(lambda: torch.use_deterministic_algorithms(True)),
        "fill-uninitialized": _do(lambda: torch.set_deterministic_debug_mode("error")),
        "flush-denormal": _do(lambda: torch.set_flush_denormal(True)),
        "mkldnn": _do(lambda: torch.backends.mkldnn.set_flags(False)),
        "sdp": _do(lambda: torch.backends.cuda.enable_math_sdp(False)),
        "sdp-flash": _do(lambda: torch.backends.cuda.enable_flash_sdp(False)),
        "print-options": _do(lambda: torch.set_printoptions(precision=1)),
        "seeds": _do(lambda: torch.manual_seed(0), lambda: random.seed(0),
                     lambda: numpy.random.seed(0)),
        "draws": _do(lambda: torch.rand(3), random.random, lambda: numpy.random.rand(3)),
        "numpy-errors": _do(lambda: numpy.seterr(all="raise")),
        "chdir": _do(_elsewhere),
        "chdir-gone": _do(_gone),
        "umask": _do(lambda: os.umask(0o777)),
        "environment": _do(_empty_environment),
        "environment-rank": _do(_rank_in_environment),
        "stdout-closed": _do(_close_output),
        "stdout-detached": _do(_detach_output),
        "stdout-none": _do(_no_output),
        "logging-config": _do(_reconfigure),
        "logging-disabled": _do(lambda: logging.disable(logging.CRITICAL)),
        "logging-level": _do(lambda: logging.getLogger("apt").setLevel(logging.CRITICAL)),
        "logging-raises": _do(lambda: logging.getLogger("apt").addHandler(_Post()),
                              lambda: logging.getLogger().addHandler(_Post())),
        "warnings": _do(_strict_warnings),
        "signals": _do(_deaf),
        "recursion": _do(_shallow),
        "gc-off": _do(gc.disable),
        "gc-frozen": _do(gc.freeze, lambda: gc.set_threshold(1)),
        "locale": _do(_commas),
        "path": _do(sys.path.clear),
        "digits": _do(lambda: sys.set_int_max_str_digits(640)),
        "excepthook": _do(lambda: setattr(sys, "excepthook", _boom)),
        "switch-interval": _do(lambda: sys.setswitchinterval(1e-5)),
        "alarm": _do(lambda: signal.signal(signal.SIGALRM, signal.SIG_IGN),
                     lambda: signal.setitimer(signal.ITIMER_REAL, 0.001)),
        "thread": _do(threading.Thread(target=time.sleep, args=(0.5,), daemon=True).start),
        "failing-thread": _do(threading.Thread(target=_boom, daemon=True).start),
        "time-zone": _do(lambda: os.environ.update(TZ="Asia/Kathmandu"), time.tzset),
    }.items()
}  # fmt: skip


MUTATING: dict[str, Fault] = {"mutate": _mutate}


HANGING: dict[str, Fault] = {"hang": lambda hook, arguments: time.sleep(1000)}
"""Tried in the background alone: elsewhere a run waits for it."""


def groups_of(hook: str) -> dict[str, dict[str, Fault]]:
    """By group of kinds, what a plugin may do wrong in ``hook``."""
    return {
        "raise": RAISING,
        "return": dict(_values_of(hook)),
        "later": LATER.get(hook, {}),
        "mutate": MUTATING,
        "state": STATE,
    }


def kinds_of(hook: str) -> dict[str, Fault]:
    """All that a plugin may do wrong in ``hook``, by name."""
    return {name: fault for group in groups_of(hook).values() for name, fault in group.items()}
