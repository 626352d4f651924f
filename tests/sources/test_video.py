"""Frame pairs: what a clip is, which frame is the second view, and what is held out."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from clips import which, write_frames, write_gif, write_video
from conftest import ROOT, TINY, process_environment
from PIL import Image
from streams import batches, stream_of, views_at, views_of

from byol_jax.app.data import build_data
from byol_jax.app.report.pictures import draw_views
from byol_jax.errors import UserError
from byol_jax.input.stream import draw_place
from byol_jax.sources.bad_files import BadFiles
from byol_jax.sources.base import Subset
from byol_jax.sources.video import Video, frame_clips
from configs import default
from configs import video as video_config

SIZE = 16


def make_config(folder: Path, **data):
    """A config of clips whose views keep a picture's colours."""
    config = default.get_config()
    config.batch_size = 4
    config.views.image_size = SIZE
    for view in (config.views.view1, config.views.view2):
        view.jitter = view.gray = view.blur = view.solarize = 0.0
    config.data.update({'source': 'video', 'path': str(folder), 'workers': 2} | data)
    return config.lock()


def plain_clips(root: Path, *counts: int) -> Path:
    """Clip c of plain frames: frame n has the colour (10 c, 2 n, 100)."""
    for clip, count in enumerate(counts):
        for number in range(count):
            path = root / f'clip{clip}' / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            color = (10 * clip, 2 * number, 100)
            Image.fromarray(np.full((20, 24, 3), color, np.uint8)).save(path)
    return root


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


# Clips.


def test_a_folder_of_frames_is_a_clip(tmp_path):
    """Numbered frames of one folder are one clip, in the order of their numbers."""
    write_frames(tmp_path / 'run', ['frame_0001.png', 'frame_0002.png', 'frame_0003.png'])
    write_frames(tmp_path / 'walk', ['1.png', '2.png'])
    source = Video(tmp_path, 1)
    assert source.groups.tolist() == [0, 0, 0, 1, 1]
    assert names(source)[2:4] == ['run/frame_0003.png', 'walk/1.png']
    assert source.keys == ('image',)


def test_flat_names_are_clips(tmp_path):
    """Frames in one folder whose names differ only in their number are a clip."""
    write_frames(tmp_path, ['walk_0001.png', 'walk_0002.png'], 1)
    write_frames(tmp_path, ['run_0001.png', 'run_0002.png', 'run_0003.png'], 2)
    source = Video(tmp_path, 5)
    assert source.groups.tolist() == [0, 0, 0, 1, 1]
    assert [which(source.load(i, 'image')) for i in range(5)] == [
        (2, 0),
        (2, 1),
        (2, 2),
        (1, 0),
        (1, 1),
    ]
    assert source.labels is None


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    """10 comes after 9 with any zero padding and extension; gaps in the numbers do not matter."""
    order = ['a_1.png', 'a_02.bmp', 'a_9.png', 'a_010.png', 'a_11.png', 'a_100.png', 'a_0300.png']
    write_frames(tmp_path, order)
    source = Video(tmp_path, 1)
    assert names(source) == order
    assert [which(source.load(i, 'image'))[1] for i in range(7)] == list(range(7))
    assert source.partners(5).tolist() == [4, 6]


@pytest.mark.parametrize(
    ('files', 'clips'),
    [
        (['a1.png', 'a2.png', 'b1.png', 'b2.png'], [2, 2]),
        (['x/a1.png', 'y/a2.png'], [1, 1]),
        (['walk.png', 'walk1.png', 'walk2.png'], [1, 2]),
        (['one.png', 'two.png'], [1, 1]),
        (['cat.jpg', 'cat.png', 'cat.bmp'], [1, 1, 1]),
        (['shot1_take2_7.png', 'shot1_take2_8.png', 'shot1_take3_7.png'], [2, 1]),
        (['1/2/3.png', '1/2/4.png', '1/20/3.png'], [2, 1]),
        (['٣.png', '٤.png'], [1, 1]),
        (['a_1.png', 'a-1.png', 'A_1.png'], [1, 1, 1]),
    ],
)
def test_frames_never_join_across_names_and_folders(files, clips):
    """Another folder, or another name before the number, is another clip."""
    found = frame_clips(files)
    assert sorted(len(clip.frames) for clip in found) == sorted(clips)
    assert sorted(file for clip in found for file in clip.frames) == sorted(files)


@pytest.mark.parametrize(
    ('files', 'named'),
    [
        (['0001.jpg', '0001.png', '0002.jpg', '0002.png'], '0001.jpg and 0001.png .* frame 1 '),
        (['x/a_7.png', 'x/a_8.png', 'x/a_08.webp'], 'x/a_08.webp and x/a_8.png .* frame 8 '),
        (['0.png', '00.png'], '0.png and 00.png .* frame 0 '),
    ],
)
def test_two_files_that_are_the_same_frame_are_named(files, named):
    """A frame and its mask, or two paddings of a number, never become one clip."""
    with pytest.raises(UserError, match=f'{named}.*out of data.path.*its own folder'):
        frame_clips(files)
    kept = [file for file in files if not file.endswith(('1.png', '2.png', '.webp', '00.png'))]
    assert len(frame_clips(kept)) == 1


def test_video_files_and_frames_side_by_side(tmp_path):
    """Every video file is a clip, beside folders of frames; its frames are named by number."""
    write_video(tmp_path / 'a.mp4', 7, 1)
    write_video(tmp_path / 'b/c.WEBM', 5, 2, 'VP80')
    write_gif(tmp_path / 'b/d.gif', 4, 3)
    write_frames(tmp_path / 'b/e', ['1.png', '2.png'], 4)
    source = Video(tmp_path, 3)
    assert len(source) == 7 + 5 + 4 + 2
    found = [which(source.load(i, 'image')) for i in range(len(source))]
    expected = [(1, n) for n in range(7)] + [(2, n) for n in range(5)]
    assert found == expected + [(3, n) for n in range(4)] + [(4, n) for n in range(2)]
    assert names(source)[6:8] == ['a.mp4 #6', 'b/c.WEBM #0']
    assert names(source)[-1] == 'b/e/2.png'


def test_clips_in_class_folders_are_labelled(tmp_path):
    """The folders on the first level are the classes, for frames and for videos."""
    write_frames(tmp_path / 'jump/one', ['1.png', '2.png'])
    write_frames(tmp_path / 'jump', ['two_1.png', 'two_2.png', 'two_3.png'])
    write_video(tmp_path / 'fall/three.mp4', 2)
    source = Video(tmp_path, 1)
    assert source.label_names == ('fall', 'jump')
    assert source.labels.tolist() == [0] * 2 + [1] * 5
    assert source.groups.tolist() == [0] * 2 + [1] * 2 + [2] * 3


@pytest.mark.parametrize(
    'frames',
    [
        pytest.param(['a/1.png', 'a/2.png', 'b/1.png', 'b/2.png'], id='each clip its own folder'),
        pytest.param(['a1.png', 'a2.png', 'b1.png', 'b2.png'], id='flat'),
        pytest.param(['c/a1.png', 'c/a2.png', 'c/b1.png'], id='one folder'),
        pytest.param(['c/a1.png', 'c/b2.png', 'd/b1.png', '1.png', '2.png'], id='a stray clip'),
    ],
)
def test_a_clip_is_no_label(tmp_path, frames):
    """If no class folders sort the clips, there are no labels."""
    write_frames(tmp_path, frames)
    source = Video(tmp_path, 1)
    assert source.labels is None
    assert source.label_names == ()


# Partners.


@pytest.mark.parametrize('gap', [1, 2, 5, 100])
def test_partners_are_the_other_frames_of_the_clip_within_the_gap(tmp_path, gap):
    """Partners are all frames of the same clip with 1 <= |distance| <= gap."""
    counts = [1, 4, 12, 2]
    source = Video(plain_clips(tmp_path, *counts), gap)
    clips = np.repeat(range(4), counts)
    for i in range(len(source)):
        expected = [
            j for j in range(len(source)) if clips[i] == clips[j] and 1 <= abs(i - j) <= gap
        ]
        assert source.partners(i).tolist() == expected


def test_no_gap_no_partners(tmp_path):
    """With max_frame_gap=0, and in a clip of one frame, both views show the same frame."""
    plain_clips(tmp_path, 5, 1)
    assert not any(len(Video(tmp_path, 0).partners(i)) for i in range(6))
    assert len(Video(tmp_path, 3).partners(5)) == 0
    stream = stream_of(Video(tmp_path, 0), make_config(tmp_path))
    for position in range(12):
        first, second = stream.pictures(position)
        assert first == second


def test_partners_in_a_part_of_the_source(tmp_path):
    """A subset's partners are its own examples."""
    source = Video(plain_clips(tmp_path, 6, 6), 2)
    subset = Subset(source, np.array([7, 8, 10, 2, 11, 3]))
    partners = [subset.partners(i).tolist() for i in range(6)]
    assert [sorted(p) for p in partners] == [[1], [0, 2], [1, 4], [5], [2], [3]]
    assert subset.groups.tolist() == [1, 1, 1, 0, 1, 0]


def test_second_frame_is_a_partner_at_every_position(tmp_path):
    """Over whole epochs, view 2's frame is in the same clip, near, and never the same."""
    config = make_config(plain_clips(tmp_path, 9, 3, 20), max_frame_gap=4)
    source = Video(tmp_path, 4)
    stream = stream_of(source, config)
    for position in range(20 * len(source)):
        (first, _), (second, _) = stream.pictures(position)
        assert first == stream.example(position)[1]
        assert source.groups[first] == source.groups[second]
        assert 1 <= abs(first - second) <= 4


@pytest.mark.parametrize('number', [0, 1, 10, 19])
def test_gaps_are_uniform(tmp_path, number):
    """Every partner is drawn equally often, near the ends of a clip too."""
    config = make_config(plain_clips(tmp_path, 20), max_frame_gap=3)
    source = Video(tmp_path, 3)
    partners = source.partners(number)
    epochs = 4000
    drawn = [draw_place(len(partners), config.seed, e, number, 2) for e in range(epochs)]
    counts = np.bincount(drawn, minlength=len(partners))
    assert len(counts) == len(partners)
    expected = epochs / len(partners)
    # Chi squared with at most 5 degrees of freedom: above 25.7 once in 10,000 tries.
    assert np.sum((counts - expected) ** 2 / expected) < 25.7


def test_gaps_of_examples_seeds_and_epochs_are_their_own():
    """Draws depend on seed, epoch, example and view, and on nothing else."""
    base = [draw_place(1000, 1, epoch, 7, 2) for epoch in range(50)]
    assert base == [draw_place(1000, 1, epoch, 7, 2) for epoch in range(50)]
    for other in ((2, 7, 2), (1, 8, 2), (1, 7, 1)):
        again = [draw_place(1000, other[0], epoch, *other[1:]) for epoch in range(50)]
        assert sum(a == b for a, b in zip(base, again, strict=True)) < 5
    # These very numbers: a resumed run must continue with the same frames.
    assert base[:6] == [916, 844, 754, 63, 509, 42]


def test_views_come_from_their_frames(tmp_path):
    """View 1 shows the frame of the example, view 2 its partner's, for clips of PNGs."""
    config = make_config(plain_clips(tmp_path, 30, 7, 1), max_frame_gap=5)
    source = Video(tmp_path, 5)
    stream = stream_of(source, config)
    for position in range(len(source)):
        (first, _), (second, _) = stream.pictures(position)
        for index, view in zip((first, second), views_at(stream, position), strict=True):
            color = source.load(index, 'image')[0, 0]
            np.testing.assert_array_equal(view, np.broadcast_to(color, (SIZE, SIZE, 3)))


def test_partners_change_no_other_draw(tmp_path):
    """Order, view 1 and the box of view 2 are the same with and without partners."""

    class Noise(Video):
        def load(self, index, key):
            return np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)

    config = make_config(plain_clips(tmp_path, 12, 4))
    apart, same = (stream_of(Noise(tmp_path, gap), config) for gap in (5, 0))
    for position in range(32):
        assert apart.example(position) == same.example(position)
        for a, b in zip(views_at(apart, position), views_at(same, position), strict=True):
            np.testing.assert_array_equal(a, b)


# Runs.


def collect(config, start: int, stop: int) -> np.ndarray:
    data = build_data(config)
    made = batches(data.train, config, start_step=start, stop_step=stop)
    return np.stack([np.stack([batch['view1'], batch['view2']]) for batch in made])


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Clips of all kinds, with 33 frames in total."""
    write_video(tmp_path / 'a.mp4', 12, 1)
    write_video(tmp_path / 'b.webm', 9, 2, 'VP80')
    write_gif(tmp_path / 'c.gif', 6, 3)
    write_frames(tmp_path / 'd', [f'{i}.png' for i in range(6)], 4)
    return tmp_path


def test_a_run_goes_on_from_its_step_alone(mixed):
    """A start at step k gives exactly the batches of a run from step 0."""
    config = make_config(mixed)
    whole = collect(config, 0, 18)
    for start in (1, 7, 8, 17):
        np.testing.assert_array_equal(collect(config, start, 18), whole[start:])


# Prints a digest of the first 48 pairs of the clips in a folder.
DIGEST = """
import hashlib, sys
sys.path.insert(0, 'tests')
from byol_jax.app.data import build_data
from streams import stream_of, views_at
from configs import default
config = default.get_config()
config.views.image_size = 16
config.data.update({'source': 'video', 'path': sys.argv[1], 'workers': int(sys.argv[2])})
stream = stream_of(build_data(config).train, config)
pairs = [view.tobytes() for position in range(48) for view in views_at(stream, position)]
print(hashlib.sha256(b''.join(pairs)).hexdigest())
"""


def test_threads_and_processes_agree(mixed):
    """One worker, eight workers and another process make the same pairs, bit for bit."""
    made = [collect(make_config(mixed, workers=workers), 0, 12) for workers in (1, 8)]
    np.testing.assert_array_equal(*made)
    config = default.get_config()
    config.views.image_size = SIZE
    config.batch_size = 4
    config.data.update({'source': 'video', 'path': str(mixed), 'workers': 8})
    # [12, 2, 4, ...]: batches, views, rows.
    pairs = collect(config, 0, 12).swapaxes(1, 2)
    done = subprocess.run(
        [sys.executable, '-c', DIGEST, str(mixed), '3'],
        cwd=ROOT,
        env=process_environment(1),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == hashlib.sha256(pairs.tobytes()).hexdigest()


@pytest.mark.parametrize('damage', [Path.unlink, lambda path: path.write_bytes(b'')])
@pytest.mark.parametrize('name', ['a.mp4', 'b.webm', 'c.gif'])
def test_a_video_that_breaks_later_is_a_bad_file(mixed, name, damage):
    """A video that is damaged or missing after the run began is one bad file, whose frames are
    replaced; all other examples stay the same, and the limit on bad files works.
    """
    config = make_config(mixed, workers=1, max_frame_gap=0)
    train = build_data(config).train
    whole = list(batches(train, config, start_step=0, stop_step=8))
    train = build_data(config).train
    damage(mixed / name)
    bad_files = BadFiles(train, 'image', 0.01)
    made = list(batches(train, config, start_step=0, stop_step=8, bad_files=bad_files))
    assert [bad.file for bad in bad_files.since(0)] == [str(mixed / name)]
    # Three videos and six images.
    assert (bad_files.total, bad_files.allowed) == (9, 1)
    for batch, intact in zip(made, whole, strict=True):
        for row, example in enumerate(intact['example']):
            if train.name(int(example)).startswith(name):
                assert not train.name(int(batch['example'][row])).startswith(name)
            else:
                assert batch['example'][row] == example
                np.testing.assert_array_equal(batch['view1'][row], intact['view1'][row])
    none = BadFiles(train, 'image', 0.0)
    with pytest.raises(UserError, match=f'1 of 9 training pictures .*{name}'):
        list(batches(train, config, start_step=0, stop_step=8, bad_files=none))


@pytest.mark.parametrize('fraction', [0.1, 0.3, 0.5])
def test_whole_clips_are_held_out(tmp_path, fraction):
    """The fraction counts clips; no clip is in both parts, and none is divided."""
    counts = [3, 8, 1, 5, 2, 2, 9, 4, 6, 1]
    config = make_config(plain_clips(tmp_path, *counts), held_out_fraction=fraction)
    train, held_out = build_data(config)[:2]
    clips = [{name.split('/')[0] for name in names(part)} for part in (train, held_out)]
    assert not clips[0] & clips[1]
    assert len(clips[1]) == 10 * fraction
    assert len(train) + len(held_out) == sum(counts)
    # The training part's partners are those in the whole: no frame of a clip is missing.
    whole = Video(tmp_path, config.data.max_frame_gap)
    for i in range(len(train)):
        found = [train.name(j) for j in train.partners(i)]
        index = int(train.indices[i])
        assert found == [whole.name(j) for j in whole.partners(index)]


def test_clips_of_every_class_are_held_out(tmp_path):
    """With class folders, the fraction is taken of the clips of each class."""
    for name, clips in (('jump', 10), ('fall', 4)):
        for clip in range(clips):
            write_frames(tmp_path / name / f'{clip}', ['1.png', '2.png', '3.png'][: 1 + clip % 3])
    train, held_out = build_data(make_config(tmp_path, held_out_fraction=0.5))[:2]
    for part in (train, held_out):
        clips = {(name.split('/')[0], name.split('/')[1]) for name in names(part)}
        assert sorted(label for label, _ in clips) == ['fall'] * 2 + ['jump'] * 5
    assert held_out.label_names == ('fall', 'jump')


def test_views_picture_shows_both_frames(tmp_path):
    """views.png has a column for each of the two frames behind the views."""
    config = make_config(plain_clips(tmp_path / 'clips', 40), max_frame_gap=30)
    with config.unlocked():
        config.views.image_size = 32
    run = SimpleNamespace(config=config, data=build_data(config), views=views_of(config))
    draw_views(run, tmp_path)
    stream = stream_of(run.data.train, config)
    with Image.open(tmp_path / 'views.png') as picture:
        pixels = np.asarray(picture)
    # Cells of 96 pixels, 6 apart, below a heading of 16.
    assert pixels.shape == (16 + 8 * 102, 6 + 4 * 102, 3)
    for row in range(8):
        shown = [pixels[16 + 102 * row + 48, 6 + 102 * column + 48] for column in range(4)]
        frames = [run.data.train.load(*which)[0, 0] for which in stream.pictures(row)]
        assert frames[0][1] != frames[1][1]
        np.testing.assert_array_equal(shown, [*frames, *frames])


def test_views_picture_of_single_pictures_is_as_before(tmp_path):
    """If both views come from one picture, there is one column of originals."""
    config = make_config(plain_clips(tmp_path / 'clips', 10), max_frame_gap=0)
    run = SimpleNamespace(config=config, data=build_data(config), views=views_of(config))
    draw_views(run, tmp_path)
    with Image.open(tmp_path / 'views.png') as picture:
        assert picture.width == 6 + 3 * 102


# Errors.


def test_clips_of_one_frame_each_are_refused(tmp_path):
    """Pictures without numbers are not clips: the error has an example of a name."""
    write_frames(tmp_path, ['cat.png', 'dog.png', 'ant_left.png'])
    with pytest.raises(UserError, match=r"3 clips of one frame each.*walk_0001.*'folder'"):
        Video(tmp_path, 15)
    assert len(Video(tmp_path, 0)) == 3


def test_a_folder_without_clips(tmp_path):
    """The error has the extensions that count."""
    (tmp_path / 'notes.txt').write_text('nothing')
    with pytest.raises(UserError, match=r'no image or video: not used, 1 \.txt.*\.png.*\.mp4'):
        Video(tmp_path, 1)
    with pytest.raises(UserError, match='does not exist'):
        Video(tmp_path / 'clips', 1)


def test_the_broken_video_of_many_is_named(mixed):
    """One damaged file among good ones is named before training."""
    (mixed / 'bad.mp4').write_bytes((mixed / 'a.mp4').read_bytes()[:-500])
    with pytest.raises(UserError, match=r'bad\.mp4'):
        build_data(make_config(mixed))


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        ({'path': None}, r'--config\.data\.path=DIR with video files'),
        ({'tile_size': 16}, r"data\.tile_size=16 .*'video'"),
        ({'pair_keys': ('image', 'left')}, r"no picture 'left'"),
        ({'pair_keys': ('*_left', '*_right')}, r"no picture '\*_left'"),
    ],
)
def test_what_does_not_go_with_clips(tmp_path, data, message):
    """Missing path, tiles and picture keys are errors that say what to give."""
    write_frames(tmp_path, ['1.png', '2.png'])
    with pytest.raises(UserError, match=message):
        build_data(make_config(tmp_path, **data))


def test_progress_is_told(mixed):
    """The numbers of listed files and decoded videos are counted."""
    told = []
    Video(mixed, 1, progress=lambda *args: told.append(args))
    assert told[0][0] == 'files listed'
    assert [args[1:] for args in told if args[0].startswith('videos')] == [(1, 3), (2, 3), (3, 3)]


def test_config_for_clips(tmp_path):
    """configs/video.py needs a path and nothing else."""
    plain_clips(tmp_path, 12, 12, *([2] * 8))
    config = video_config.get_config()
    with config.unlocked():
        config.data.path = str(tmp_path)
    train, held_out = build_data(config)[:2]
    assert len(train) > len(held_out) > 0
    assert max(len(train.partners(i)) for i in range(len(train))) > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_clips(tmp_path, main_py):
    """main.py trains on clips in class folders, and measures and embeds."""
    clips = tmp_path / 'clips'
    for clip in range(4):
        for kind in ('dark', 'light'):
            write_frames(clips / kind / f'{clip}', [f'{n}.png' for n in range(6)], clip)
        write_video(clips / 'light' / f'{clip}.mp4', 6, clip)
    arguments = [
        '--config=configs/video.py',
        '--config.encoder.name=resnet',
        *TINY,
        '--config.data.tile_size=0',
        f'--config.data.path={clips}',
        '--config.data.held_out_fraction=0.25',
    ]
    done = main_py(*arguments, f'--workdir={tmp_path / "w"}')
    assert done.returncode == 0, done.stderr
    # One clip of four dark ones, and two of eight bright ones.
    assert '54 training examples, 18 held out' in done.stdout
    assert 'Each of 18 held-out pictures' in done.stdout
    for mode in ('evaluate', 'embed'):
        done = main_py(*arguments, f'--workdir={tmp_path / "w"}', f'--mode={mode}')
        assert done.returncode == 0, done.stderr
    assert '72 x ' in done.stdout
    with np.load(tmp_path / 'w' / 'embeddings.npz') as stored:
        assert list(stored['names'][[0, 71]]) == ['dark/0/0.png', 'light/3/5.png']
        assert 'light/0.mp4 #5' in stored['names']
