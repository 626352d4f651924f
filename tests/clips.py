"""Clips for the tests: every frame shows in its pixels which one it is."""

from __future__ import annotations

import fractions
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image

HEIGHT, WIDTH = 64, 96
_BITS = 12

# Formats that OpenCV can write everywhere: (file, FourCC).
OPENCV_FORMATS = (
    ('a.mp4', 'mp4v'),
    ('a.mkv', 'mp4v'),
    ('b.mkv', 'FFV1'),
    ('a.webm', 'VP80'),
    ('b.webm', 'VP90'),
    ('a.mov', 'mp4v'),
    ('a.avi', 'MJPG'),
)


def frame(number: int, clip: int = 0) -> np.ndarray:
    """Frame 0 to 255 of clip 0 to 15, as twelve black or white stripes: uint8 [64, 96, 3]."""
    bits = (number + 256 * clip) >> np.arange(_BITS) & 1
    row = np.repeat(255 * bits, WIDTH // _BITS).astype(np.uint8)
    return np.tile(row[None, :, None], (HEIGHT, 1, 3))


def which(picture: np.ndarray) -> tuple[int, int]:
    """(clip, frame) of a picture made by `frame`, whatever a codec did to it."""
    bits = picture[:, 4 :: WIDTH // _BITS].mean(axis=(0, 2)) > 127
    return divmod(int(bits @ (1 << np.arange(_BITS))), 256)


def write_video(path: Path, count: int, clip: int = 0, fourcc: str = 'mp4v') -> Path:
    """Writes a video with OpenCV, at 25 frames a second, with a key frame every 12."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code = cv2.VideoWriter.fourcc(*fourcc)
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, 25, (WIDTH, HEIGHT))
    assert writer.isOpened(), f'OpenCV cannot write {path.suffix} with {fourcc}'
    for number in range(count):
        writer.write(frame(number, clip))
    writer.release()
    return path


def write_gif(path: Path, count: int, clip: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *more = [Image.fromarray(frame(number, clip)) for number in range(count)]
    first.save(path, save_all=True, append_images=more, duration=40)
    return path


def write_frames(folder: Path, names: Sequence[str], clip: int = 0) -> None:
    """Writes frame 0, 1, ... under the given names."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame(number, clip)).save(path)


def write_with_pyav(
    path: Path,
    count: int,
    codec: str = 'libx264',
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    milliseconds: Callable[[int], int] | None = None,
    title: str = '',
    sound: str = '',
    sound_seconds: float = 0,
) -> Path:
    """Writes a video with PyAV: any codec and option, frames at any time, silent sound."""
    unit = fractions.Fraction(1, 1000)
    with av.open(str(path), 'w', options=container_options or {}) as container:
        container.metadata['title'] = title
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = HEIGHT, WIDTH
        stream.pix_fmt = 'yuv420p'
        if milliseconds:
            stream.codec_context.time_base = unit
        audio = container.add_stream(sound, rate=48000, layout='mono') if sound else None
        for number in range(count):
            made = av.VideoFrame.from_ndarray(frame(number), format='rgb24')
            made = made.reformat(format='yuv420p')
            made.pts = milliseconds(number) if milliseconds else number
            made.time_base = unit if milliseconds else fractions.Fraction(1, 25)
            container.mux(stream.encode(made))
        container.mux(stream.encode())
        if audio:
            kind = audio.codec_context.format
            for start in range(0, round(48000 * sound_seconds), 960):
                silence = np.zeros((1, 960), np.int16 if kind.bytes == 2 else np.float32)
                heard = av.AudioFrame.from_ndarray(silence, kind.name, 'mono')
                heard.sample_rate, heard.pts = 48000, start
                container.mux(audio.encode(heard))
            container.mux(audio.encode())
    return path


def turn(path: Path, quarters: int) -> None:
    """Sets a clockwise rotation in the header of an MP4."""
    matrices = {
        1: (0, 1, 0, -1, 0, 0, 0, 0, 1),
        2: (-1, 0, 0, 0, -1, 0, 0, 0, 1),
        3: (0, -1, 0, 1, 0, 0, 0, 0, 1),
    }
    # 16.16 fixed point, the last column 2.30 (ISO/IEC 14496-12, Section 8.3.2).
    units = (1 << 16, 1 << 16, 1 << 30) * 3
    matrix = [value * unit for value, unit in zip(matrices[quarters], units, strict=True)]
    data = path.read_bytes()
    place = data.index(b'tkhd') + 4 + 40
    path.write_bytes(data[:place] + struct.pack('>9i', *matrix) + data[place + 36 :])
