"""Any frame of a video file by its number, exactly, whatever the container says."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.complete import check_complete
from byol_jax.sources.decoders import Decoder, open_decoder

# A frame at most so far ahead is decoded up to: seeking costs about half the distance between two
# key frames, which is 12 to 250 frames.
_NEAR = 30


class VideoFile:
    """A video file and the times of its frames.

    The file is decoded once, from its beginning to its end. Nothing else tells how many frames
    there are (a container's count may be estimated, or include frames that are never shown) and
    that all can be decoded. It costs one pass of decoding, where an epoch of training, which seeks
    every frame, costs half a pass for each frame between two key frames.

    Attributes:
      path: of the file.
      max_megapixels: larger frames are refused.
      times: of the frames in the order of their numbers, int64 [N], in the decoder's unit.
      seekable: whether a frame can be told from all others by its time.
    """

    def __init__(self, path: Path, max_megapixels: float):
        """Raises UserError if the file is no video, damaged, or cut short."""
        self.path = path
        self.max_megapixels = max_megapixels
        check_complete(path)
        decoder = open_decoder(path, max_megapixels)
        times = []
        try:
            while (time := decoder.advance()) is not None:
                times.append(time)
        finally:
            decoder.close()
        if not times:
            raise UserError(f'{path} holds no frame. Mend or remove the file.')
        self.times = np.array(times, np.int64)
        self.seekable = decoder.seeks and bool(np.all(np.diff(self.times) > 0))

    def __len__(self) -> int:
        return len(self.times)


class Reader:
    """An open video file, for one thread at a time.

    Attributes:
      file: what is read.
      at: number of the frame decoded last; -1 before the first.
    """

    def __init__(self, file: VideoFile):
        self.file = file
        self.at = -1
        self._decoder: Decoder | None = None

    def read(self, number: int) -> np.ndarray:
        """Frame `number`, counted from 0: uint8 [H, W, 3].

        Frames are counted on from the one decoded last or, after a seek, from one that its time
        identifies, and every time on the way must be the one that the file had when it was first
        decoded. Where that fails the file is decoded from its beginning.

        Raises:
          BadPicture: the file is no longer what it was.
        """
        if not self._reached(number):
            self.close()
            if not self._advance(number):
                raise BadPicture(
                    str(self.file.path),
                    f'has changed since the run began: frame {number} is not where it was',
                    'Restore the file, or start anew.',
                )
        return self._opened().picture()

    def _reached(self, number: int) -> bool:
        """Goes to a frame in the shortest way; False if that cannot be done, or did not work."""
        try:
            if self.at <= number and (number <= self.at + _NEAR or not self.file.seekable):
                return self._advance(number)
            return self.file.seekable and self._sought(number)
        except BadPicture:
            # The file was decoded as a whole, so it may only be impossible to enter it here.
            return False

    def _sought(self, number: int) -> bool:
        times = self.file.times
        self._opened().seek(int(times[number]))
        time = self._opened().advance()
        if time is None:
            return False
        self.at = int(np.searchsorted(times, time))
        return self.at <= number and times[self.at] == time and self._advance(number)

    def _advance(self, number: int) -> bool:
        """Decodes up to a frame; False if any time on the way is not the right one."""
        while self.at < number:
            time = self._opened().advance()
            self.at += 1
            if time != self.file.times[self.at]:
                return False
        return True

    def _opened(self) -> Decoder:
        if self._decoder is None:
            self._decoder = open_decoder(self.file.path, self.file.max_megapixels)
            self.at = -1
        return self._decoder

    def close(self) -> None:
        """Frees file and memory; the next `read` opens the file again, at its beginning."""
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = None
        self.at = -1


class Readers:
    """Readers for many threads, with a bounded number of files open at once."""

    def __init__(self, limit: int):
        """`limit`: readers open at once, at least 1. When all are in use, threads wait."""
        self._limit = limit
        self._slots = threading.Semaphore(limit)
        self._lock = threading.Lock()
        self._idle: list[Reader] = []  # The one used last comes last.
        self._busy = 0

    def read(self, file: VideoFile, number: int) -> np.ndarray:
        """Frame `number` of a file, as `Reader.read` gives it."""
        with self._slots:
            reader = self._take(file, number)
            good = False
            try:
                picture = reader.read(number)
                good = True
            finally:
                if not good:
                    reader.close()
                with self._lock:
                    self._busy -= 1
                    if good:
                        self._idle.append(reader)
        return picture

    def _take(self, file: VideoFile, number: int) -> Reader:
        with self._lock:
            self._busy += 1
            mine = [reader for reader in self._idle if reader.file is file]
            if mine:
                # Of those behind the frame, the nearest.
                best = max(mine, key=lambda reader: (reader.at <= number, reader.at))
                self._idle.remove(best)
                return best
            while len(self._idle) + self._busy > self._limit:
                self._idle.pop(0).close()
            return Reader(file)
