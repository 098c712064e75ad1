"""What a token store is on disk: its files, its manifest, and how both are checked.

``store.json`` is the manifest. Each part, ``train`` and ``val``, has shards of whole documents, and
a shard has up to three files: ``train-00000.ids`` (little-endian, of the store's type), ``.ends``
(uint64: where each document ends, in tokens from the start of the shard) and ``.learned`` (one bit
a token, the least first; only where something is not learned).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from apt_core.errors import AptError
from apt_core.files import open_file, read_file, write_atomically
from apt_core.json_files import parse_json, read_json
from apt_core.log import get_logger
from apt_core.sections import Section

log = get_logger("apt.data")

FORMAT = 2
"""The version of all this. A store of another one is built anew."""

MANIFEST = "store.json"
CHECKED = "checked.json"
"""The size, time and inode of each file when its content was last compared with the manifest."""

MAX_MANIFEST = 16 << 20

SHARD_TOKENS = 1 << 25
"""The most tokens of a shard, unless a single document has more."""

FIRST_SHARD_TOKENS = 1 << 20
"""Those of the first one. Each has twice as many as the one before, so that a run may begin soon
without making many small files."""

BLOCK = 1 << 22

Suffix = Literal["ids", "ends", "learned"]
PartName = Literal["train", "val"]
PARTS: tuple[PartName, ...] = ("train", "val")

Number = Annotated[int, Field(ge=0, lt=2**60)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StoreError(AptError):
    """A token store cannot be made or read."""


class DamagedStoreError(StoreError):
    """A token store is not what its manifest says, or has none."""


class ShardRow(Section):
    """A shard in the manifest: its sizes, and the sha256 of each of its files by suffix."""

    tokens: Number
    documents: Number
    marked: bool
    sha256: dict[Suffix, Hash]


class PartRow(Section):
    """A part in the manifest. ``bytes`` counts the UTF-8 of the text that is learned, ``learned``
    its tokens; the hashes are of all its ids and of what all its documents say."""

    tokens: Number
    documents: Number
    learned: Number
    bytes: Number
    tokens_sha256: Hash
    documents_sha256: Hash
    shards: list[ShardRow]


class Begun(Section):
    """What of the part ``val`` was held out when a shard of ``train`` was first published: what
    runs evaluate on that begin then. ``train_sha256`` is the hash of the ids to train on until
    then, the others are of the ids that were held out and of what their documents say."""

    tokens: Number
    documents: Number
    learned: Number
    bytes: Number
    tokens_sha256: Hash
    documents_sha256: Hash
    train_sha256: Hash


class StoreManifest(Section):
    """``store.json``. ``counts`` says what each step of the pipeline did to how many documents.
    ``begun`` is None where no shard was whole before the end.
    ``sample`` is the beginning of a text, and ``sample_sha256`` the hash of its ids, by which a
    tokenizer is known that has the same fingerprint and makes other ids."""

    format: int
    key: str
    source: str
    tokenizer: str
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    dtype: Literal["uint8", "uint16", "uint32"]
    settings: dict[str, Any]
    sample: str = ""
    sample_sha256: str = ""
    counts: dict[str, Number]
    parts: dict[PartName, PartRow]
    begun: Begun | None = None


def cut_row(row: PartRow, begun: Begun) -> PartRow:
    """The row of the part of ``row`` that was there when training could begin."""
    tokens, documents, shards = begun.tokens, begun.documents, []
    for shard in row.shards:
        kept = {"tokens": min(tokens, shard.tokens), "documents": min(documents, shard.documents)}
        if kept["tokens"]:
            shards.append(shard.model_copy(update=kept))
        tokens, documents = tokens - kept["tokens"], documents - kept["documents"]
    known = begun.model_dump(exclude={"train_sha256"})
    return PartRow(**known, shards=shards)


def shard_tokens(number: int) -> int:
    """The most tokens of a shard, by its number from 0, unless a single document has more."""
    return min(SHARD_TOKENS, FIRST_SHARD_TOKENS << min(number, 32))


def write_manifest(folder: Path, manifest: StoreManifest) -> None:
    """Write the manifest of a store whose files are all there. Raises OSError."""
    content = manifest.model_dump(mode="json")
    text = json.dumps({**content, "sha256": _hash_of(content)}, indent=1, ensure_ascii=False)
    write_atomically(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path) -> StoreManifest:
    """The manifest of a store, in accordance with itself. Raises DamagedStoreError."""
    try:
        content = parse_json(read_file(folder / MANIFEST, MAX_MANIFEST).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedStoreError(f"{MANIFEST} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DamagedStoreError(f"{MANIFEST} holds no mapping")
    if content.get("format") != FORMAT:
        raise DamagedStoreError(f"it is of version {content.get('format')!r}, not {FORMAT}")
    if content.pop("sha256", None) != _hash_of(content):
        raise DamagedStoreError(f"{MANIFEST} does not match its own hash")
    try:
        manifest = StoreManifest.model_validate(content)
    except ValidationError as error:
        raise DamagedStoreError(f"{MANIFEST}: {error.errors()[0]['msg']}") from None
    for name in PARTS:
        part = manifest.parts.get(name)
        if part is None:
            raise DamagedStoreError(f"{MANIFEST} has no part {name!r}")
        for field in ("tokens", "documents"):
            if getattr(part, field) != sum(getattr(shard, field) for shard in part.shards):
                raise DamagedStoreError(f"the {field} of {name} are not those of its shards")
    return manifest


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_name(part: str, shard: int, suffix: str) -> str:
    """The name of a file of a shard."""
    return f"{part}-{shard:05d}.{suffix}"


def item_size(manifest: StoreManifest) -> int:
    """The bytes of an id."""
    return {"uint8": 1, "uint16": 2, "uint32": 4}[manifest.dtype]


def files_of(manifest: StoreManifest) -> Iterator[tuple[str, int, str]]:
    """Each file of a store: its name, size in bytes and sha256. Raises DamagedStoreError where the
    manifest has no hash of one."""
    for part, row in manifest.parts.items():
        for number, shard in enumerate(row.shards):
            sizes: dict[Suffix, int] = {
                "ids": shard.tokens * item_size(manifest),
                "ends": shard.documents * 8,
            }
            if shard.marked:
                sizes["learned"] = -(-shard.tokens // 8)
            if sizes.keys() != shard.sha256.keys():
                raise DamagedStoreError(f"{MANIFEST} names other files of {part}-{number:05d}")
            for suffix, size in sizes.items():
                yield file_name(part, number, suffix), size, shard.sha256[suffix]


def check_files(folder: Path, manifest: StoreManifest) -> None:
    """Compare the files of a store with its manifest: their sizes, and their content where a file
    has changed since that was last done. Raises DamagedStoreError, which names the first file."""
    known = _checked_before(folder)
    now: dict[str, list[int]] = {}
    for name, size, sha256 in files_of(manifest):
        try:
            status = os.lstat(folder / name)
        except OSError as error:
            raise DamagedStoreError(f"{name}: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise DamagedStoreError(f"{name} is not a file")
        if status.st_size != size:
            raise DamagedStoreError(f"{name} has {status.st_size:,} bytes, not {size:,}")
        now[name] = [status.st_size, status.st_mtime_ns, status.st_ino]
        if known.get(name) != now[name]:
            _check_content(folder / name, sha256, manifest)
    if now != known:
        note_checked(folder, now)


def note_checked(folder: Path, files: dict[str, list[int]] | None = None) -> None:
    """Keep that the content of the files is right; by default of all that are in the folder."""
    if files is None:
        files = {}
        for path in folder.iterdir():
            status = path.lstat()
            if path.suffix in (".ids", ".ends", ".learned"):
                files[path.name] = [status.st_size, status.st_mtime_ns, status.st_ino]
    # A folder that is only read is checked each time.
    with suppress(OSError):
        write_atomically(folder / CHECKED, json.dumps(files))


def _checked_before(folder: Path) -> dict[str, Any]:
    try:
        found = read_json(folder / CHECKED)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_content(path: Path, sha256: str, manifest: StoreManifest) -> None:
    import numpy as np

    digest = hashlib.sha256()
    last = 0
    try:
        with open_file(path) as file:
            while block := file.read(BLOCK):
                digest.update(block)
                if path.suffix == ".ids":
                    ids = np.frombuffer(block, np.dtype(manifest.dtype).newbyteorder("<"))
                    if int(ids.max()) >= manifest.vocab_size:
                        raise DamagedStoreError(f"{path.name} has ids beyond the vocabulary")
                elif path.suffix == ".ends":
                    ends = np.frombuffer(block, "<u8")
                    if int(ends[0]) < last or np.any(ends[1:] < ends[:-1]):
                        raise DamagedStoreError(f"{path.name}: documents end before they begin")
                    last = int(ends[-1])
    except OSError as error:
        raise DamagedStoreError(f"{path.name}: {error.strerror or error}") from None
    if digest.hexdigest() != sha256:
        raise DamagedStoreError(f"{path.name} does not match its hash")
