"""The global state of torch that changes what it computes, and the watch that restores it.

A plugin may set such state for a model of its own, or leave it set where it fails, which would
change the weights of the run. So the watch compares the state after calls of plugins, and puts back
what changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from operator import attrgetter, call
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode

from apt_core.python_state import PYTHON_STATES, State, put_back

_C: Any = torch._C
_AUTOGRAD: Any = torch._C._autograd
_UNIT: Any = torch._GLOBAL_DEVICE_CONTEXT

AUTOCAST = ("cpu", "cuda")
"""The types of device on which a run computes its forward."""

OTHER_AUTOCAST = ("xpu", "mps", "hpu", "xla", "ipu", "maia", "mtia", "privateuseone")

PRECISIONS = (
    ("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"),
    ("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"),
)  # fmt: skip
"""The (backend, operation) pairs that have a precision of fp32 arithmetic. Whole backends come
first: their setters overwrite the precisions of their operations."""

SDPA = ("flash", "math", "mem_efficient", "cudnn", "overrideable")
SWITCHES = (
    "cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic", "mkldnn_enabled",
    "mkldnn_deterministic", "nnpack_enabled", "math_sdp_allow_fp16_bf16_reduction",
    "cublas_allow_fp16_accumulation", "cpu_allow_fp16_reduced_precision_reduction",
    "deterministic_fill_uninitialized_memory",
)  # fmt: skip
"""Names with which ``torch._C`` has a getter and a setter, ``_get_NAME`` and ``_set_NAME``."""


def _nesting() -> int:
    """How many autocast contexts are entered; torch caches casts of weights within them."""
    depth: int = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth - 1


def _set_nesting(depth: int) -> None:
    while _nesting() > depth:
        torch.autocast_decrement_nesting()
    while _nesting() < depth:
        torch.autocast_increment_nesting()
    torch.clear_autocast_cache()


def _autocast() -> tuple[Any, ...]:
    each = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in AUTOCAST]
    return (*each, torch.is_autocast_cache_enabled(), _C._is_any_autocast_enabled())


def _set_autocast(values: tuple[Any, ...]) -> None:
    *each, caches, anywhere = values
    for device in () if anywhere else OTHER_AUTOCAST:
        with suppress(RuntimeError):  # this build of torch does not know the device
            torch.set_autocast_enabled(device, False)
    for device, (enabled, dtype) in zip(AUTOCAST, each, strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(caches)
    torch.clear_autocast_cache()


def fp32_precision() -> tuple[Any, ...]:
    """The precision of fp32 arithmetic, for :func:`set_fp32_precision`."""
    named = None
    with suppress(RuntimeError):  # torch refuses its old getter where the new settings differ
        named = torch.get_float32_matmul_precision()
    return (named, *(_C._get_fp32_precision_getter(*place) for place in PRECISIONS))


def set_fp32_precision(values: tuple[Any, ...]) -> None:
    """Set the precision that :func:`fp32_precision` returned."""
    named, *each = values
    if named is not None:
        torch.set_float32_matmul_precision(named)
    for place, value in zip(PRECISIONS, each, strict=True):
        with suppress(RuntimeError):  # some pairs cannot differ from their backend
            _C._set_fp32_precision_setter(*place, value)


def _function_modes() -> list[Any]:
    return [_C._get_function_stack_at(i) for i in range(_C._len_torch_function_stack())]


def _set_function_modes(modes: list[Any]) -> None:
    for _ in range(_C._len_torch_function_stack()):
        _C._pop_torch_function_stack()
    for mode in modes:
        _C._push_on_torch_function_stack(mode)


def _set_default_device(values: tuple[Any, Any]) -> None:
    """Set the records of the default device, which is also one of the function modes."""
    _UNIT.device_context, _device.CURRENT_DEVICE = values


def _dispatch_modes() -> list[Any]:
    return [_C._get_dispatch_stack_at(i) for i in range(_C._len_torch_dispatch_stack())]


def _set_dispatch_modes(modes: list[Any]) -> None:
    for _ in range(_C._len_torch_dispatch_stack()):
        _C._pop_torch_dispatch_stack(None)
    for mode in modes:
        _C._push_on_torch_dispatch_stack(mode)


_saved_tensors_hooks = partial(_AUTOGRAD._top_saved_tensors_default_hooks, True)


def _set_saved_tensors_hooks(hooks: Any) -> None:
    while (top := _saved_tensors_hooks()) is not None and top != hooks:
        _AUTOGRAD._pop_saved_tensors_default_hooks()
    if hooks is not None and _saved_tensors_hooks() is None:
        _AUTOGRAD._push_saved_tensors_default_hooks(*hooks)


def _set_saved_tensors_ban(message: str | None) -> None:
    if message is None:
        _AUTOGRAD._saved_tensors_hooks_enable()
    else:
        _AUTOGRAD._saved_tensors_hooks_disable(message, False)


ENTERED: list[Any] = []
"""Contexts kept from being left, which would restore what a plugin had set."""


def _set_inference_mode(on: bool) -> None:
    ENTERED.append(torch.inference_mode(on))
    ENTERED[-1].__enter__()


def _flushes_denormals(smallest: float = sys.float_info.min) -> bool:
    return smallest * 0.5 == 0.0


def _states() -> Iterator[State]:
    yield State("inference mode", torch.is_inference_mode_enabled, _set_inference_mode)
    yield State("grad mode", torch.is_grad_enabled, torch.set_grad_enabled)
    yield State("torch function modes", _function_modes, _set_function_modes, shows=False)
    yield State(
        "default device",
        lambda: (getattr(_UNIT, "device_context", None), _device.CURRENT_DEVICE),
        _set_default_device,
        shows=False,
    )
    yield State("torch dispatch modes", _dispatch_modes, _set_dispatch_modes, shows=False)
    yield State("torch function state", _C._get_torch_function_state, _C._set_torch_function_state)
    yield State("default dtype", torch.get_default_dtype, torch.set_default_dtype)
    yield State("autocast nesting", _nesting, _set_nesting)
    yield State("autocast", _autocast, _set_autocast)
    yield State("saved-tensors hooks", _saved_tensors_hooks, _set_saved_tensors_hooks, shows=False)
    yield State(
        "ban of saved-tensors hooks",
        _AUTOGRAD._saved_tensors_hooks_get_disabled_error_message,
        _set_saved_tensors_ban,
    )
    yield State(
        "multithreaded backward", _C._is_multithreading_enabled, _C._set_multithreading_enabled
    )
    yield State(
        "anomaly detection",
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda values: torch.set_anomaly_enabled(*values),
    )
    yield State("number of threads", torch.get_num_threads, torch.set_num_threads)
    yield State("fp32 precision", fp32_precision, set_fp32_precision)
    yield State(
        "deterministic algorithms",
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda values: torch.use_deterministic_algorithms(values[0], warn_only=values[1]),
    )
    for name in SDPA:
        get = getattr(_C, f"_get_{name}_sdp_enabled")
        yield State(f"{name} attention kernel", get, getattr(_C, f"_set_sdp_use_{name}"))
    yield State(
        "order of attention kernels", _C._get_sdp_priority_order, _C._set_sdp_priority_order
    )
    for name in SWITCHES:
        yield State(name, getattr(_C, f"_get_{name}"), getattr(_C, f"_set_{name}"))
    for kind in ("fp16", "bf16"):
        yield State(
            f"{kind} reduction",
            getattr(_C, f"_get_cublas_allow_{kind}_reduced_precision_reduction"),
            _put_reduction(getattr(_C, f"_set_cublas_allow_{kind}_reduced_precision_reduction")),
        )
    yield State("flushing of denormal numbers", _flushes_denormals, torch.set_flush_denormal)
    yield from PYTHON_STATES
    yield State("numpy's error handling", np.geterr, lambda values: np.seterr(**values))


def _put_reduction(put: Callable[..., object]) -> Callable[[Any], object]:
    return lambda value: put(*value) if isinstance(value, tuple) else put(value)


STATES = tuple(_states())
LIKELY = (
    "inference mode", "grad mode", "torch function modes", "default device",
    "torch dispatch modes", "torch function state", "default dtype", "autocast",
    "saved-tensors hooks", "number of threads", "fp32 precision", "deterministic algorithms",
)  # fmt: skip
"""The states that :meth:`TorchWatch.unchanged` checks, most of them by one call."""

CLOSE_STEPS = 100
"""Steps after the start, a switch or a found change in which the state is compared per call."""

_training = attrgetter("training")
NOT_COMPUTED_WITH = (*(state.name for state in PYTHON_STATES), "numpy's error handling")
"""States that change no result of torch: after CLOSE_STEPS they are compared before evaluations and
at the end of the run, not in every step."""
OTHERS = [s.get for s in STATES if s.name not in (*LIKELY, *NOT_COMPUTED_WITH)]
OTHERS += [
    partial(_C._get_fp32_precision_getter, "mkldnn", "matmul"),
    partial(torch.get_autocast_dtype, "cpu"),
]
REST = [s.get for s in STATES if s.name in NOT_COMPUTED_WITH]


def _read(getters: Iterable[Callable[[], Any]]) -> list[Any]:
    return list(map(call, getters))


def set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Set the mode of each module; a module must come before those that it contains.

    ``train`` sets it, which a module may override to do more.
    """
    for module, training in modes:
        if module.training != training:
            module.train(training)


class Before(NamedTuple):
    """The state before a call of a plugin."""

    values: list[Any]
    modes: list[tuple[nn.Module, bool]]


class TorchWatch:
    """The watch of a run: compares the state of the process and the modes of ``model``'s modules,
    and puts back what changed.

    :meth:`start_steps` records the state in which the hooks of every step are called.
    :meth:`unchanged` checks the likely changes: after each call of a plugin in the first
    CLOSE_STEPS steps, later once after all calls of a hook. :meth:`all_unchanged` also checks the
    others once a step, after CLOSE_STEPS without NOT_COMPUTED_WITH. Outside of steps, the whole
    state is compared with that before the call.
    """

    unchanged: Callable[[], bool]
    """Whether none of the likely changes has happened since :meth:`start_steps`."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.stepping, self.checks_each_call = False, True
        self._steps = 0
        self._note(self.before())

    def before(self) -> Before:
        """The present state."""
        modules = () if self.model is None else self.model.modules()
        return Before([state.get() for state in STATES], [(m, m.training) for m in modules])

    def start_steps(self, model: nn.Module) -> None:
        """Record the present state as the right one for steps, which begin now."""
        self.model = model
        self._note(self.before())
        self._note_likely()
        self._check_each_call()
        self.stepping = True

    def _note_likely(self) -> None:
        # unchanged() runs after each call of a plugin in a step, so its attributes are bound here.
        check = _C._dynamo.guards.GlobalStateGuard().check
        functions, dispatches = _C._len_torch_function_stack, _C._len_torch_dispatch_stack
        inference, hooks = (
            torch.is_inference_mode_enabled,
            _AUTOGRAD._top_saved_tensors_default_hooks,
        )
        state = functions(), dispatches(), inference(), hooks(True)
        model = self.model

        def unchanged() -> bool:
            return (
                check()
                and (functions(), dispatches(), inference(), hooks(True)) == state
                and (model is None or model.training)
            )

        self.unchanged = unchanged
        self._others, self._rest = _read(OTHERS), _read(REST)

    def _check_each_call(self) -> None:
        self._steps, self.checks_each_call = 0, True

    def begin_step(self) -> None:
        """Count a step; after CLOSE_STEPS without a change, check once per hook, not per call."""
        self._steps += 1
        self.checks_each_call = self._steps <= CLOSE_STEPS

    def accept_modes(self) -> None:
        """Record the present modes of the modules as intended."""
        if not self.modes_unchanged():
            self._note(Before(self._noted.values, [(m, m.training) for m in self._modules]))

    def _note(self, state: Before) -> None:
        self._noted = state
        self._modules, self._modes = [m for m, _ in state.modes], [mode for _, mode in state.modes]

    def all_unchanged(self) -> bool:
        """Whether the state and the modes of all modules are unchanged."""
        return (
            self.unchanged()
            and self.modes_unchanged()
            and _read(OTHERS) == self._others
            and (not self.checks_each_call or _read(REST) == self._rest)
        )

    def modes_unchanged(self) -> bool:
        """Whether each module of the model has its intended mode."""
        return list(map(_training, self._modules)) == self._modes

    def put_back(self, before: Before | None = None, *, sets_modes: bool = False) -> list[str]:
        """Undo changes since ``before``, else since :meth:`start_steps`; return them as texts.

        With ``sets_modes`` the modules within the model keep their present modes, unless the mode
        of the model itself changed.
        """
        values, modes = before or self._noted
        found = put_back(STATES, values)
        moved = [training for module, training in modes if module.training is not training]
        # A plugin may set the mode of parts of the model, never that of the model itself.
        whole = bool(modes) and modes[0][0].training is not modes[0][1]
        if whole or (moved and not sets_modes):
            set_modes(modes)
            mode = "training" if moved[0] else "eval"
            found.append(f"the {mode} mode of {len(moved)} modules of the model")
        if before is None and not found:
            self._note_likely()  # torch's guard checks more than STATES: take its new values
        if found:
            self._check_each_call()
        if sets_modes and self.stepping and before is not None:
            self.accept_modes()
        return found


# Threads beside the loop ------------------------------------------------------------------------

OF_THE_LOOP = ("number of threads", "fp32 precision", "deterministic algorithms",
               "cudnn_benchmark", "recursion limit")  # fmt: skip
"""The states that all threads share and that the loop sets: a thread beside it cannot tell a change
of its own from the loop's. The loop finds them once a step."""

PROCESS_WIDE = tuple(
    state
    for state in STATES
    if state.name in ("default dtype", "order of attention kernels", *SWITCHES,
                      *(f"{name} attention kernel" for name in SDPA),
                      *(state.name for state in PYTHON_STATES))
    and state.name not in OF_THE_LOOP
)  # fmt: skip
"""The other states that all threads share, which hold for the whole of a run; a thread has the rest
to itself."""


class OwnRandomNumbers(TorchDispatchMode):
    """Draws of this thread that name no generator come from one of its own. Torch's global
    generator is seeded for each micro-batch: a draw from it on another thread, in the middle of a
    forward, would move the dropout.

    Raises RuntimeError for an operation that draws and takes no generator.
    """

    def __init__(self) -> None:
        super().__init__()
        self._generators: dict[torch.device, torch.Generator] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To let torch's compiler skip the mode would import it, which takes seconds."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False))
        given |= kwargs
        drawing = _with_generator(func)
        if drawing is None:
            if any(given.get(name) for name in ("dropout_p", "dropout", "p")):
                raise RuntimeError(
                    f"{func} draws from the random numbers of the training and takes no generator: "
                    "it cannot be used in the background"
                )
            return func(*args, **kwargs)
        if given.get("generator") is None:
            kwargs["generator"] = self._generator(_device_of(given))
        return drawing(*args, **kwargs)

    def _generator(self, device: torch.device) -> torch.Generator:
        return self._generators.setdefault(device, torch.Generator(device))


def _with_generator(func: Any) -> Any:
    """The overload of the operation ``func`` that takes a generator; None if there is none."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    name = func._overloadname
    names = {"default": "generator", "out": "generator_out", "low_out": "low_generator_out",
             "low_dtype": "low_generator_dtype"}  # fmt: skip
    return getattr(func._overloadpacket, names.get(name, f"{name}_generator"), None)


def _device_of(arguments: Mapping[str, Any]) -> torch.device:
    """Where an operation draws."""
    if arguments.get("device") is not None:
        return torch.device(arguments["device"])
    tensors = (value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    return next(tensors, torch.device("cpu"))


def shared_values() -> list[Any]:
    """The present values of the states PROCESS_WIDE."""
    return _read(state.get for state in PROCESS_WIDE)


def put_shared_back(values: Sequence[Any], names: Collection[str]) -> list[str]:
    """Set those of the states PROCESS_WIDE that ``names`` has to their ``values``; what differed,
    as texts."""
    pairs = [pair for pair in zip(PROCESS_WIDE, values, strict=True) if pair[0].name in names]
    return put_back([state for state, _ in pairs], [value for _, value in pairs])


@contextmanager
def watching_thread(changed: list[str]) -> Iterator[None]:
    """Add to ``changed`` the names of the states PROCESS_WIDE that differ at the end of the context
    from those at its begin. What the context draws does not reach the training."""
    before = shared_values()
    modes = _dispatch_modes()
    # Not by entering the mode: that sets flags of all threads, by which torch.compile goes.
    _set_dispatch_modes([*modes, OwnRandomNumbers()])
    try:
        yield
    finally:
        _set_dispatch_modes(modes)
        now = zip(PROCESS_WIDE, before, shared_values(), strict=True)
        changed += [state.name for state, value, other in now if value != other]
