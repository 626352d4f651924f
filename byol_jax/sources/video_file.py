"""Reads any frame of a video file by its number, without relying on the container's index."""

from __future__ import annotations

import abc
import io
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from byol_jax.errors import BadPicture, UserError
from byol_jax.files import not_a_file
from byol_jax.sources.decode import check_pixels, decoding, opened, to_rgb

VIDEO_EXTENSIONS = ('.mp4', '.m4v', '.mov', '.mkv', '.webm', '.avi', '.gif')

# Containers that store the time at which each frame is shown. AVI stores none: FFmpeg makes times
# up, which depend on where decoding started.
_TIMED = ('.mp4', '.m4v', '.mov', '.mkv', '.webm')

# A file counts as cut short if it ends earlier than the duration that it declares by more than this
# time plus the longest time between two frames: some files do not store the duration of the last
# frame, nor that of the last piece of sound (up to 0.1 s).
_SLACK_SECONDS = 0.1

# A frame at most this many frames ahead is reached by decoding instead of seeking: a seek decodes
# about half the distance between two key frames, which is 12 to 250 frames.
_NEAR = 30


class Decoder(abc.ABC):
    """One open video file, decoded frame by frame. Not thread-safe.

    Every method raises BadPicture, with the file's name, if the file is damaged.

    Attributes:
      seeks: whether `seek` is implemented.
    """

    seeks = False

    @abc.abstractmethod
    def advance(self) -> int | None:
        """Decodes the next frame in the order in which frames are shown.

        Returns:
          The frame's time, in a unit that depends on the file; None after the last frame.
        """

    @abc.abstractmethod
    def picture(self) -> np.ndarray:
        """The frame decoded last, rotated as the file says: uint8 [H, W, 3], RGB."""

    def scan(self) -> list[int]:
        """Decodes all frames of a file that has just been opened.

        Returns:
          The time of each frame, in the unit of `advance`.

        Raises:
          BadPicture: the file is damaged or cut short.
        """
        times = []
        while (time := self.advance()) is not None:
            times.append(time)
        return times

    def seek(self, time: int) -> None:
        """Continues at some frame near `time`; the time that `advance` returns tells which.

        This may fail, and so may decoding from there: the indexes in files are not reliable.
        """
        raise NotImplementedError(f'{type(self).__name__} decodes from the beginning only')

    @abc.abstractmethod
    def close(self) -> None:
        """Frees file and memory."""


def open_decoder(path: Path, max_megapixels: float) -> Decoder:
    """Opens a video file before its first frame: with Pillow if it is a GIF, else with PyAV.

    PyAV gives the same pixels for GIFs, but does not notice that one is cut short.

    Args:
      path: path of the video file.
      max_megapixels: larger frames are refused.

    Raises:
      BadPicture: the file cannot be read, or its frames are larger than `max_megapixels`.
    """
    kind = _PillowDecoder if path.suffix.lower() == '.gif' else _PyAvDecoder
    return kind(path, max_megapixels)


class _PyAvDecoder(Decoder):
    def __init__(self, path: Path, max_megapixels: float):
        self._path = path
        self.seeks = path.suffix.lower() in _TIMED
        with decoding(str(self._path)):
            try:
                self._container = av.open(os.path.abspath(path))
            except UnicodeDecodeError:
                # The file has a title in an old encoding, which PyAV before 19 refuses by default.
                self._container = av.open(os.path.abspath(path), metadata_errors='replace')
            self._stream = self._container.streams.best('video')
        codec = None if self._stream is None else self._stream.codec_context
        if codec is None:
            raise BadPicture(
                str(path), 'holds no video of a known kind', 'Convert it, or leave it out.'
            )
        check_pixels(str(path), codec.width, codec.height, max_megapixels)
        # Several threads prepare examples already; more would only take more memory.
        codec.thread_count = 1
        self._frames = self._decoded(self._container.demux(self._stream))
        self._frame: Any = None

    def _decoded(self, packets: Iterable[Any], *, strict: bool = True) -> Iterator[Any]:
        """Decodes the frames of packets; `strict` refuses frames that FFmpeg marks as damaged."""
        for packet in packets:
            for frame in packet.decode():
                if strict and frame.is_corrupt:
                    raise _damaged(self._path, 'a frame is damaged')
                yield frame
            if packet.is_corrupt:
                raise _damaged(self._path, 'a packet is damaged')

    def advance(self) -> int | None:
        with decoding(str(self._path)):
            self._frame = next(self._frames, None)
        return None if self._frame is None else _time(self._frame)

    def picture(self) -> np.ndarray:
        with decoding(str(self._path)):
            # The interpolation only affects subsampled chroma.
            picture = self._frame.to_ndarray(format='rgb24', interpolation='BICUBIC')
        # `rotation` is in degrees, anticlockwise.
        return np.ascontiguousarray(np.rot90(picture, round(self._frame.rotation / 90)))

    def scan(self) -> list[int]:
        with decoding(str(self._path)):
            self._check_index()
            ends: dict[int, float] = {}
            times = [_time(frame) for frame in self._decoded(self._video_packets(ends))]
        self._check_duration(times, ends)
        return times

    def _check_index(self) -> None:
        """Raises BadPicture if the file's index (MP4 has one) lists data behind the file's end."""
        end = max((entry.pos + entry.size for entry in self._stream.index_entries), default=0)
        if end > self._container.size:
            raise _cut_short(
                self._path,
                f'it has {self._container.size:,} bytes, and its index lists frames up to byte '
                f'{end:,}',
            )

    def _video_packets(self, ends: dict[int, float]) -> Iterator[Any]:
        """Yields the video's packets; sets `ends` to the end of each stream, seconds."""
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
          times: time of each frame, in the stream's unit.
          ends: end of each stream, seconds, by the stream's index.
        """
        unit = float(self._stream.time_base)
        if self._stream.duration is not None:
            declared, end = self._stream.duration * unit, ends.get(self._stream.index, 0.0)
            if self._container.format.name == 'avi':
                # FFmpeg shortens the duration if the file looks too small for it, but keeps the
                # number of frames, each of which lasts one unit of time.
                declared = max(declared, self._stream.frames * unit)
        elif self._container.duration is not None:
            # Matroska stores one duration for the file, that of its longest stream.
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
        with decoding(str(self._path)):
            self._container.seek(time, stream=self._stream)
        # The first frames after a seek may need frames before it, and so be damaged. They are not
        # shown.
        self._frames = self._decoded(self._container.demux(self._stream), strict=False)

    def close(self) -> None:
        self._container.close()


def _time(frame: Any) -> int:
    return -1 if frame.pts is None else frame.pts


class _PillowDecoder(Decoder):
    def __init__(self, path: Path, max_megapixels: float):
        self._path = path
        self._number = -1
        with decoding(str(self._path)):
            data = io.BytesIO(path.read_bytes())
            self._image: Image.Image = opened(data, str(path), max_megapixels)

    def advance(self) -> int | None:
        self._number += 1
        with decoding(str(self._path)):
            try:
                self._image.seek(self._number)
            except EOFError:
                return None
            self._image.load()
        return self._number

    def picture(self) -> np.ndarray:
        with decoding(str(self._path)):
            return np.asarray(to_rgb(self._image))

    def close(self) -> None:
        self._image.close()


def _damaged(path: Path, what: str) -> BadPicture:
    what = ' '.join(what.split()).rstrip('.')
    return BadPicture(str(path), f'cannot be decoded: {what}', 'Mend or remove the file.')


def _cut_short(path: Path, what: str) -> BadPicture:
    return BadPicture(str(path), f'is cut short: {what}', 'Fetch or make it again, or remove it.')


class VideoFile:
    """A video file and the times of its frames.

    The file is decoded once, from its beginning to its end. Only this tells how many frames there
    are (a container's count may be an estimate, or include frames that are never shown) and that
    all of them can be decoded. It costs one pass of decoding; an epoch of training, which seeks
    every frame, costs many.

    Attributes:
      path: the file's path.
      max_megapixels: larger frames are refused.
      times: time of each frame, in the decoder's unit, int64 [N].
      seekable: whether the times are strictly ascending, so that a frame can be found by its time.
    """

    def __init__(self, path: Path, max_megapixels: float):
        """Decodes the file once.

        Args:
          path: the file's path.
          max_megapixels: larger frames are refused.

        Raises:
          UserError: the file is not a video, is damaged, or is cut short.
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
            raise UserError(f'{path} holds no frames. Mend or remove the file.')
        self.seekable = decoder.seeks and bool(np.all(np.diff(self.times) > 0))

    def __len__(self) -> int:
        return len(self.times)


def _check_file(path: Path) -> None:
    """Raises UserError if a path is not a file: reading from a pipe, say, waits for a writer."""
    try:
        what = not_a_file(path.stat())
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}.') from error
    if what:
        raise UserError(f'{path} is not a file but {what}. Remove it.')


class Reader:
    """Reads any frame of an open video file. Not thread-safe.

    Attributes:
      file: the video file.
      at: number of the frame decoded last; -1 before the first.
    """

    def __init__(self, file: VideoFile):
        self.file = file
        self.at = -1
        self._decoder: Decoder | None = None

    def read(self, number: int) -> np.ndarray:
        """Reads one frame.

        Frames are counted from the frame decoded last or, after a seek, from a frame that its time
        identifies. The time of every frame on the way must be the same as when the file was first
        decoded. If one differs, the file is decoded from its beginning.

        Args:
          number: number of the frame, from 0.

        Returns:
          uint8 [H, W, 3], RGB.

        Raises:
          BadPicture: the file has changed since it was first decoded.
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
            # The whole file could be decoded before, so perhaps decoding only fails from here.
            return False

    def _sought(self, number: int) -> bool:
        """Goes to a frame by seeking; False if that failed."""
        times = self.file.times
        self._opened().seek(int(times[number]))
        time = self._opened().advance()
        if time is None:
            return False
        self.at = int(np.searchsorted(times, time))
        return self.at <= number and times[self.at] == time and self._advance(number)

    def _advance(self, number: int) -> bool:
        """Decodes up to a frame; False if the time of a frame on the way is wrong."""
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
        """Frees the file and memory; the next `read` opens the file again, at its beginning."""
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = None
        self.at = -1


class Readers:
    """Reads frames for many threads, with a limited number of open files."""

    def __init__(self, limit: int):
        """Opens nothing yet.

        Args:
          limit: how many readers are open at a time, at least 1. If all are in use, threads wait.
        """
        self._limit = limit
        self._slots = threading.Semaphore(limit)
        self._lock = threading.Lock()
        self._idle: list[Reader] = []  # The one used last comes last.
        self._busy = 0

    def read(self, file: VideoFile, number: int) -> np.ndarray:
        """Reads frame `number` of a file: see `Reader.read`."""
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
                # The reader nearest before the frame, else any: that needs the least decoding.
                best = max(mine, key=lambda reader: (reader.at <= number, reader.at))
                self._idle.remove(best)
                return best
            while len(self._idle) + self._busy > self._limit:
                self._idle.pop(0).close()
            return Reader(file)
