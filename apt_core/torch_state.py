"""The state of torch that decides what it computes, and the watch that keeps it in a run.

What a plugin sets here for a model of its own, or leaves behind where it fails, would change the
weights of the run. So the state is compared after each call of a plugin, and put back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from operator import attrgetter, call
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils import _device

from apt_core.python_state import OF_PYTHON, State, put_back

_C: Any = torch._C
_AUTOGRAD: Any = torch._C._autograd
_UNIT: Any = torch._GLOBAL_DEVICE_CONTEXT

AUTOCAST = ("cpu", "cuda")
"""Types of device that a run computes its forward on."""

OTHER_AUTOCAST = ("xpu", "mps", "hpu", "xla", "ipu", "maia", "mtia", "privateuseone")

PRECISIONS = (
    ("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"),
    ("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"),
)  # fmt: skip
"""Where torch keeps how exact fp32 arithmetic is; the setters of whole backends come first."""

SDPA = ("flash", "math", "mem_efficient", "cudnn", "overrideable")
SWITCHES = (
    "cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic", "mkldnn_enabled",
    "mkldnn_deterministic", "nnpack_enabled", "math_sdp_allow_fp16_bf16_reduction",
    "cublas_allow_fp16_accumulation", "cpu_allow_fp16_reduced_precision_reduction",
    "deterministic_fill_uninitialized_memory",
)  # fmt: skip
"""What torch has a getter and a setter of each by name."""


def _nesting() -> int:
    """How many autocast contexts are entered: below them, casts of weights are kept for reuse."""
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
        with suppress(RuntimeError):  # this build does not know it
            torch.set_autocast_enabled(device, False)
    for device, (enabled, dtype) in zip(AUTOCAST, each, strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(caches)
    torch.clear_autocast_cache()


def fp32_precision() -> tuple[Any, ...]:
    """How exact fp32 arithmetic is, for :func:`set_fp32_precision`."""
    named = None
    with suppress(RuntimeError):  # torch refuses the old name where the new ones are mixed
        named = torch.get_float32_matmul_precision()
    return (named, *(_C._get_fp32_precision_getter(*place) for place in PRECISIONS))


def set_fp32_precision(values: tuple[Any, ...]) -> None:
    """Bring back what :func:`fp32_precision` has found."""
    named, *each = values
    if named is not None:
        torch.set_float32_matmul_precision(named)
    for place, value in zip(PRECISIONS, each, strict=True):
        with suppress(RuntimeError):  # some pairs only follow their backend
            _C._set_fp32_precision_setter(*place, value)


def _function_modes() -> list[Any]:
    return [_C._get_function_stack_at(i) for i in range(_C._len_torch_function_stack())]


def _set_function_modes(modes: list[Any]) -> None:
    for _ in range(_C._len_torch_function_stack()):
        _C._pop_torch_function_stack()
    for mode in modes:
        _C._push_on_torch_function_stack(mode)


def _set_default_device(values: tuple[Any, Any]) -> None:
    """Beside the function mode that it is: by ``set_default_device``, and by any context."""
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
"""Contexts that are never left: that would bring back what a plugin had set."""


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
    yield from OF_PYTHON
    yield State("numpy's error handling", np.geterr, lambda values: np.seterr(**values))


def _put_reduction(put: Callable[..., object]) -> Callable[[Any], object]:
    return lambda value: put(*value) if isinstance(value, tuple) else put(value)


STATES = tuple(_states())
LIKELY = (
    "inference mode", "grad mode", "torch function modes", "default device",
    "torch dispatch modes", "torch function state", "default dtype", "autocast",
    "saved-tensors hooks", "number of threads", "fp32 precision", "deterministic algorithms",
)  # fmt: skip
"""What :meth:`TorchWatch.unchanged` sees, most of it by one call."""

CLOSE_STEPS = 100
"""Steps from the start, from a switch and from every find on, in which each call is looked at."""

_training = attrgetter("training")
NOT_COMPUTED_WITH = (*(state.name for state in OF_PYTHON), "numpy's error handling")
"""What decides nothing that torch computes: after CLOSE_STEPS it is looked at before evaluations
and at the end of the run, no longer in every step."""
OTHERS = [s.get for s in STATES if s.name not in (*LIKELY, *NOT_COMPUTED_WITH)]
OTHERS += [
    partial(_C._get_fp32_precision_getter, "mkldnn", "matmul"),
    partial(torch.get_autocast_dtype, "cpu"),
]
REST = [s.get for s in STATES if s.name in NOT_COMPUTED_WITH]


def _read(getters: Iterable[Callable[[], Any]]) -> list[Any]:
    return list(map(call, getters))


def set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Give each module its mode; one that contains others stands before them. By ``train``, for a
    module may do more in it than note the mode."""
    for module, training in modes:
        if module.training != training:
            module.train(training)


class Before(NamedTuple):
    """What a call of a plugin found."""

    values: list[Any]
    modes: list[tuple[nn.Module, bool]]


class TorchWatch:
    """The watch of a run: compares the state of the process, and the modes of ``model``'s modules,
    and puts them back.

    Hooks of every step are called in the state that :meth:`expect` has noted. :meth:`unchanged`
    looks for what is likely: after each call of a plugin in the first CLOSE_STEPS, later after all
    calls of a hook. :meth:`settled` looks once a step for the rest, later without
    NOT_COMPUTED_WITH. Calls outside of steps are compared as a whole with what they found.
    """

    unchanged: Callable[[], bool]
    """Whether the most likely changes since :meth:`expect` are absent."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self.stepping, self.closely = False, True
        self._steps = 0
        self._note(self.before())

    def before(self) -> Before:
        """The present state."""
        modules = () if self.model is None else self.model.modules()
        return Before([state.get() for state in STATES], [(m, m.training) for m in modules])

    def expect(self, model: nn.Module) -> None:
        """Steps begin: the present state is right for them."""
        self.model = model
        self._note(self.before())
        self._note_likely()
        self._look_closely()
        self.stepping = True

    def _note_likely(self) -> None:
        # Called after each call of a plugin in a step: nothing is looked up there.
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

    def _look_closely(self) -> None:
        self._steps, self.closely = 0, True

    def begin_step(self) -> None:
        """Count a step; after CLOSE_STEPS without a find, hooks are looked at as a whole."""
        self._steps += 1
        self.closely = self._steps <= CLOSE_STEPS

    def note_modes(self) -> None:
        """The modes that modules have now are meant."""
        if not self.modes_unchanged():
            self._note(Before(self._noted.values, [(m, m.training) for m in self._modules]))

    def _note(self, right: Before) -> None:
        self._noted = right
        self._modules, self._modes = [m for m, _ in right.modes], [mode for _, mode in right.modes]

    def settled(self) -> bool:
        """Whether everything is unchanged, including the modes of modules."""
        return (
            self.unchanged()
            and self.modes_unchanged()
            and _read(OTHERS) == self._others
            and (not self.closely or _read(REST) == self._rest)
        )

    def modes_unchanged(self) -> bool:
        """Whether each module of the model has its intended mode."""
        return list(map(_training, self._modules)) == self._modes

    def put_back(self, before: Before | None = None, *, sets_modes: bool = False) -> list[str]:
        """Undo what has changed since ``before``, by default since :meth:`expect`, and say what.

        With ``sets_modes`` the modules within the model keep the mode that they have now, unless
        that of the whole was set.
        """
        values, modes = before or self._noted
        found = put_back(STATES, values)
        moved = [training for module, training in modes if module.training is not training]
        # Parts of the model may be meant to be in another mode, the whole of it never is.
        whole = bool(modes) and modes[0][0].training is not modes[0][1]
        if whole or (moved and not sets_modes):
            set_modes(modes)
            mode = "training" if moved[0] else "eval"
            found.append(f"the {mode} mode of {len(moved)} modules of the model")
        if before is None and not found:
            self._note_likely()  # something else that torch's guard looks at
        if found:
            self._look_closely()
        if sets_modes and self.stepping and before is not None:
            self.note_modes()
        return found
