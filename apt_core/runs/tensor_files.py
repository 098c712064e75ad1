"""Named tensors on disk: one safetensors file, or a folder of the processes' shards.

Both forms hold the same names and whole shapes, so either is read into tensors that are whole or
sharded over any number of processes. Nothing here is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from apt_core.errors import CheckpointError
from apt_core.files import open_file
from apt_core.parallel.world import fill, is_sharded

SUFFIX = ".safetensors"

MALFORMED = (ValueError, KeyError, TypeError, IndexError)
"""What torch's reader raises for metadata of shards that are not what it wrote."""


def write_whole(stem: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``<stem>.safetensors``. Raises OSError."""
    path = stem.with_name(stem.name + SUFFIX)
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def write_shards(stem: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Write the folder ``<stem>``; all processes of ``group`` call this together.

    Raises OSError in each of them if one could not write.
    """
    writer = dcp.HuggingFaceStorageWriter(str(stem), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        reasons = "; ".join(f"process {rank}: {e[0]}" for rank, e in error.failures.items())
        raise OSError(f"{stem}: {reasons}") from error


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""By their names in safetensors files."""


def _shape_text(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


class SavedTensors:
    """The tensors that were written at ``stem``, in either form; ``shapes`` has the whole shape and
    the type of each by name.

    Raises CheckpointError where there are none or they cannot be read.
    """

    def __init__(self, stem: Path) -> None:
        self._stem = stem
        self._in_shards = stem.is_dir() and not self._file.exists()
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        with self._errors():
            if self._in_shards:
                found = dcp.HuggingFaceStorageReader(str(stem)).read_metadata()
                for name, entry in found.state_dict_metadata.items():
                    self.shapes[name] = (entry.size, entry.properties.dtype)
            else:
                open_file(self._file).close()
                with safe_open(self._file, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118, it is no mapping
                        part = file.get_slice(name)
                        shape, dtype = torch.Size(part.get_shape()), DTYPES[part.get_dtype()]
                        self.shapes[name] = (shape, dtype)

    @property
    def _file(self) -> Path:
        return self._stem.with_name(self._stem.name + SUFFIX)

    def read_into(self, targets: Mapping[str, Tensor], what: str) -> None:
        """Fill ``targets`` by name. Raises CheckpointError, which says of ``what``, where names or
        shapes differ."""
        problems = [f"missing: {name}" for name in sorted(targets.keys() - self.shapes.keys())]
        problems += [f"left over: {name}" for name in sorted(self.shapes.keys() - targets.keys())]
        for name in sorted(targets.keys() & self.shapes.keys()):
            there, here = self.shapes[name], (targets[name].shape, targets[name].dtype)
            if there != here:
                problems.append(
                    f"{name}: {_shape_text(*there)} in the checkpoint, {_shape_text(*here)} here"
                )
        if problems:
            raise CheckpointError(
                f"the checkpoint does not fit the profile's {what}: " + "; ".join(problems[:5])
            )
        with self._errors():
            if not self._in_shards:
                whole = load_file(self._file)
                for name, target in targets.items():
                    fill(target, whole[name])
                return
            with warnings.catch_warnings():
                # That there is one process is so, and need not be said.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(
                    {name: target.detach() for name, target in targets.items()},
                    storage_reader=dcp.HuggingFaceStorageReader(str(self._stem)),
                    # Of whole tensors each process reads what it wants, alone or not.
                    no_dist=not any(map(is_sharded, targets.values())),
                )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except (SafetensorError, CheckpointException, OSError, *MALFORMED) as error:
            raise CheckpointError(f"{self._stem}: {error}") from None
