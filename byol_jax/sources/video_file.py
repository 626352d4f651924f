"""Any frame of a video file by its number, exactly, whatever the container says."""

from __future__ import annotations

import abc
import contextlib
import io
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from byol_jax.errors import BadPicture, UserError
from byol_jax.files import not_a_file
from byol_jax.sources.decode import check_pixels, opened, to_rgb

VIDEO_EXTENSIONS = ('.mp4', '.m4v', '.mov', '.mkv', '.webm', '.avi', '.gif')

# Containers that store the time at which each frame is shown. AVI stores none: FFmpeg then makes
# times up, and they depend on where decoding started.
_TIMED = ('.mp4', '.m4v', '.mov', '.mkv', '.webm')

# A file is cut short if its last frame ends this many seconds, and the longest time between two
# frames, before the duration that it declares. The last frame's own duration is not always
# stored, nor that of the last piece of sound (up to 0.1 s).
_SLACK_SECONDS = 0.1

# A frame at most this many frames ahead is reached by decoding, not by seeking: a seek costs about
# half the distance between two key frames, which is 12 to 250 frames.
_NEAR = 30

# What Pillow raises for damaged GIFs.
_DAMAGED_GIF = (OSError, SyntaxError, ValueError, IndexError, struct.error)


class Decoder(abc.ABC):
    """One open video file, decoded frame by frame. For one thread at a time.

    Every method raises BadPicture, with the file's name, if the file is damaged.

    Attributes:
      seeks: whether there is a `seek`.
    """

    seeks = False

    @abc.abstractmethod
    def advance(self) -> int | None:
        """Decodes the next frame in the order in which frames are shown.

        Returns:
          Its time, in a unit that depends on the file; None after the last frame.
        """

    @abc.abstractmethod
    def picture(self) -> np.ndarray:
        """The frame decoded last, turned as the file says: uint8 [H, W, 3], RGB."""

    def scan(self) -> list[int]:
        """Decodes all frames of a file that has just been opened.

        Returns:
          The time of each, as `advance` gives it.

        Raises:
          BadPicture: the file is damaged, or is seen to be cut short.
        """
        times = []
        while (time := self.advance()) is not None:
            times.append(time)
        return times

    def seek(self, time: int) -> None:
        """Makes `advance` go on at some frame near `time`; the time it returns tells which.

        This may fail, and so may decoding from there: indexes in files are not reliable.
        """
        raise NotImplementedError(f'{type(self).__name__} decodes from the beginning only')

    @abc.abstractmethod
    def close(self) -> None:
        """Frees file and memory."""


def open_decoder(path: Path, max_megapixels: float) -> Decoder:
    """Opens a video before its first frame, by PyAV, or by Pillow if it is a GIF.

    PyAV gives the same pixels for GIFs, but takes one that is cut short for a whole one.

    Raises:
      BadPicture: the file cannot be read, or its frames are larger than `max_megapixels`.
    """
    kind = _PillowDecoder if path.suffix.lower() == '.gif' else _PyAvDecoder
    return kind(path, max_megapixels)


class _PyAvDecoder(Decoder):
    def __init__(self, path: Path, max_megapixels: float):
        self._path = path
        self.seeks = path.suffix.lower() in _TIMED
        with self._named():
            try:
                self._container = av.open(os.path.abspath(path))
            except UnicodeDecodeError:
                # A title in an old encoding; PyAV before 19 needs to be told to accept it.
                self._container = av.open(os.path.abspath(path), metadata_errors='replace')
            self._stream = self._container.streams.best('video')
        codec = None if self._stream is None else self._stream.codec_context
        if codec is None:
            raise _damaged(path, 'it holds no video of a known kind')
        check_pixels(str(path), codec.width, codec.height, max_megapixels)
        # Examples are prepared by several threads already; more would only take more memory.
        codec.thread_count = 1
        self._frames = self._decoded(self._container.demux(self._stream))
        self._frame: Any = None

    def _decoded(self, packets: Iterable[Any], *, strict: bool = True) -> Iterator[Any]:
        """The frames of some packets; `strict` refuses frames that FFmpeg marks as damaged."""
        for packet in packets:
            for frame in packet.decode():
                if strict and frame.is_corrupt:
                    raise _damaged(self._path, 'a frame is damaged')
                yield frame
            if packet.is_corrupt:
                raise _damaged(self._path, 'a packet is damaged')

    def advance(self) -> int | None:
        with self._named():
            self._frame = next(self._frames, None)
        return None if self._frame is None else _time(self._frame)

    def picture(self) -> np.ndarray:
        with self._named():
            # Only matters where chroma is scaled.
            picture = self._frame.to_ndarray(format='rgb24', interpolation='BICUBIC')
        # Degrees, anticlockwise.
        return np.ascontiguousarray(np.rot90(picture, round(self._frame.rotation / 90)))

    def scan(self) -> list[int]:
        with self._named():
            self._check_index()
            ends: dict[int, float] = {}
            times = [_time(frame) for frame in self._decoded(self._video_packets(ends))]
        self._check_duration(times, ends)
        return times

    def _check_index(self) -> None:
        """Raises BadPicture if the index (of an MP4, say) lists data behind the file's end."""
        end = max((entry.pos + entry.size for entry in self._stream.index_entries), default=0)
        if end > self._container.size:
            raise _cut_short(
                self._path,
                f'it has {self._container.size:,} bytes, and its index lists frames up to byte '
                f'{end:,}',
            )

    def _video_packets(self, ends: dict[int, float]) -> Iterator[Any]:
        """The video's packets; notes where each of the streams ends, in seconds."""
        for packet in self._container.demux():
            index = packet.stream.index
            if packet.pts is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                ends[index] = max(end, ends.get(index, end))
            if index == self._stream.index:
                yield packet

    def _check_duration(self, times: list[int], ends: dict[int, float]) -> None:
        """Raises BadPicture if the file ends long before the duration that it declares.

        Args:
          times: of the frames.
          ends: seconds at which each stream ends.
        """
        unit = float(self._stream.time_base)
        if self._stream.duration is not None:
            declared, end = self._stream.duration * unit, ends.get(self._stream.index, 0.0)
            if self._container.format.name == 'avi':
                # FFmpeg shortens the duration if the file looks too small for it, but not the
                # number of frames, of which each takes one unit of time.
                declared = max(declared, self._stream.frames * unit)
        elif self._container.duration is not None:
            # That of the longest stream, as Matroska has it.
            declared, end = self._container.duration / av.time_base, max(ends.values(), default=0.0)
        else:
            return
        seconds = unit * np.array(times)
        gap = float(np.diff(seconds).max(initial=0))
        span = end - float(seconds.min(initial=0))
        if declared - span > _SLACK_SECONDS + gap:
            raise _cut_short(
                self._path, f'it ends after {span:.2f} of the {declared:.2f} seconds it declares'
            )

    def seek(self, time: int) -> None:
        with self._named():
            self._container.seek(time, stream=self._stream)
        # The first frames after a seek may refer to frames before it. They are not shown.
        self._frames = self._decoded(self._container.demux(self._stream), strict=False)

    def close(self) -> None:
        self._container.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except av.error.FFmpegError as error:
            raise _damaged(self._path, error.strerror) from error


def _time(frame: Any) -> int:
    return -1 if frame.pts is None else frame.pts


class _PillowDecoder(Decoder):
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


def _damaged(path: Path, what: str) -> BadPicture:
    what = ' '.join(what.split()).rstrip('.')
    return BadPicture(str(path), f'cannot be decoded: {what}', 'Mend or remove the file.')


def _cut_short(path: Path, what: str) -> BadPicture:
    return BadPicture(str(path), f'is cut short: {what}', 'Fetch or make it again, or remove it.')


class VideoFile:
    """A video file and the times of its frames.

    The file is decoded once, from its beginning to its end. This is the only way to know how many
    frames there are (a container's count may be an estimate, or include frames that are never
    shown) and that all can be decoded. It costs one pass of decoding; an epoch of training, which
    seeks every frame, costs many.

    Attributes:
      path: of the file.
      max_megapixels: larger frames are refused.
      times: of the frames in the order of their numbers, int64 [N], in the decoder's unit.
      seekable: whether each frame has a time of its own, so that it can be found by it.
    """

    def __init__(self, path: Path, max_megapixels: float):
        """Decodes the file once.

        Args:
          path: of the file.
          max_megapixels: larger frames are refused.

        Raises:
          UserError: the file is no video, damaged, or cut short.
        """
        self.path = path
        self.max_megapixels = max_megapixels
        _check_file(path)
        decoder = open_decoder(path, max_megapixels)
        try:
            self.times = np.array(decoder.scan(), np.int64)
        finally:
            decoder.close()
        if not len(self.times):
            raise UserError(f'{path} holds no frame. Mend or remove the file.')
        self.seekable = decoder.seeks and bool(np.all(np.diff(self.times) > 0))

    def __len__(self) -> int:
        return len(self.times)


def _check_file(path: Path) -> None:
    """Raises UserError for what is not a file: the reader of a pipe, say, waits for a writer."""
    try:
        what = not_a_file(path.stat())
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}.') from error
    if what:
        raise UserError(f'{path} is no file but {what}. Remove it.')


class Reader:
    """An open video file that reads any frame. For one thread at a time.

    Attributes:
      file: what is read.
      at: number of the frame decoded last; -1 before the first.
    """

    def __init__(self, file: VideoFile):
        self.file = file
        self.at = -1
        self._decoder: Decoder | None = None

    def read(self, number: int) -> np.ndarray:
        """Reads one frame.

        Frames are counted on from the one decoded last or, after a seek, from one that its time
        identifies. Every time on the way is compared with the one the file had at first. Where
        that fails, the file is decoded from its beginning.

        Args:
          number: of the frame, from 0.

        Returns:
          uint8 [H, W, 3].

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
        """Goes to a frame by decoding on or seeking; False if that is impossible or failed."""
        try:
            if self.at <= number and (number <= self.at + _NEAR or not self.file.seekable):
                return self._advance(number)
            return self.file.seekable and self._sought(number)
        except BadPicture:
            # The whole file was decoded before, so perhaps only this place cannot be started from.
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
        """Opens nothing yet.

        Args:
          limit: readers open at once, at least 1. When all are in use, threads wait.
        """
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
                # The nearest that needs no seeking back.
                best = max(mine, key=lambda reader: (reader.at <= number, reader.at))
                self._idle.remove(best)
                return best
            while len(self._idle) + self._busy > self._limit:
                self._idle.pop(0).close()
            return Reader(file)
