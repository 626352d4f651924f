"""The hook for bad files: logs them, lists them in bad_files.txt and limits their number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from byol_jax.app.build import Run
from byol_jax.app.hooks import Event, Hook
from byol_jax.app.hosts import gather_texts, is_main, say
from byol_jax.app.side_files import SideFile
from byol_jax.errors import UserError, printable
from byol_jax.settings import Settings
from byol_jax.sources.bad_files import SHOWN, BadFile, BadFiles, still_bad
from byol_jax.sources.data import Data
from byol_jax.training.state import TrainState


class BadFilesLog(Hook):
    """Names bad files as they are found, lists them, and ends the run if there are too many.

    Each line of `workdir/bad_files.txt` is the name of a bad file, a tab, and what is wrong with
    it. A line is appended as soon as a bad file is found, so that a kill loses none; the lines are
    sorted when the run starts and ends. Without bad files there is no such list. Only process 0
    writes and prints.
    """

    optional = False
    everywhere = True

    def __init__(self, data: Data, config: Settings, workdir: Path):
        """Counts the bad pictures known so far; reads and writes nothing yet.

        Args:
          data: data of the run. Bad pictures that it leaves out are counted.
          config: the run's settings; data.pair_keys and data.max_bad_fraction are used.
          workdir: the workdir of the run.

        Raises:
          UserError: more pictures are left out than data.max_bad_fraction allows.
        """
        self._data = data
        self._keys = config.data.pair_keys
        self.bad_files = BadFiles(data.train, self._keys[0], config.data.max_bad_fraction, data.bad)
        self.bad_files.check()
        self._file = SideFile(workdir / 'bad_files.txt')
        self.path = self._file.path
        # How many bad files were sent to other processes, written to the list, and mentioned in
        # the log.
        self._shared = self._written = self._counted = len(self.bad_files)
        self._named = 0
        # Bad files of the held-out part and the test set are listed, but do not count towards the
        # limit.
        self._elsewhere: list[BadFile] = []

    def start(self, run: Run, state: TrainState) -> None:
        if is_main():
            self.open()

    def measure(self, event: Event) -> Mapping[str, float]:
        """Returns 'bad_files', the number found so far by all processes."""
        self.note_all()
        return {'bad_files': len(self.bad_files)}

    def logged(self, event: Event) -> None:
        """Ends the run if there are more bad files than allowed."""
        try:
            self.bad_files.check()
        except UserError as error:
            # All processes have the same count, so all stop at this step.
            event.stop(error=error)

    def finish(self, event: Event) -> None:
        self.close()

    def add(self, found: Iterable[BadFile]) -> None:
        """Adds bad files that something else found, such as the evaluation, and writes the list."""
        self.bad_files.add(found)
        self.close()

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Passes batches on, and logs the bad files that were found while each was made."""
        for batch in batches:
            self.note()
            yield batch

    def open(self) -> None:
        """Reads the files again that an earlier start listed, and drops repaired ones."""
        listed = _read(self.path)
        # Files that the data left out belong to no part of it, so they cannot be read again.
        found = [bad for bad in self._data.bad if bad.file in listed]
        found += still_bad(self._data.train, self._keys, listed - _files(found))
        self.bad_files.add(found)
        self._elsewhere = self._bad_elsewhere(listed - _files(found))
        found += self._elsewhere
        # `_shared` stays as it is: the other processes have not read the list.
        self._written = self._counted = len(self.bad_files)
        self._write()
        if listed:
            say(f'{len(found):,} of {len(listed):,} files in {self.path} still cannot be read')

    def _bad_elsewhere(self, listed: set[str]) -> list[BadFile]:
        """Listed files that belong to no training picture and still cannot be read."""
        found, parts = [], [self._data.held_out]
        if self._data.test is not None:
            found += [bad for bad in self._data.test.bad if bad.file in listed]
            parts.append(self._data.test.train)
        for part in parts:
            found += still_bad(part, self._keys, listed - _files(found))
        return found

    def note(self) -> None:
        """Appends the bad files found since the last call to the list, and logs the first few."""
        new = self.bad_files.since(self._written)
        self._written = len(self.bad_files)
        if not new or not is_main():
            return
        self._file.append(b''.join(map(_line, new)))
        for bad in new[: SHOWN - self._named]:
            say(f'bad file: {printable(bad.file)} {bad.reason}')
            self._named += 1
            self._counted += 1

    def note_all(self) -> None:
        """Like `note`, for the bad files of all processes; also logs how many were not named.

        Every process must call this at the same point.
        """
        for text in gather_texts(json.dumps(self.bad_files.since(self._shared))):
            self.bad_files.add(BadFile(*entry) for entry in json.loads(text))
        self._shared = len(self.bad_files)
        self.note()
        self._count()

    def close(self) -> None:
        """Writes the whole list, sorted."""
        self.note()
        self._count()
        self._write()

    def _count(self) -> None:
        more = len(self.bad_files) - self._counted
        self._counted = len(self.bad_files)
        if more:
            say(f'{more:,} more bad file(s), {len(self.bad_files):,} in all: {self.path}')

    def _write(self) -> None:
        if not is_main():
            return
        # By name, because evaluation may have found a listed file again.
        bad = {bad.file: bad for bad in (*self._elsewhere, *self.bad_files.since(0))}
        if not bad:
            self._file.remove()
            return
        data = b''.join(sorted(map(_line, bad.values())))
        self._file.replace(lambda partial: partial.write_bytes(data))


def _files(bad: list[BadFile]) -> set[str]:
    return {entry.file for entry in bad}


def _line(bad: BadFile) -> bytes:
    line = f'{_one_line(bad.file)}\t{_one_line(bad.reason)}\n'
    return line.encode(errors='surrogateescape')


def _one_line(text: str) -> str:
    """The text with its control characters escaped."""
    return ''.join(c if c >= ' ' else f'\\x{ord(c):02x}' for c in text)


def _read(path: Path) -> set[str]:
    """The names of the listed files, without a last line that a kill cut off."""
    if not path.exists():
        return set()
    text = path.read_text(encoding='utf-8', errors='surrogateescape')
    lines = text.split('\n')[:-1]
    return {line.split('\t')[0] for line in lines}
