"""Folders of safetensors files, in several parts where one would be too large."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from apt_core.files import write_atomically
from apt_core.modeling.plain import with_tensors
from apt_core.providers import PlainModel
from apt_plugins.export.settings import FolderSettings


def rounded(model: PlainModel, settings: FolderSettings) -> PlainModel | None:
    """``model`` with the weights that files of these settings hold; None where these are its
    own."""
    dtype = getattr(torch, settings.dtype)
    if dtype == torch.float32:
        return None
    found: PlainModel = with_tensors(model, lambda tensor: tensor.to(dtype).float())
    return found


def write_tensors(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], settings: FolderSettings
) -> None:
    """Write ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` … with their index, as
    Hugging Face names them. At most the tensors of one file are in memory. Raises OSError."""
    dtype = getattr(torch, settings.dtype)
    parts: list[Path] = []
    places: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    held_bytes = total = 0

    def write_held() -> None:
        part = folder / f"part-{len(parts)}.safetensors"
        try:
            save_file(held, part, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{part.name}: {error}") from error
        parts.append(part)
        held.clear()

    for name, tensor in tensors:
        # A copy, since a view would be written with all of what it is a view of.
        stored = tensor.to(dtype).clone() if tensor.dtype != dtype else tensor.clone()
        if held and held_bytes + stored.nbytes > settings.max_shard_size:
            write_held()
            held_bytes = 0
        held[name] = stored
        held_bytes += stored.nbytes
        total += stored.nbytes
        places[name] = len(parts)
    write_held()
    if len(parts) == 1:
        parts[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{n + 1:05}-of-{len(parts):05}.safetensors" for n in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        part.rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[place] for name, place in places.items()},
    }
    text = json.dumps(index, indent=2)
    write_atomically(folder / "model.safetensors.index.json", text + "\n")
