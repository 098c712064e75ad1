"""Reads ``config.json``: what it says of a model, as the keys of a profile, or why not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apt_core.errors import ConfigError, Problem
from apt_core.json_files import read_json
from apt_core.providers.norm import Epsilon
from apt_core.providers.position import RoPEScaling
from apt_core.section_errors import in_words
from apt_core.sections import Size
from apt_plugins.export.hf_names import ARCHITECTURES

CONFIG = "config.json"
SILU = ("silu", "swish")

Layers = Annotated[int, Field(ge=1, le=2**12)]
Theta = Annotated[float, Field(gt=1, le=1e12)]


@dataclass(frozen=True)
class Family:
    """An architecture. ``defaults`` are what transformers takes where config.json leaves out a key
    that old files may lack; of other sizes none is guessed. ``biases`` are the parts that may have
    some."""

    model_type: str
    qk_norm: bool
    defaults: Mapping[str, Any]
    biases: tuple[str, ...]


FAMILIES = {
    ARCHITECTURES[family.model_type]: family
    for family in (
        Family("llama", False, {}, ("self_attn", "mlp")),
        Family("mistral", False, {"num_key_value_heads": 8}, ()),
        Family("qwen3", True, {"head_dim": 128, "num_key_value_heads": 32}, ("self_attn",)),
    )
}
"""Those that can be imported, by their names."""


class _Read(BaseModel):
    """The keys that say what is computed. What transformers does not read does not count here
    either."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, frozen=True
    )

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    max_position_embeddings: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: str = "silu"
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: Theta | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    original_max_position_embeddings: Size | None = None
    partial_rotary_factor: float | None = None
    sliding_window: Size | None = 4096
    use_sliding_window: bool = False
    max_window_layers: Annotated[int, Field(ge=0)] = 28
    layer_types: list[str] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0


class _Scaling(BaseModel):
    """The parameters of RoPE as transformers has them."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, frozen=True
    )

    factor: float | None = None
    original_max_position_embeddings: Size | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class HFModel:
    """A model as its ``config.json`` describes it, of an ``architecture`` of FAMILIES.

    ``keys`` are those of a profile's ``model``, ``notes`` what a person should know, ``may_have``
    the kinds of biases that its files may hold.
    """

    architecture: str
    keys: Mapping[str, Any]
    notes: tuple[str, ...]
    may_have: tuple[str, ...]
    longest: int | None
    """The context up to which the model is what the keys say, where there is a limit."""

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        width: int = self.keys["mha"]["head_dim"]
        return width


def read_model(folder: Path, max_seq_len: int | None) -> HFModel:
    """What ``config.json`` in ``folder`` says. ``max_seq_len`` is the context that is asked for,
    by default the model's.

    Raises ConfigError with everything that stands against the model.
    """
    path = folder / CONFIG
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no {CONFIG} in it",
            "DIR",
            str(folder),
            "give a folder that save_pretrained of transformers, or apt-export --to hf, has made",
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot be read: {why}", where=str(path)) from error
    if not isinstance(found, dict):
        raise ConfigError("is no JSON object", where=str(path))
    return _Reading(found, str(path), max_seq_len).read()


class _Reading:
    """Reads the content of a ``config.json`` and collects its problems."""

    def __init__(self, found: dict[str, Any], where: str, max_seq_len: int | None) -> None:
        self._found, self._where, self._asked = found, where, max_seq_len
        self._problems: list[Problem] = []
        self._notes: list[str] = []

    def read(self) -> HFModel:
        architecture, family = self._family()
        given = {
            key: value
            for key, value in {**family.defaults, **self._found}.items()
            # A null stands for the default, but here for no window.
            if value is not None or key == "sliding_window"
        }
        read = self._validated(_Read, given, "")
        if read is None:
            raise ConfigError(self._problems)
        self._check_heads(read)
        self._check_parts(read)
        longest = self._window(read, family)
        rope, limit = self._rope(read)
        longest = min(filter(None, (longest, limit)), default=None)
        context = self._asked or read.max_position_embeddings
        if longest is not None and context > longest:
            self._problem(
                f"a context of {context:,} tokens is longer than the {longest:,} up to which the "
                "model attends to all that came before, with the same frequencies",
                "sliding_window" if longest != limit else "rope_scaling",
                f"take it shorter: --set model.max_seq_len={longest}",
            )
        if self._problems:
            raise ConfigError(self._problems)
        heads, kv_heads = read.num_attention_heads, read.num_key_value_heads
        mha: dict[str, Any] = {"head_dim": _head_dim(read), "qk_norm": family.qk_norm}
        if family.qk_norm:
            mha["qk_norm_eps"] = read.rms_norm_eps
        keys = {
            "vocab_size": read.vocab_size,
            "d_model": read.hidden_size,
            "d_ff": read.intermediate_size,
            "num_layers": read.num_hidden_layers,
            "num_heads": heads,
            "num_kv_heads": kv_heads or heads,
            "max_seq_len": context,
            "tie_embeddings": read.tie_word_embeddings,
            "attention_name": "mha",
            "mha": mha,
            "norm": {"eps": read.rms_norm_eps},
            "rope": rope,
        }
        biases = {"self_attn": read.attention_bias, "mlp": read.mlp_bias}
        may_have = tuple(part for part in family.biases if biases[part])
        return HFModel(architecture, keys, tuple(self._notes), may_have, longest)

    def _problem(self, message: str, key: str, hint: str = "") -> None:
        self._problems.append(Problem(message, key, self._where, hint))

    def _validated(self, model: type[BaseModel], given: Mapping[str, Any], place: str) -> Any:
        try:
            return model.model_validate(given)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                message, hint = in_words(details)
                key = ".".join(map(str, (*filter(None, [place]), *details["loc"])))
                self._problem(message, key, hint)
            return None

    def _family(self) -> tuple[str, Family]:
        """The architecture. Raises ConfigError for one that is not known, and never asks its
        code."""
        named, kind = self._found.get("architectures"), self._found.get("model_type")
        names = named if isinstance(named, list) else []
        name = next((each for each in names if isinstance(each, str)), None)
        if name is None:
            types = {family.model_type: known for known, family in FAMILIES.items()}
            name = types.get(kind) if isinstance(kind, str) else None
        code = self._found.get("auto_map")
        if name not in FAMILIES:
            known = ", ".join(FAMILIES)
            hint = f"these can be: {known}"
            if code:
                hint += "; code that comes with a model is never run"
            what = repr(name or kind)[:100]
            self._problem(f"a model of {what} cannot be imported", "architectures", hint)
            raise ConfigError(self._problems)
        family = FAMILIES[name]
        if kind is not None and kind != family.model_type:
            self._problem(f"is {kind!r}, and {name} is {family.model_type!r}", "model_type")
        if code:
            self._notes.append(
                f"auto_map names code that comes with the model: it was not run, the model is "
                f"taken as the {name} of transformers"
            )
        return name, family

    def _check_heads(self, read: _Read) -> None:
        heads, kv_heads = read.num_attention_heads, read.num_key_value_heads or 1
        if heads % kv_heads:
            self._problem(
                f"{kv_heads} does not divide the {heads} heads of num_attention_heads",
                "num_key_value_heads",
            )
        if read.head_dim is None and read.hidden_size % heads:
            self._problem(
                f"{read.hidden_size} is not divisible by the {heads} heads of num_attention_heads",
                "hidden_size",
                "head_dim gives heads a width of their own",
            )
        elif _head_dim(read) % 2:
            self._problem(f"{_head_dim(read)} is odd, and RoPE turns pairs", "head_dim")

    def _check_parts(self, read: _Read) -> None:
        if read.hidden_act not in SILU:
            self._problem(
                f"is {read.hidden_act!r}: the feed-forward of a run is gated by silu", "hidden_act"
            )
        if self._found.get("quantization_config"):
            self._problem(
                "quantised weights cannot be trained on",
                "quantization_config",
                "import the model that they were made of, or save it dequantised",
            )
        if read.attention_dropout:
            self._notes.append(
                f"attention_dropout {read.attention_dropout:g} is not taken over: it is of "
                "training, and model.dropout is another one"
            )

    def _window(self, read: _Read, family: Family) -> int | None:
        """The length of the sliding window, where layers have one."""
        window = read.sliding_window
        if family.model_type == "llama" or window is None:
            return None
        if family.model_type == "mistral":
            return window
        if not read.use_sliding_window:
            window = None
        types = read.layer_types
        if types is None:
            slides = read.max_window_layers < read.num_hidden_layers
            return window if slides else None
        other = sorted({*types} - {"full_attention", "sliding_attention"})
        if other:
            self._problem(f"names {', '.join(map(repr, other))}", "layer_types")
        if len(types) != read.num_hidden_layers:
            self._problem(
                f"names {len(types)} layers, num_hidden_layers is {read.num_hidden_layers}",
                "layer_types",
            )
        return window if "sliding_attention" in types else None

    def _rope(self, read: _Read) -> tuple[dict[str, Any], int | None]:
        """The keys of ``model.rope``, and the longest context for which they stand."""
        key = "rope_scaling" if read.rope_scaling else "rope_parameters"
        given = read.rope_scaling or read.rope_parameters or {}
        theta = given.get("rope_theta", read.rope_theta or 10_000.0)
        if not isinstance(theta, int | float) or isinstance(theta, bool) or not 1 < theta <= 1e12:
            self._problem(f"is {str(theta)[:100]}, not a number above 1", f"{key}.rope_theta")
            theta = 10_000.0
        rope: dict[str, Any] = {"theta": float(theta), "scaling": None}
        part = given.get("partial_rotary_factor", read.partial_rotary_factor)
        if part not in (None, 1, 1.0):
            self._problem(f"is {str(part)[:100]}: RoPE turns whole heads", "partial_rotary_factor")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind == "default":
            nested = [name for name, value in given.items() if isinstance(value, dict)]
            if nested:
                self._problem(f"has other frequencies for {', '.join(nested)}", key)
            return rope, None
        if kind == "dynamic":
            self._notes.append(
                f"{key}: up to {read.max_position_embeddings:,} tokens dynamic scaling changes no "
                "frequency; longer texts are not taken"
            )
            return rope, read.max_position_embeddings
        if kind not in RoPEScaling.OF_TYPE:
            known = ", ".join(("default", *RoPEScaling.OF_TYPE, "dynamic"))
            self._problem(f"is {str(kind)[:100]!r}", f"{key}.rope_type", f"these can be: {known}")
            return rope, None
        scaling = self._validated(_Scaling, {k: v for k, v in given.items() if v is not None}, key)
        if scaling is not None:
            rope["scaling"] = self._scaling(kind, scaling, read, key)
        return rope, None

    def _scaling(self, kind: str, given: _Scaling, read: _Read, key: str) -> dict[str, Any]:
        """The keys of ``model.rope.scaling``."""
        original = read.original_max_position_embeddings or (
            given.original_max_position_embeddings or read.max_position_embeddings
        )
        factor = given.factor
        if factor is None and kind == "yarn":
            factor = read.max_position_embeddings / original
        values: dict[str, Any] = {"type": kind, "factor": factor}
        if kind == "llama3":
            values |= {
                "original_max_seq_len": original,
                "low_freq_factor": given.low_freq_factor,
                "high_freq_factor": given.high_freq_factor,
            }
        elif kind == "yarn":
            values |= {
                "original_max_seq_len": original,
                "beta_fast": given.beta_fast or 32.0,
                "beta_slow": given.beta_slow or 1.0,
                "truncate": given.truncate,
                "attention_factor": given.attention_factor,
            }
            if given.attention_factor is None and given.mscale and given.mscale_all_dim and factor:
                scales = [
                    0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
                    for scale in (given.mscale, given.mscale_all_dim)
                ]
                values["attention_factor"] = scales[0] / scales[1]
        scaling = self._validated(RoPEScaling, values, key)
        for name, message, hint in scaling.faults() if scaling is not None else ():
            self._problem(message, f"{key}.{name}", hint)
        return {name: value for name, value in values.items() if value is not None}


def _head_dim(read: _Read) -> int:
    return read.head_dim or read.hidden_size // read.num_attention_heads


def leaves(keys: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all values in nested keys."""
    for key, value in keys.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)
