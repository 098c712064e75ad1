"""Finds the tensors of a folder of Hugging Face, checks that they are those of the model, and
reads them. Safetensors and JSON alone: nothing in the folder can run code.

Shapes: V ids, D d_model, H query heads, K key and value heads, R the width of a head, F d_ff.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apt_core.errors import ConfigError, Problem, shortened
from apt_core.files import open_file
from apt_core.json_files import read_json
from apt_plugins.export.hf_names import (
    ATTENTION,
    ATTENTION_NORM,
    EMBEDDING,
    FFN,
    FFN_NORM,
    FFN_PLACE,
    FINAL_NORM,
    HEAD,
    QK_NORM,
    of_block,
)
from apt_plugins.hf_import.hf_config import HFModel

QKV = (ATTENTION["q"], ATTENTION["k"], ATTENTION["v"])
"""Queries, keys and values, which a run has in one matrix."""

QK_NORMS = {f"attention.{part}.weight": name for part, name in QK_NORM.items()}
OURS = {
    "attention.out_weight": ATTENTION["out"],
    "attention_norm.weight": ATTENTION_NORM,
    "ffn_norm.weight": FFN_NORM,
    **{f"ffn.{part}.weight": f"{FFN_PLACE}.{name}" for part, name in FFN.items()},
}
"""The other parameters of a block, those of an attention first, with their names in the files."""

COMPUTED = ("rotary_emb.inv_freq",)
"""What old files hold beside the weights, and everyone computes anew."""

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")
"""What becomes fp32 without a loss."""


def expected_shapes(model: HFModel) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's tensors by their names in its files."""
    keys = model.keys
    d_model, d_ff, vocab = keys["d_model"], keys["d_ff"], keys["vocab_size"]
    width = model.head_dim
    q, kv = keys["num_heads"] * width, keys["num_kv_heads"] * width
    block: dict[str, tuple[int, ...]] = {ATTENTION["out"]: (d_model, q)}
    block |= zip(QKV, [(q, d_model), (kv, d_model), (kv, d_model)], strict=True)
    block |= dict.fromkeys((ATTENTION_NORM, FFN_NORM), (d_model,))
    if keys["mha"]["qk_norm"]:
        block |= dict.fromkeys(QK_NORM.values(), (width,))
    shapes = {"gate": (d_ff, d_model), "up": (d_ff, d_model), "down": (d_model, d_ff)}
    block |= {f"{FFN_PLACE}.{FFN[part]}": shape for part, shape in shapes.items()}
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, d_model), FINAL_NORM: (d_model,)}
    if not keys["tie_embeddings"]:
        found[HEAD] = (vocab, d_model)
    for layer in range(keys["num_layers"]):
        found |= {of_block(layer, name): shape for name, shape in block.items()}
    return found


class HFWeights:
    """The tensors of the model in ``folder``; ``notes`` say what of the files was left out.

    Raises ConfigError with everything by which the files are not those of the model. Only their
    headers are read for that, so that sizes in config.json allocate nothing.
    """

    def __init__(self, folder: Path, model: HFModel) -> None:
        self.folder, self.notes = folder, list[str]()
        self._problems: list[Problem] = []
        self._files: dict[str, str] = {}  # of each tensor
        self._listed: set[str] = set()
        self._shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        self.files = self._find()
        for file in self.files:
            self._list(file)
        self._check_index()
        if not self._problems:
            self._compare(model)
        if self._problems:
            raise ConfigError(self._problems)

    def read(self, name: str) -> Tensor:
        """A tensor in fp32. Raises ConfigError for one that cannot be read or is not finite."""
        file = self._files[name]
        with self._reading(file), self._opened(file) as opened:
            tensor: Tensor = opened.get_tensor(name).float()
        if self._problems:
            raise ConfigError(self._problems)
        # The sum is not finite either then, and is had in a third of the time.
        if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            raise ConfigError("has values that are not finite", name, str(self.folder / file))
        return tensor

    def sha256(self) -> dict[str, str]:
        """The hashes of the files. Raises OSError."""
        found = {}
        for name in self.files:
            with open_file(self.folder / name) as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    # Files -----------------------------------------------------------------------------------

    def _problem(self, message: str, key: str, file: str = "", hint: str = "") -> None:
        where = str(self.folder / shortened(file, 200)) if file else str(self.folder)
        self._problems.append(Problem(message, shortened(key, 300), where, hint))

    def _find(self) -> list[str]:
        """The names of the files, as transformers looks for them."""
        self._index: Mapping[str, Any] = {}
        if (self.folder / WHOLE).exists():
            return [WHOLE] if self._is_own(WHOLE) else []
        if not (self.folder / INDEX).exists():
            pickled = sorted(path.name for path in self.folder.glob("pytorch_model*.bin"))
            hint = "save the model by save_pretrained of transformers"
            what = f"there is neither {WHOLE} nor {INDEX}"
            if pickled:
                what += f", and {pickled[0]} is a pickle, which could run code and is not read"
                hint = "convert it: save_pretrained of a recent transformers writes safetensors"
            self._problem(what, "DIR", "", hint)
            return []
        try:
            index = read_json(self.folder / INDEX)
        except (OSError, ValueError) as error:
            self._problem(f"cannot be read: {_reason(error)}", "", INDEX)
            return []
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names:
            self._problem("is no mapping of tensors to files", "weight_map", INDEX)
            return []
        self._index = names
        found = []
        for name in dict.fromkeys(map(str, names.values())):
            if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
                self._problem(
                    f"{shortened(name, 200)!r} is no file of this folder", "weight_map", INDEX
                )
            elif not name.endswith(".safetensors"):
                message = f"{shortened(name, 200)!r} is no safetensors file: nothing else is read"
                self._problem(message, "weight_map", INDEX)
            elif self._is_own(name):
                found.append(name)
        return found

    def _is_own(self, name: str) -> bool:
        """Whether a file lies in the folder, or in the cache that Hugging Face's hub makes, whose
        folders of models link to files beside them."""
        real, folder = (
            Path(os.path.realpath(self.folder / name)),
            Path(os.path.realpath(self.folder)),
        )
        blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
        if real.is_relative_to(folder) or real.is_relative_to(blobs):
            return True
        self._problem("it is a link that leads out of its folder", "", name)
        return False

    @contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError) as error:
            self._problem(f"cannot be read: {_reason(error)}", "", file)

    def _opened(self, file: str) -> Any:
        open_file(self.folder / file).close()  # a pipe is never waited for
        return safe_open(self.folder / file, framework="pt")

    def _list(self, file: str) -> None:
        """Note the tensors of a file, by its header."""
        with self._reading(file), self._opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118, it is no mapping
                part = opened.get_slice(name)
                if name in self._files:
                    self._problem(f"is in {self._files[name]} too", name, file)
                self._files[name] = file
                self._shapes[name] = tuple(part.get_shape()), str(part.get_dtype())
            self._listed.add(file)

    def _check_index(self) -> None:
        for name, file in self._index.items():
            if self._files.get(name) != file and file in self._listed:
                self._problem(f"{INDEX} says that it is there, and it is not", name, str(file))

    # Tensors ---------------------------------------------------------------------------------

    def _compare(self, model: HFModel) -> None:
        """Compare what there is with what the model has."""
        expected = expected_shapes(model)
        for name, shape in expected.items():
            if name not in self._shapes:
                hint = ""
                if name == HEAD:
                    hint = "a model with tied embeddings says tie_word_embeddings: true"
                self._problem(f"is missing: config.json asks for {list(shape)}", name, "", hint)
                continue
            there, dtype = self._shapes[name]
            if there != shape:
                message = f"is {list(there)}, config.json asks for {list(shape)}"
                self._problem(message, name, self._files[name])
            if dtype not in DTYPES:
                message = f"is of type {dtype}: weights are F32, F16 or BF16"
                self._problem(message, name, self._files[name])
        surplus = sorted(self._shapes.keys() - expected.keys())
        if self._problems:
            surplus = [name for name in surplus if not _is_known(name)]
            for name in surplus:
                self._problem("is surplus: the model has no such tensor", name, self._files[name])
            return
        for part in model.may_have:
            if not any(f".{part}." in name and name.endswith(".bias") for name in surplus):
                flag = "attention_bias" if part == "self_attn" else "mlp_bias"
                self._problem(f"config.json says {flag}, and there is no bias", part)
        for name in surplus:
            self._judge(name)

    def _judge(self, name: str) -> None:
        """Say why a tensor that the model does not have cannot be left out, or leave it out."""
        if name.endswith(COMPUTED):
            return
        file = self._files[name]
        if name == HEAD:
            same = self._shapes[name][0] == self._shapes[EMBEDDING][0]
            if not same or not torch.equal(self.read(name), self.read(EMBEDDING)):
                self._problem(
                    "differs from the embedding, and config.json says tie_word_embeddings",
                    name,
                    file,
                    "say tie_word_embeddings: false if the head is its own",
                )
        elif name.endswith(".bias") and _is_known(name):
            if self._shapes[name][1] not in DTYPES or bool(self.read(name).any()):
                self._problem("is a bias, and the layers of a run have none", name, file)
            else:
                self.notes.append(f"{name} is zero throughout and was left out")
        else:
            self._problem("is surplus: the model has no such tensor", name, file)


def _is_known(name: str) -> bool:
    """Whether a surplus tensor may have no effect."""
    parts = (*ATTENTION.values(), *(f"{FFN_PLACE}.{part}" for part in FFN.values()))
    places = tuple(f"{part}.bias" for part in parts)
    return name == HEAD or name.endswith((*COMPUTED, *places))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
