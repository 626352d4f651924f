"""Frames of video clips as examples: video files and folders of numbered frames."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from byol_jax.cores import usable_cores
from byol_jax.errors import UserError
from byol_jax.sources.base import Progress, Source, no_progress
from byol_jax.sources.decode import EXTENSIONS, read_file
from byol_jax.sources.file_list import Names
from byol_jax.sources.folder import class_labels, list_files, why_no_labels
from byol_jax.sources.video_file import VIDEO_EXTENSIONS, Readers, VideoFile

_NUMBERED = re.compile(r'(.*?)([0-9]+)', re.DOTALL)


class Clip(NamedTuple):
    """A sequence of frames.

    Attributes:
      path: path of the video file or of the first frame, relative to the root.
      frames: the video file, or the frames' paths relative to the root.
    """

    path: str
    frames: Sequence[str] | VideoFile


class Video(Source):
    """The frames of all clips below a folder; every frame is an example, clip after clip.

    Every video file is a clip. Images of one folder whose names differ only in the number at their
    end are a clip too, in the order of that number: `0001.png`, `0002.png` in their own folder, or
    `walk_9.png`, `walk_10.png` beside `run_1.png`. An image without a number is a clip of one
    frame. Two images of a clip with the same number, such as `1.jpg` and `1.png`, are an error.

    The labels are the folders directly below `root`, as in `train/jump/1.mp4`, if there are at
    least two, every clip lies in one of them, and one holds more than one clip. The clip itself is
    no label, because clips are held out as a whole.
    """

    def __init__(
        self,
        root: str | Path,
        max_frame_gap: int,
        max_megapixels: float = 200,
        workers: int = 0,
        index: str = '',
        progress: Progress = no_progress,
        exclude: Sequence[str] = (),
    ):
        """Lists the clips and decodes every video file once (see `VideoFile`), but no image.

        Args:
          root: the folder.
          max_frame_gap: the largest distance between a frame and its partner, frames; 0 for no
            partners.
          max_megapixels: larger frames are refused.
          workers: how many video files are read at a time; 0 for one per CPU core. At most twice
            as many stay open.
          index: as in `Folder`.
          progress: called with the number of files listed, then of videos decoded.
          exclude: as in `Folder`.

        Raises:
          UserError: the folder does not exist or holds no clip, a video file is damaged, two
            images are the same frame, or no clip has two frames while `max_frame_gap` is above 0.
        """
        self.root = Path(root).expanduser()
        self.max_megapixels = max_megapixels
        # The beginning of every path, as pathlib writes it.
        self._prefix = str(self.root / '_')[:-1]
        self._gap = max_frame_gap
        workers = workers or usable_cores()
        # Twice as many, so that a file stays open from the first frame of a pair to the second.
        self._readers = Readers(2 * workers)
        both = (*EXTENSIONS, *VIDEO_EXTENSIONS)
        files, self.unused = list_files(
            self.root, 'data.path', both, 'image or video', index, progress, exclude
        )
        videos = [file for file in files if file.lower().endswith(VIDEO_EXTENSIONS)]
        paths = [self.root / file for file in videos]
        videos_read = _read_all(paths, max_megapixels, workers, progress)
        clips = [Clip(file, video) for file, video in zip(videos, videos_read, strict=True)]
        images = (file for file in files if not file.lower().endswith(VIDEO_EXTENSIONS))
        clips += frame_clips(Names.of(images))
        self._clips = sorted(clips, key=lambda clip: clip.path)
        counts = [len(clip.frames) for clip in self._clips]
        if max_frame_gap and max(counts) < 2:
            raise UserError(
                f'data.path={root} holds {len(counts):,} clips of one frame each, so no frame has '
                'a partner. The frames of a clip are images in one folder whose names differ only '
                'in the number at their end, such as walk_0001.png. For single pictures use '
                "data.source='folder'."
            )
        # The first example of each clip, and the number of examples: [clips + 1].
        self._starts = np.cumsum([0, *counts])
        self.groups = np.repeat(np.arange(len(counts)), counts)
        labels, names = class_labels([clip.path for clip in self._clips])
        if labels is None:
            self.unlabelled = why_no_labels([clip.path for clip in self._clips])
        elif len(names) == len(counts):
            self.unlabelled = 'each clip lies in a folder of its own'
        else:
            self.labels, self.label_names = labels[self.groups], names

    def __len__(self) -> int:
        return int(self._starts[-1])

    def load(self, index: int, key: str) -> np.ndarray:
        frames, number = self._place(index)
        if isinstance(frames, VideoFile):
            return self._readers.read(frames, number)
        return read_file(self.root / frames[number], self.max_megapixels)

    def name(self, index: int) -> str:
        """The frame's file, or `file #number` for a frame of a video, counted from 0."""
        frames, number = self._place(index)
        if isinstance(frames, VideoFile):
            return f'{frames.path.relative_to(self.root).as_posix()} #{number}'
        return frames[number]

    def file(self, index: int, key: str) -> str:
        """The path of the frame's file or of the video file."""
        frames, number = self._place(index)
        return str(frames.path) if isinstance(frames, VideoFile) else self._prefix + frames[number]

    def stored_in(self, index: int, key: str) -> str | None:
        return self.file(index, key)

    def partners(self, index: int) -> np.ndarray:
        clip = self._clip(index)
        first = max(self._starts[clip], index - self._gap)
        stop = min(self._starts[clip + 1], index + self._gap + 1)
        return np.delete(np.arange(first, stop), index - first)

    def _clip(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side='right')) - 1

    def _place(self, index: int) -> tuple[Sequence[str] | VideoFile, int]:
        """The frames of an example's clip, and the example's number among them."""
        clip = self._clip(index)
        return self._clips[clip].frames, int(index - self._starts[clip])


def frame_clips(files: Sequence[str]) -> list[Clip]:
    """Groups image files into clips by their names.

    Args:
      files: paths relative to the root, with '/'.

    Raises:
      UserError: two files are the same frame of a clip.
    """
    # Indices, because a million names as separate strings would take 100 MB.
    clips: dict[tuple[str, bool], list[int]] = {}
    for place, file in enumerate(files):
        start, number = _numbered(file)
        # The key is the path up to the number. 'walk.png' has no number, so it is a clip of its
        # own, apart from 'walk1.png' and from 'walk.jpg'.
        key = (file, False) if number is None else (start, True)
        clips.setdefault(key, []).append(place)
    made = []
    for places in clips.values():
        frames = sorted((_numbered(files[i])[1] or 0, files[i]) for i in places)
        for (number, file), (following, other) in itertools.pairwise(frames):
            if number == following:
                raise UserError(
                    f'{file} and {other} are both frame {number} of one clip, but only one can be. '
                    'If one is not a frame but a mask or a preview, say, move all such files out '
                    'of data.path; if they belong to two clips, give each clip its own folder.'
                )
        made.append(Clip(frames[0][1], Names.of(file for _, file in frames)))
    return made


def _numbered(file: str) -> tuple[str, int | None]:
    """Splits a path, without its extension, into the part before its last number and the number."""
    stem = file[: file.rindex('.')]
    match = _NUMBERED.fullmatch(stem)
    return (match[1], int(match[2])) if match else (stem, None)


def _read_all(
    paths: list[Path], max_megapixels: float, workers: int, progress: Progress
) -> list[VideoFile]:
    """Decodes video files once, several at a time."""
    read: list[VideoFile] = []
    pool = ThreadPoolExecutor(workers)
    try:
        for video in pool.map(lambda path: VideoFile(path, max_megapixels), paths):
            read.append(video)
            progress('videos decoded once, to check them', len(read), len(paths))
    finally:
        # After an error, the waiting files are not read.
        pool.shutdown(cancel_futures=True)
    return read
