"""Video files: every frame by its number, exactly, or an error with the file's name."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from clips import (
    OPENCV_FORMATS,
    frame,
    turn,
    which,
    write_gif,
    write_video,
    write_with_pyav,
)
from PIL import Image

from byol_jax.errors import BadPicture, UserError
from byol_jax.sources import video_file
from byol_jax.sources.video_file import Reader, Readers, VideoFile

COUNT = 40


@pytest.fixture(scope='module')
def videos(tmp_path_factory) -> dict[str, Path]:
    """A clip of COUNT frames in every format that OpenCV and Pillow write."""
    folder = tmp_path_factory.mktemp('videos')
    made = {name: write_video(folder / name, COUNT, 3, code) for name, code in OPENCV_FORMATS}
    return made | {'a.gif': write_gif(folder / 'a.gif', COUNT, 3)}


NAMES = [*(name for name, _ in OPENCV_FORMATS), 'a.gif']

# Options with which the frame stored at a key frame's place is not the one shown there, or some
# packets hold no frame, or times are irregular.
HARD = {
    'b_frames.mp4': ('libx264', {'bf': '3', 'g': '16'}, None),
    'open_gop.mkv': ('libx264', {'bf': '3', 'x264-params': 'open-gop=1:keyint=16'}, None),
    'intra_refresh.mp4': ('libx264', {'x264-params': 'intra-refresh=1:keyint=16'}, None),
    'one_key.mp4': ('libx264', {'bf': '2', 'g': '1000', 'sc_threshold': '0'}, None),
    'irregular.mp4': ('libx264', {'bf': '3', 'g': '16'}, lambda n: 50 * n + 17 * (n % 3)),
    'irregular.mkv': ('libx264', {'bf': '3', 'g': '16'}, lambda n: 7 * n * n),
    'hidden.webm': ('libvpx', {'auto-alt-ref': '1', 'lag-in-frames': '16', 'b': '50k'}, None),
    'hidden_9.webm': ('libvpx-vp9', {'auto-alt-ref': '1', 'lag-in-frames': '16'}, None),
    'b_frames.avi': ('mpeg4', {'bf': '2', 'g': '16', 'b': '2M'}, None),
}


@pytest.fixture(scope='module')
def hard(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp('hard')
    return {
        name: write_with_pyav(folder / name, COUNT, codec, options, milliseconds=times)
        for name, (codec, options, times) in HARD.items()
    }


def assert_exact(path: Path, clip: int) -> None:
    """Frames read in any order are correct, with one reader and with new ones."""
    video = VideoFile(path, 1)
    assert len(video) == COUNT
    reader = Reader(video)
    rng = np.random.default_rng(0)
    for number in itertools.chain(
        range(COUNT), reversed(range(COUNT)), rng.integers(0, COUNT, 30).tolist()
    ):
        picture = reader.read(number)
        assert picture.dtype == np.uint8
        assert which(picture) == (clip, number)
    reader.close()
    for number in (COUNT - 1, 17, 0):
        assert which(Reader(video).read(number)) == (clip, number)


@pytest.fixture
def eager(monkeypatch):
    """Makes every jump of more than two frames a seek."""
    monkeypatch.setattr(video_file, '_NEAR', 2)


@pytest.mark.parametrize('name', NAMES)
def test_any_frame_of_any_format(videos, eager, name):
    """Forwards, backwards and at random, the requested frame is read."""
    assert_exact(videos[name], 3)


@pytest.mark.parametrize('name', HARD)
def test_any_frame_of_hard_files(hard, eager, name):
    """The same with B frames, open groups, one key frame, hidden frames and irregular times."""
    assert_exact(hard[name], 0)


def test_frames_that_are_declared_do_not_count(hard):
    """The number of frames is that of decoded ones, even if the container's is far off."""
    path = hard['irregular.mkv']
    declared = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)
    assert declared > 2 * COUNT
    assert len(VideoFile(path, 1)) == COUNT


def test_opencv_gives_the_same_frames(hard, videos):
    """OpenCV, which has its own FFmpeg, decodes the same pixels."""
    for path in [*hard.values(), *(videos[name] for name in NAMES if name != 'a.gif')]:
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        frames = [capture.read()[1] for _ in range(22)]
        expected = cv2.cvtColor(frames[21], cv2.COLOR_BGR2RGB)
        np.testing.assert_array_equal(Reader(VideoFile(path, 1)).read(21), expected)


def test_colours_and_channels(tmp_path):
    """Red, green and blue have this order."""
    path = tmp_path / 'a.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'FFV1'), 25, (32, 32))
    color = np.array([200, 120, 40], np.uint8)
    writer.write(np.full((32, 32, 3), color[::-1], np.uint8))
    writer.release()
    picture = Reader(VideoFile(path, 1)).read(0)
    np.testing.assert_allclose(picture, np.broadcast_to(color, (32, 32, 3)), atol=3)


@pytest.mark.parametrize('quarters', [1, 2, 3])
def test_rotation_is_applied(tmp_path, quarters):
    """A video with a rotation in its header is rotated."""
    path = write_video(tmp_path / 'a.mp4', 5, 2)
    upright = Reader(VideoFile(path, 1)).read(3)
    turn(path, quarters)
    picture = Reader(VideoFile(path, 1)).read(3)
    np.testing.assert_array_equal(picture, np.rot90(upright, -quarters))


def test_gif_with_transparency_is_laid_over_black(tmp_path):
    """Transparent pixels of a GIF's first frame are black; later frames are composed."""
    colors = np.zeros((3, 16, 16), np.uint8)
    colors[0, :, :8] = 1
    colors[1, 8:, :] = 2
    images = []
    for picture in colors:
        image = Image.fromarray(picture, 'P')
        image.putpalette([9, 9, 9, 250, 0, 0, 0, 250, 0])
        images.append(image)
    path = tmp_path / 'a.gif'
    images[0].save(path, save_all=True, append_images=images[1:2], transparency=0, disposal=1)
    reader = Reader(VideoFile(path, 1))
    first = reader.read(0)
    np.testing.assert_array_equal(first[:, :8], np.broadcast_to([250, 0, 0], (16, 8, 3)))
    np.testing.assert_array_equal(first[:, 8:], 0)
    second = reader.read(1)
    np.testing.assert_array_equal(second[8:], np.broadcast_to([0, 250, 0], (8, 16, 3)))
    np.testing.assert_array_equal(second[:8], first[:8])


# Wrong seeks.


class Scripted(video_file.Decoder):
    """A file of 100 frames at times 0, 10, ...; its seeks do what the test says."""

    seeks = True
    opened = 0
    advanced = 0
    landing = staticmethod(lambda time: time // 10)

    def __init__(self, *_):
        type(self).opened += 1
        self.next = 0

    def advance(self):
        type(self).advanced += 1
        self.next += 1
        return 10 * (self.next - 1) if self.next <= 100 else None

    def picture(self):
        return np.full((1, 1, 3), self.next - 1, np.uint8)

    def seek(self, time):
        self.next = self.landing(time)

    def close(self):
        pass


def fails(_):
    raise BadPicture('a.mp4', 'cannot be entered here')


@pytest.mark.parametrize(
    'landing',
    [
        pytest.param(lambda time: time // 10, id='right'),
        pytest.param(lambda time: max(0, time // 10 - 7), id='early'),
        pytest.param(lambda time: min(99, time // 10 + 3), id='late'),
        pytest.param(lambda time: 0, id='at the beginning'),
        pytest.param(lambda time: 100, id='at the end'),
        pytest.param(fails, id='fails'),
    ],
)
def test_wherever_seeking_lands_the_frame_is_right(monkeypatch, tmp_path, landing):
    """A seek that lands early, late or nowhere, or fails, changes only the cost."""
    (tmp_path / 'a.mp4').write_bytes(b'')
    kind = type('Landing', (Scripted,), {'landing': staticmethod(landing)})
    monkeypatch.setattr(video_file, 'open_decoder', kind)
    reader = Reader(VideoFile(tmp_path / 'a.mp4', 1))
    for number in (99, 50, 50, 51, 95, 3, 0, 98):
        assert reader.read(number)[0, 0, 0] == number


def test_near_frames_are_decoded_and_far_ones_sought(monkeypatch, tmp_path):
    """A frame's partner costs the frames in between; a far frame costs a seek."""
    (tmp_path / 'a.mp4').write_bytes(b'')
    kind = type('Counted', (Scripted,), {'landing': staticmethod(lambda time: time // 10)})
    monkeypatch.setattr(video_file, 'open_decoder', kind)
    reader = Reader(VideoFile(tmp_path / 'a.mp4', 1))
    kind.advanced = 0
    for number, cost in ((60, 1), (60, 0), (75, 15), (20, 1), (99, 1)):
        before = kind.advanced
        reader.read(number)
        assert kind.advanced - before == cost
    assert kind.opened == 2


def test_times_that_repeat_are_never_sought(monkeypatch, tmp_path):
    """Frames with equal times are counted from the beginning."""
    (tmp_path / 'a.mp4').write_bytes(b'')

    class Repeating(Scripted):
        def advance(self):
            time = super().advance()
            return None if time is None else time // 20

        def seek(self, time):
            raise AssertionError('sought')

    monkeypatch.setattr(video_file, 'open_decoder', Repeating)
    reader = Reader(VideoFile(tmp_path / 'a.mp4', 1))
    for number in (80, 81, 20, 99):
        assert reader.read(number)[0, 0, 0] == number


def test_formats_without_times_are_never_sought(videos):
    """AVI and GIF store no times; all other formats do, and seek by them."""
    for name in NAMES:
        assert VideoFile(videos[name], 1).seekable == (name not in ('a.avi', 'a.gif'))


# Many threads.


def test_many_threads_read_the_right_frames(videos):
    """Sixteen threads that share three readers each get the frames they ask for."""
    files = [VideoFile(videos[name], 1) for name in ('a.mp4', 'b.webm', 'a.gif', 'a.mkv')]
    readers = Readers(3)
    asked = np.random.default_rng(0).integers(0, (len(files), COUNT), (300, 2)).tolist()
    with ThreadPoolExecutor(16) as pool:
        pictures = list(pool.map(lambda a: readers.read(files[a[0]], a[1]), asked))
    assert [which(picture) for picture in pictures] == [(3, number) for _, number in asked]


def test_open_files_are_bounded(monkeypatch, tmp_path):
    """With many files and threads, no more than the limit are open at a time."""
    now, most = [0], [0]

    class Open(Scripted):
        def __init__(self, *_):
            super().__init__()
            now[0] += 1
            most[0] = max(most[0], now[0])

        def close(self):
            now[0] -= 1

    monkeypatch.setattr(video_file, 'open_decoder', Open)
    files = []
    for i in range(20):
        (tmp_path / f'{i}.mp4').write_bytes(b'')
        files.append(VideoFile(tmp_path / f'{i}.mp4', 1))
    assert now[0] == 0
    most[0] = 0
    readers = Readers(4)
    asked = np.random.default_rng(0).integers(0, (20, 100), (2000, 2)).tolist()
    with ThreadPoolExecutor(12) as pool:
        pictures = list(pool.map(lambda a: readers.read(files[a[0]], a[1]), asked))
    assert [int(picture[0, 0, 0]) for picture in pictures] == [number for _, number in asked]
    assert 1 < most[0] <= 4


# Files that cannot be used.


@pytest.mark.parametrize('share', [0.05, 0.3, 0.62, 0.85, 0.9, 0.99])
@pytest.mark.parametrize('name', NAMES)
def test_files_cut_short_are_named(tmp_path, videos, name, share):
    """A video that ends early is an error with its name, or lacks at most three frames.

    The durations of Matroska and AVI tell no more.
    """
    whole = videos[name].read_bytes()
    path = tmp_path / f'holiday{videos[name].suffix}'
    path.write_bytes(whole[: int(len(whole) * share)])
    try:
        video = VideoFile(path, 1)
    except UserError as error:
        said = str(error)
    else:
        said = ''
    if said:
        assert path.name in said
        return
    assert share > 0.85
    assert COUNT - 3 <= len(video) <= COUNT
    if name == 'a.gif' or path.suffix in ('.mp4', '.mov'):
        # Only the index was cut off, and it was not needed.
        assert len(video) == COUNT
    assert which(Reader(video).read(len(video) - 1)) == (3, len(video) - 1)


@pytest.mark.parametrize('seconds', [1, 3])
@pytest.mark.parametrize(
    ('name', 'codec', 'sound'),
    [
        ('a.mkv', 'libx264', 'flac'),
        ('a.webm', 'libvpx', 'libopus'),
        ('a.mp4', 'libx264', 'aac'),
        ('a.avi', 'mpeg4', 'pcm_s16le'),
    ],
)
def test_sound_of_another_length_is_no_damage(tmp_path, name, codec, sound, seconds):
    """A video whose sound ends before or after the picture is read, unless it is cut short."""
    path = tmp_path / name
    write_with_pyav(path, COUNT, codec, sound=sound, sound_seconds=seconds)
    assert len(VideoFile(path, 1)) == COUNT
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 4])
    with pytest.raises(UserError, match=name):
        VideoFile(path, 1)


@pytest.mark.parametrize('start', [-0.5, 0.7])
@pytest.mark.parametrize('suffix', ['.mp4', '.mov', '.mkv'])
def test_trimmed_videos_are_no_damage(tmp_path, hard, suffix, start):
    """A video of which players show only a part, or that starts late, is read as it is shown."""
    path = tmp_path / f'a{suffix}'
    with av.open(str(hard['b_frames.mp4'])) as old, av.open(str(path), 'w') as new:
        picture = old.streams.video[0]
        stream = new.add_stream_from_template(picture)
        for packet in old.demux(picture):
            if packet.dts is not None:
                packet.pts += int(start / picture.time_base)
                packet.dts += int(start / picture.time_base)
                packet.stream = stream
                new.mux(packet)
    hidden = 13 if start < 0 and suffix != '.mkv' else 0
    assert len(VideoFile(path, 1)) == COUNT - hidden


def test_the_end_of_a_streamable_mp4_is_missed(tmp_path, hard):
    """If the index comes first and frames are cut off, the error has both sizes."""
    path = tmp_path / 'stream.mp4'
    with av.open(str(hard['b_frames.mp4'])) as old:
        options = {'movflags': 'faststart'}
        with av.open(str(path), 'w', options=options) as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    new.mux(packet)
    assert len(VideoFile(path, 1)) == COUNT
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    sizes = (
        f'it has {len(whole) - 200:,} bytes, and its index lists frames up to byte {len(whole):,}'
    )
    with pytest.raises(UserError, match=rf'stream\.mp4 is cut short: {sizes}'):
        VideoFile(path, 1)


def test_open_sizes_and_bytes_behind_the_end_are_no_damage(tmp_path, hard):
    """A recorded live stream, which declares no size, and a file with extra bytes are read."""
    path = write_with_pyav(tmp_path / 'a.mkv', COUNT, container_options={'live': '1'})
    assert_exact(path, 0)
    path = tmp_path / 'a.mp4'
    path.write_bytes(hard['b_frames.mp4'].read_bytes() + b'\xff' * 100)
    assert_exact(path, 0)


def test_titles_in_an_old_encoding_are_no_damage(tmp_path):
    """A video whose title is not UTF-8 is read like any other."""
    path = tmp_path / 'a.mkv'
    write_with_pyav(path, COUNT, title='XXXX')
    path.write_bytes(path.read_bytes().replace(b'XXXX', b'\xe9\xff\xe8\xfe'))
    assert_exact(path, 0)


@pytest.mark.parametrize('name', NAMES)
def test_damaged_files_decode_or_are_named(tmp_path, videos, name):
    """Flipped bytes give frames or a UserError with the name, and no other exception."""
    whole = np.frombuffer(videos[name].read_bytes(), np.uint8)
    path = tmp_path / f'holiday{videos[name].suffix}'
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(12):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 30)] = rng.integers(0, 256, 30)
        path.write_bytes(damaged.tobytes())
        try:
            video = VideoFile(path, 1)
            Reader(video).read(len(video) - 1)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 2
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize('name', ['b_frames.mp4', 'one_key.mp4'])
def test_damage_in_the_middle_is_not_the_end(tmp_path, hard, name):
    """Frames that cannot be decoded are an error, even if good ones follow."""
    data = bytearray(hard[name].read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20] = b'\xff' * 20
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf'{name} cannot be decoded'):
        VideoFile(path, 1)


def test_frames_that_were_made_up_are_damage(tmp_path, videos):
    """Frames that a decoder marks as filled in for lost data are damage."""
    data = bytearray(videos['a.mkv'].read_bytes())
    for place in range(len(data) // 3, len(data) // 2, 97):
        damaged = bytes(data[:place]) + b'\0\0\0' + bytes(data[place + 3 :])
        path = tmp_path / 'a.mkv'
        path.write_bytes(damaged)
        try:
            VideoFile(path, 1)
        except UserError as error:
            if str(error).startswith(f'{path} cannot be decoded: a frame is damaged'):
                return
    raise AssertionError('no damage was noticed')


@pytest.mark.parametrize('name', ['a.mp4', 'a.mkv', 'a.avi', 'a.gif'])
@pytest.mark.parametrize('data', [b'', b'hello, I am no video\n', bytes(1000)])
def test_files_that_are_no_videos_are_named(tmp_path, name, data):
    """An empty file or a text file with a video's name is an error with its path."""
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf'{path}'):
        VideoFile(path, 1)


def test_a_file_that_went_away_is_named(tmp_path, videos):
    """A video that vanishes before or after listing is an error with its path."""
    with pytest.raises(UserError, match=r'gone\.mp4 cannot be read'):
        VideoFile(tmp_path / 'gone.mp4', 1)
    path = tmp_path / 'going.mp4'
    path.write_bytes(videos['a.mp4'].read_bytes())
    video = VideoFile(path, 1)
    path.unlink()
    with pytest.raises(BadPicture, match=r'going\.mp4') as caught:
        Reader(video).read(0)
    assert caught.value.file == str(path)


def test_a_file_that_changed_is_named(tmp_path):
    """A video with other frames than at listing is bad, and shows no wrong picture."""
    path = write_video(tmp_path / 'a.mp4', COUNT)
    video = VideoFile(path, 1)
    write_video(path, 10)
    with pytest.raises(BadPicture, match=r'a\.mp4 has changed since the run began: frame 30 '):
        Reader(video).read(30)


@pytest.mark.parametrize('name', ['a.mp4', 'a.webm', 'a.gif'])
def test_large_frames_are_refused(videos, name):
    """Frames above max_megapixels are refused by the declared size."""
    with pytest.raises(UserError, match=rf'{name} declares 96x64 .*max_megapixels=0\.006'):
        VideoFile(videos[name], 0.006)


def test_av1(tmp_path):
    """AV1, which OpenCV's wheels cannot decode, is read like any other."""
    path = write_with_pyav(tmp_path / 'a.mp4', COUNT, 'libsvtav1', {'preset': '12', 'g': '16'})
    assert_exact(path, 0)


def test_sound_alone_is_no_video(tmp_path):
    """A file with only sound is an error with its name."""
    path = tmp_path / 'song.mkv'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('pcm_s16le', rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), 's16', 'mono')
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(UserError, match=r'song\.mkv'):
        VideoFile(path, 1)


def test_names_of_frames_are_readable():
    """The clips of these tests do show which frame they are; all tests above rely on it."""
    for clip, number in ((0, 0), (3, 39), (15, 255)):
        assert which(frame(number, clip)) == (clip, number)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ('make', 'what'),
    [
        (os.mkfifo, 'pipe'),
        (os.mkdir, 'folder'),
        (lambda path: path.symlink_to('/dev/zero'), 'device'),
    ],
    ids=['pipe', 'folder', 'device'],
)
def test_what_is_no_file_is_no_video(tmp_path, make, what):
    """A named pipe, say, is an error at once, although reading it would never end."""
    path = tmp_path / 'camera.mp4'
    make(path)
    with pytest.raises(UserError, match=rf'camera\.mp4 is not a file but a {what}\.'):
        VideoFile(path, 200)
