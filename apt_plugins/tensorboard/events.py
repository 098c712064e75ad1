"""Writes the event files that TensorBoard reads.

The files are written here and not by tensorboard's own writer, which has a thread of its own and
loses what its disk does not take without a word.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from apt_plugins.tracking.histograms import Histogram

PREFIX = "events.out.tfevents."


class EventFile:
    """A new file in ``folder``, after those that are there. With ``begins_at``, what they have of
    that step and later ones does not count any more.

    Every method that writes may raise OSError; what was written before is whole.
    """

    def __init__(self, folder: Path, begins_at: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _new_file(folder)
        self.path = Path(self._file.name)
        self._write(event_pb2.Event(file_version="brain.Event:2"))
        if begins_at is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(step=begins_at, session_log=start))

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Write numbers, which TensorBoard keeps in fp32."""
        value = summary_pb2.Summary.Value
        self._summary(step, [value(tag=tag, simple_value=x) for tag, x in figures.items()])

    def text(self, step: int, tag: str, text: str) -> None:
        """Write a text, which TensorBoard shows as Markdown."""
        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING, string_val=[text.encode("utf-8", errors="replace")]
        )
        tensor.tensor_shape.dim.add(size=1)
        metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
        value = summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._summary(step, [value])

    def histograms(self, step: int, histograms: list[Histogram]) -> None:
        self._summary(
            step,
            [
                summary_pb2.Summary.Value(
                    tag=each.name,
                    histo=summary_pb2.HistogramProto(
                        min=each.edges[0],
                        max=each.edges[-1],
                        num=sum(each.counts),
                        sum=each.total,
                        sum_squares=each.squares,
                        bucket_limit=each.edges[1:],
                        bucket=each.counts,
                    ),
                )
                for each in histograms
            ],
        )

    def close(self) -> None:
        self._file.close()

    def _summary(self, step: int, values: list[Any]) -> None:
        if values:
            self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=values)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        data, at = record.getbuffer(), os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(data) < len(data):
                raise OSError(f"{self.path} takes no more")
        except OSError:
            os.truncate(self._file.fileno(), at)  # a reader stops at half of a record
            raise


def _new_file(folder: Path) -> io.FileIO:
    """TensorBoard reads the files of a folder by their names, in which it expects the time."""
    times = [path.name.removeprefix(PREFIX).partition(".")[0] for path in folder.glob(f"{PREFIX}*")]
    last = max((int(text) for text in times if text.isdigit()), default=0)
    for seconds in itertools.count(max(int(time.time()), last + 1)):
        name = f"{PREFIX}{seconds:010d}.{socket.gethostname()}.{os.getpid()}.0"
        try:
            # Appended to: what is cut off by _write leaves no hole.
            return io.FileIO(folder / name, "ab", opener=_only_new)
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def _only_new(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL, 0o644)
