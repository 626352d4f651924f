"""TensorBoard's events read back: whether they still hold what metrics.jsonl does."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from byol_jax.app.hosts import say
from byol_jax.files import not_a_file, set_aside

# Longer records hold pictures; their checksums, which Python takes long for, are not looked at.
_CHECKED = 4096


def lost_events(folder: Path, records: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The records to write as events again: all of them if those of some are gone, else none.

    What is left of the events is then kept beside `folder`, and a line says so.

    Args:
      folder: with the event files; it need not be there.
      records: of metrics.jsonl, which should have events.
    """
    lost = steps_without_events(folder, [record['step'] for record in records])
    if not lost:
        return ()
    words = f'{folder} lacks {len(lost):,} of {len(records):,} records; they are written again'
    try:
        if folder.is_dir() and any(folder.iterdir()):
            words += f', and what was there is kept as {set_aside(folder).name}'
    except OSError as error:
        words += f'; what is there stays: {error.strerror or error}'
    say(words)
    return records


def steps_without_events(folder: Path, steps: Iterable[int]) -> list[int]:
    """The steps of which no scalar can be read from the event files of a folder.

    Args:
      folder: with the event files; it need not be there.
      steps: of the records that should have events.
    """
    # Imported late, because reading metrics does not need it.
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    found: set[int] = set()
    for path in sorted(folder.glob('*tfevents*')) if folder.is_dir() else ():
        try:
            # Opening a pipe would wait for ever.
            if not_a_file(path.stat()):
                continue
            for data in _records(path):
                event = Event.FromString(data)
                if any(value.HasField('simple_value') for value in event.summary.value):
                    found.add(event.step)
        except (OSError, DecodeError):
            # TensorBoard too reads a file up to its damage.
            continue
    return [step for step in steps if step not in found]


def _records(path: Path) -> Iterator[bytes]:
    """The TFRecords (length, checksum, data, checksum) of a file, up to the first damaged one."""
    from tensorboardX.record_writer import masked_crc32c

    with path.open('rb') as file:
        while len(head := file.read(12)) == 12:
            length, checksum = struct.unpack('<QI', head)
            if masked_crc32c(head[:8]) != checksum:
                return
            data, tail = file.read(length), file.read(4)
            if len(data) < length or len(tail) < 4:
                return
            if length <= _CHECKED and masked_crc32c(data) != struct.unpack('<I', tail)[0]:
                return
            yield data
