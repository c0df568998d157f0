"""Event files for TensorBoard, written with TensorBoard's own formats and without TensorFlow."""

# Protobuf makes the names of its modules when they are imported.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from liftplace_jax.host.buckets import listed, local_copy
from liftplace_jax.host.files import replacing, unwritable

_NAME = "events.out.tfevents."


def forget_later(folder: Path, step: int) -> None:
    """Takes later steps out of the event files of a folder, those of a run that was cut off.

    Args:
      folder: where they are, also of a bucket.
      step: the last one that is kept.

    Raises:
      OSError: a file cannot be read or replaced; names it.
    """
    for path in listed(folder):
        if path.name.startswith(_NAME) and path.is_file():
            with local_copy(path) as file:
                content = file.read_bytes()
            kept = _kept(content, step)
            if kept != content:
                with replacing(path) as temporary:
                    temporary.write_bytes(kept)


def _kept(content: bytes, step: int) -> bytes:
    """The records of an event file up to a step; all of it if there are no later ones."""
    records, place, later = [], 0, False
    while place + _AROUND <= len(content):
        size = int.from_bytes(content[place : place + 8], "little")
        record, place = content[place : place + size + _AROUND], place + size + _AROUND
        if len(record) < size + _AROUND:
            break  # it was being written
        try:
            event = event_pb2.Event.FromString(record[12:-4])
        except DecodeError:
            return content  # no file of ours
        if event.step > step:
            later = True
        else:
            records.append(record)
    return b"".join(records) if later else content


_AROUND = 16  # bytes of a record beside its event: length and two checksums


class EventFile:
    """Appends scalars to a new event file, as TensorFlow 2 writes them."""

    def __init__(self, folder: Path, start_step: int):
        """Opens the file.

        Args:
          folder: of this machine.
          start_step: a TensorBoard that is running forgets later steps it has read before.
        """
        started, number = int(time.time()), len(list(folder.glob(f"{_NAME}*")))
        # By name they are read in the order of their making; two may be of the same second.
        name = f"{_NAME}{started}.{number:04d}.{socket.gethostname()}.{os.getpid()}.v2"
        self._path = folder / name
        self._file = self._path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(event_pb2.Event(file_version="brain.Event:2"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(step=start_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers of a step, as float32.

        Raises:
          OSError: the file cannot be written; names it.
        """
        kind = summary_pb2.SummaryMetadata(
            plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="scalars"),
            data_class=summary_pb2.DATA_CLASS_SCALAR,
        )
        summary = summary_pb2.Summary()
        for tag, value in values.items():
            tensor = tensor_pb2.TensorProto(
                dtype=types_pb2.DT_FLOAT, tensor_content=np.float32(value).tobytes()
            )
            summary.value.add(tag=tag, tensor=tensor, metadata=kind)
        self._write(event_pb2.Event(step=step, summary=summary))

    def _write(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        try:
            self._records.write(event.SerializeToString())
        except OSError as error:
            raise unwritable(self._path, error) from error

    def flush(self) -> None:
        """Everything written so far is in the file."""
        try:
            self._records.flush()
        except OSError as error:
            raise unwritable(self._path, error) from error

    def close(self) -> None:
        """Ends the file.

        Raises:
          OSError: its end cannot be written; names it.
        """
        try:
            self._records.close()
        except OSError as error:
            raise unwritable(self._path, error) from error
