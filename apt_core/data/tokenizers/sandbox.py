"""Runs chat templates of any origin: without reach, and within bounds of work and memory."""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TURNS = 1 << 18
"""Turns of loops, and calls of macros, methods and filters, of one rendering."""

MAX_CHARS = 1 << 28
"""Characters that one rendering makes."""

MAX_ITEMS = 1 << 18
"""Items of a list that a template makes."""

MAX_SECONDS = 60.0
"""Time of one rendering. The other bounds are met first, but where each turn takes long."""

MAX_WIDTH = 10_000
"""Characters to which a format fills a text."""

_GROWING = {"center", "expandtabs", "indent", "ljust", "replace", "rjust", "zfill"}
"""Filters and methods of texts that make at most as many characters as the text has, times the
greatest number or the longest text they are given."""

_WRITING = {"format", "string", "urlencode"}
"""Filters that write all of a value out."""

_WIDTH = re.compile(r"\d{5}|\*")

_TURN, _JOINED = "of a turn", "joined by ~"
"""Filters that count, which no template can name."""

_UNUSED = ("lipsum", "cycler", "joiner")
"""Globals of Jinja that draw at random or keep something, which no conversation needs."""

_REFUSED_FILTERS = {
    *("batch", "center", "filesizeformat", "pprint", "random", "round", "slice", "sum", "urlize"),
    *("wordwrap", "xmlattr"),
}
_REFUSED_METHODS = {"encode", "from_bytes", "maketrans", "to_bytes", "translate"}
"""Those that draw at random or make much out of little, which no conversation needs."""


class BoundsError(jinja2.TemplateError):
    """A template takes more than it may."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no template loops for ever or makes texts without end.

    Turns of loops are counted, and what operators, calls and filters make; of those that could make
    much out of little it is told before. ``marks`` stand around what ``generation`` blocks write.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, marks: tuple[str, str]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, loopcontrols],
            optimized=False,
            finalize=self._written,
        )
        self.marks = marks
        self._lock = threading.Lock()
        self._turns = self._chars = 0
        self._end = 0.0
        self.filters["tojson"] = _to_json
        for name, function in self.filters.items():
            self.filters[name] = self._bounded(name, function)
        self.filters |= {_TURN: self._turn, _JOINED: self._written}
        for name in _UNUSED:
            del self.globals[name]
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def rendered(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """What ``template`` makes of ``variables``. Raises BoundsError, and whatever the template
        raises."""
        with self._lock:  # the counts are of one rendering
            self._turns = self._chars = 0
            self._end = time.monotonic() + MAX_SECONDS
            return template.render(variables)

    def _turn(self, chars: int = 0) -> None:
        """Count a turn of a loop, in which so many characters of the template are written."""
        self._turns += 1
        if self._turns > MAX_TURNS:
            raise BoundsError(f"it takes more than {MAX_TURNS:,} turns of loops and calls")
        if self._turns % 256 == 0 and time.monotonic() > self._end:
            raise BoundsError(f"it takes more than {MAX_SECONDS:g} seconds")
        self._count(chars)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is type(right) is str:  # nearly all that there is
            self._chars += len(left) + len(right)
            if self._chars > MAX_CHARS:
                _require_room(self._chars)
            return left + right
        if operator == "*":
            for some, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(some, str):
                    _require_room(len(some) * times)
                elif isinstance(times, int) and isinstance(some, list | tuple):
                    _require_items(len(some) * times)
        elif operator == "**" and isinstance(right, int | float) and right > 64:
            raise BoundsError("it raises a number to a power above 64")
        elif operator == "%" and isinstance(left, str):
            _require_narrow(left)
            _require_room(_size_of(right))
        return self._made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, called: Any, /, *args: Any, **options: Any) -> Any:
        self._turn()
        # Jinja wraps the method format in a function.
        method = getattr(called, "__wrapped__", called)
        if getattr(method, "__name__", "") in _REFUSED_METHODS:
            raise BoundsError(f"it uses {method.__name__}, which no conversation needs")
        if isinstance(owner := getattr(method, "__self__", None), str):
            name = method.__name__
            if name == "join" and args:
                args = (_joinable(owner, args[0]),)
            else:
                _check_growth(name, owner, [*args, *options.values()])
        return self._made(super().call(context, called, *args, **options))

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)  # with what Jinja has noted on it
        def bounded(*args: Any, **options: Any) -> Any:
            self._turn()
            if name in _REFUSED_FILTERS:
                raise BoundsError(f"it uses {name}, which no conversation needs")
            before, value, rest = args[:first], args[first], args[first + 1 :]
            given = [*rest, *options.values()]
            if name == "join":
                value = _joinable(str(given[0]) if given else "", value)
            elif isinstance(value, str):
                _check_growth(name, value, given)
            if name in _WRITING:
                _require_room(_size_of([value, *given]))
            return self._made(function(*before, value, *rest, **options))

        return bounded

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        blocks: list[Any] = list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)))
        for node in blocks:
            chars = sum(len(each.data) for each in node.find_all(nodes.TemplateData))
            node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(chars), _TURN)))
        for node in tree.find_all(nodes.Concat):  # which Jinja does not intercept
            node.nodes = [_filtered(each, _JOINED) for each in node.nodes]
        tree.set_environment(self)
        tree.set_lineno(1)
        return tree

    def _written(self, value: Any) -> Any:
        self._count(len(value) if type(value) is str else _size_of(value))
        return value

    def _made(self, value: Any) -> Any:
        if isinstance(value, str):
            self._count(len(value))
        elif isinstance(value, list | tuple):
            _require_items(len(value))
        elif isinstance(value, int) and value.bit_length() > 1 << 12:
            raise BoundsError("it makes a number of more than 4,096 bits")
        return value

    def _count(self, chars: int) -> None:
        self._chars += chars
        if self._chars > MAX_CHARS:
            _require_room(self._chars)


class Generation(Extension):
    """``{% generation %}`` blocks, between the marks of the environment."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrapped"), [], [], body).set_lineno(line)

    def _wrapped(self, caller: Any) -> str:
        begin, end = self.environment.marks
        return f"{begin}{caller()}{end}"


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


def _check_growth(name: str, text: str, given: list[Any]) -> None:
    if name in ("format", "format_map"):
        _require_narrow(text)
        if re.search(r":[^{}]*\{", text):
            raise BoundsError("it fills a text to a width that it computes")
        _require_room(_size_of(given) * max(1, text.count("{")))
    elif name in _GROWING:
        sizes = [abs(int(each)) for each in given if isinstance(each, int | float)]
        sizes += [len(each) for each in given if isinstance(each, str)]
        _require_room(max(len(text), 1) * max(sizes, default=1))


def _joinable(between: str, items: Any) -> Any:
    if isinstance(items, str):
        _require_room(len(items) * (len(between) + 1))
        return items
    found, size = [], 0
    for item in items:
        size += len(between) + _size_of(item)
        _require_room(size)
        found.append(item)
    return found


def _require_narrow(form: str) -> None:
    if _WIDTH.search(form):
        raise BoundsError(f"it fills a text to {MAX_WIDTH:,} characters or more")


def _require_room(chars: int) -> None:
    if chars > MAX_CHARS:
        raise BoundsError(f"it makes more than {MAX_CHARS:,} characters")


def _require_items(items: int) -> None:
    if items > MAX_ITEMS:
        raise BoundsError(f"it makes a list of more than {MAX_ITEMS:,} items")


def _size_of(value: Any) -> int:
    """About how many characters ``value`` has when it is written out; more than MAX_CHARS where it
    has more, or consists of more than MAX_ITEMS values."""
    size = count = 0
    waiting = [value]
    while waiting and size <= MAX_CHARS:
        each = waiting.pop()
        size, count = size + (len(each) if isinstance(each, str) else 1), count + 1
        if count > MAX_ITEMS:
            return MAX_CHARS + 1
        if isinstance(each, Mapping):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            waiting += each
    return size


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    for option in options.values():
        if isinstance(option, int):
            _require_room(option)
    parts, size = [], 0
    for part in json.JSONEncoder(ensure_ascii=ensure_ascii, **options).iterencode(value):
        size += len(part)
        _require_room(size)
        parts.append(part)
    return "".join(parts)
