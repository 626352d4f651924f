"""One video file: any frame by its number, exactly, whatever the container says."""

from __future__ import annotations

import abc
import contextlib
import io
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.complete import check_complete
from byol_jax.sources.decode import check_pixels, opened, to_rgb

# What FFmpeg says of a damaged file goes to stderr; what is wrong is said here, once. -8 is
# AV_LOG_QUIET, and OpenCV reads the variable when it opens its first video.
os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')

VIDEO_EXTENSIONS = ('.mp4', '.m4v', '.mov', '.mkv', '.webm', '.avi', '.gif')

# Containers that hold a time of presentation for every frame. AVI holds none: what a decoder makes
# up in its place depends on where it started.
_TIMED = ('.mp4', '.m4v', '.mov', '.mkv', '.webm')

# OpenCV stops at damaged data as it does at the end, but can go on behind it; so many packets are
# tried before it counts as the end.
_TRIES = 64

# What Pillow raises for damaged GIFs.
_DAMAGED_GIF = (OSError, SyntaxError, ValueError, IndexError, struct.error)


class Decoder(abc.ABC):
    """One open video file, for one thread at a time.

    All that a file can be wrong in raises a BadPicture that names it.

    Attributes:
      seeks: whether there is a `seek`.
    """

    seeks = False

    @abc.abstractmethod
    def advance(self) -> int | None:
        """Decodes the next frame to be shown.

        Returns:
          Its time, in a unit that the kind of decoder and the file decide; None behind the last.
        """

    @abc.abstractmethod
    def picture(self) -> np.ndarray:
        """The frame decoded last, turned as the file says: uint8 [H, W, 3], RGB."""

    def seek(self, time: int) -> None:
        """Makes `advance` go on at a frame near `time`; which one, its time will tell.

        Containers err, so this may fail, and so may the decoding of the frames from there.
        """
        raise NotImplementedError(f'{type(self).__name__} decodes from the beginning only')

    @abc.abstractmethod
    def close(self) -> None:
        """Frees file and memory."""


def open_decoder(path: Path, max_megapixels: float) -> Decoder:
    """Opens a video at its beginning, before the first frame.

    Pillow decodes GIFs; all else is decoded by PyAV where it is installed, and by OpenCV where it
    is not. Both are FFmpeg and give the same 8-bit frames; PyAV decodes more (AV1, say) and hides
    no damage.

    Raises:
      BadPicture: the file cannot be read, or its frames are larger than `max_megapixels`.
    """
    if path.suffix.lower() == '.gif':
        return _Pillow(path, max_megapixels)
    av = _pyav()
    return _OpenCv(path, max_megapixels) if av is None else _PyAv(av, path, max_megapixels)


class _PyAv(Decoder):
    def __init__(self, av: Any, path: Path, max_megapixels: float):
        self._av, self._path = av, path
        self.seeks = path.suffix.lower() in _TIMED
        with self._named():
            try:
                self._container = av.open(os.path.abspath(path))
            except UnicodeDecodeError:
                # A title in an old encoding, which PyAV before 19 does not take by itself.
                self._container = av.open(os.path.abspath(path), metadata_errors='replace')
            self._stream = self._container.streams.best('video')
        codec = None if self._stream is None else self._stream.codec_context
        if codec is None:
            raise _damaged(path, 'it holds no video of a known kind')
        check_pixels(str(path), codec.width, codec.height, max_megapixels)
        # Examples are prepared in parallel already, and every thread has its own frames in memory.
        codec.thread_count = 1
        self._frames = self._decoded(strict=True)
        self._frame: Any = None

    def _decoded(self, strict: bool) -> Iterator[Any]:
        """Frames from here on; `strict` refuses those that the decoder had to make up."""
        for packet in self._container.demux(self._stream):
            for frame in packet.decode():
                if strict and frame.is_corrupt:
                    raise _damaged(self._path, 'a frame is damaged')
                yield frame
            if packet.is_corrupt:
                raise _damaged(self._path, 'a packet is damaged')

    def advance(self) -> int | None:
        with self._named():
            self._frame = next(self._frames, None)
        if self._frame is None:
            return None
        return -1 if self._frame.pts is None else self._frame.pts

    def picture(self) -> np.ndarray:
        with self._named():
            # OpenCV's choice: where no scaling is needed both convert to the same bits.
            picture = self._frame.to_ndarray(format='rgb24', interpolation='BICUBIC')
        # Degrees, anticlockwise.
        return np.ascontiguousarray(np.rot90(picture, round(self._frame.rotation / 90)))

    def seek(self, time: int) -> None:
        with self._named():
            self._container.seek(time, stream=self._stream)
        # Frames before the one sought may lack what they build on.
        self._frames = self._decoded(strict=False)

    def close(self) -> None:
        self._container.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except self._av.error.FFmpegError as error:
            raise _damaged(self._path, error.strerror) from error


class _OpenCv(Decoder):
    def __init__(self, path: Path, max_megapixels: float):
        self._path = path
        self.seeks = path.suffix.lower() in _TIMED
        self._capture = cv2.VideoCapture(
            os.path.abspath(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]
        )
        if not self._capture.isOpened():
            raise _damaged(path, 'OpenCV cannot open it', _MORE_CODECS)
        sides = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        width, height = (int(self._capture.get(side)) for side in sides)
        check_pixels(str(path), width, height, max_megapixels)
        # The default before OpenCV 5 leaves frames as they lie in the file.
        self._capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        self._any = False

    def advance(self) -> int | None:
        if not self._capture.grab():
            if any(self._capture.grab() for _ in range(_TRIES)):
                raise _damaged(self._path, 'a frame is damaged')
            if not self._any:
                raise _damaged(self._path, 'OpenCV finds no frame', _MORE_CODECS)
            return None
        self._any = True
        # Milliseconds, as a fraction, from the start.
        return round(1000 * self._capture.get(cv2.CAP_PROP_POS_MSEC))

    def picture(self) -> np.ndarray:
        found, picture = self._capture.retrieve()
        if not found:
            raise _damaged(self._path, 'a frame is damaged')
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)

    def seek(self, time: int) -> None:
        self._capture.set(cv2.CAP_PROP_POS_MSEC, time / 1000)

    def close(self) -> None:
        self._capture.release()


class _Pillow(Decoder):
    def __init__(self, path: Path, max_megapixels: float):
        self._path = path
        self._number = -1
        with self._named():
            data = io.BytesIO(path.read_bytes())
            self._image: Image.Image = opened(data, str(path), max_megapixels)

    def advance(self) -> int | None:
        self._number += 1
        try:
            with self._named():
                self._image.seek(self._number)
                self._image.load()
        except EOFError:
            return None
        return self._number

    def picture(self) -> np.ndarray:
        return np.asarray(to_rgb(self._image))

    def close(self) -> None:
        self._image.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGED_GIF as error:
            raise _damaged(self._path, str(error)) from error


def _pyav() -> Any:
    """PyAV, or None where it is not installed."""
    try:
        import av
    except ModuleNotFoundError:
        return None
    return av


def _damaged(path: Path, what: str, more: str = '') -> BadPicture:
    what = ' '.join(what.split()).rstrip('.')
    return BadPicture(str(path), f'cannot be decoded: {what}', f'Mend or remove the file.{more}')


_MORE_CODECS = ' If other programs play it, PyAV may decode it: pip install av.'


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
