"""Image files: any tree, a list of paths, pairs of files by their names, and DIV2K as unpacked."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from byol_jax.errors import UserError, did_you_mean, printable
from byol_jax.sources.base import Progress, Source, no_progress
from byol_jax.sources.decode import EXTENSIONS, read_file, read_size
from byol_jax.sources.file_list import Listing, Names, listed

# How many files a message names.
_SHOWN = 5
# Kinds of files that a message counts.
_KINDS = 8
# Extensions of pictures that are not read.
_PICTURES = frozenset(
    (
        *('.tif', '.tiff', '.gif', '.jfif', '.avif', '.heic', '.heif', '.jp2', '.jxl', '.ppm'),
        *('.pgm', '.tga', '.dng', '.cr2', '.nef', '.arw', '.dcm', '.exr', '.hdr', '.ico', '.psd'),
    )
)


class ImageFiles(Source):
    """Examples whose pictures are image files.

    Attributes:
      root: the folder they lie in; None if they are given by whole paths.
      max_megapixels: larger pictures are refused.
    """

    own_files = True

    def __init__(self, root: Path | None, files: Mapping[str, Names], max_megapixels: float):
        """Reads nothing yet.

        Args:
          root: the folder; None if `files` are whole paths.
          files: the file of each example by key; paths relative to `root`, with '/'.
          max_megapixels: larger pictures are refused.
        """
        self.root = root
        self.max_megapixels = max_megapixels
        self.keys = tuple(files)
        self._files = files
        self._first = files[self.keys[0]]
        # The beginning of every path, as pathlib writes it; a Path for each name would be slow.
        self._prefix = '' if root is None else str(root / '_')[:-1]

    def __len__(self) -> int:
        return len(self._first)

    def load(self, index: int, key: str) -> np.ndarray:
        return read_file(Path(self.file(index, key)), self.max_megapixels)

    def name(self, index: int) -> str:
        """The file of the first key, as it was given."""
        return self._first[index]

    def names(self, indices: np.ndarray) -> Iterator[str]:
        return self._first.some(indices.tolist())

    def file(self, index: int, key: str) -> str:
        return self._prefix + self._files[key][index]

    def size(self, index: int, key: str) -> tuple[int, int]:
        return read_size(Path(self.file(index, key)), self.max_megapixels)


class Folder(ImageFiles):
    """Every image below a folder, sorted by path.

    The labels are the folders directly below `root`, as in `train/cat/1.jpg`, if there are at least
    two and every image lies in one of them. Otherwise there are no labels.
    """

    def __init__(
        self,
        root: str | Path,
        max_megapixels: float = 200,
        given_as: str = 'data.path',
        index: str = '',
        progress: Progress = no_progress,
        exclude: Sequence[str] = (),
    ):
        """Lists the files; decodes none.

        Args:
          root: the folder.
          max_megapixels: larger pictures are refused.
          given_as: the flag or key by which the user gave the folder, for messages.
          index: the file that keeps the list (data.index): '' for none, 'auto' for one in the
            user's cache folder.
          progress: called with the number of files listed.
          exclude: patterns of files and folders that are left out (data.exclude).

        Raises:
          UserError: the folder does not exist, is a file, holds no image, or cannot be listed
            completely.
        """
        root = Path(root).expanduser()
        files, self.unused = list_files(
            root, given_as, index=index, progress=progress, exclude=exclude
        )
        super().__init__(root, {'image': files}, max_megapixels)
        self.labels, self.label_names = class_labels(files)
        self.unlabelled = '' if self.label_names else why_no_labels(files)


class Files(ImageFiles):
    """Image files from a list of paths, in the given order, without labels."""

    def __init__(self, paths: Sequence[str | Path], max_megapixels: float = 200):
        """Checks that the files exist; decodes none.

        Args:
          paths: paths of the files.
          max_megapixels: larger pictures are refused.

        Raises:
          UserError: the list is empty, or files are missing; the message names the first few.
        """
        if not paths:
            raise UserError('The list of files is empty: there is nothing to train on.')
        found = [Path(path).expanduser() for path in paths]
        missing = [str(path) for path in found if not path.exists()]
        if missing:
            more = f', and {len(missing) - _SHOWN:,} more' if len(missing) > _SHOWN else ''
            raise UserError(
                f'{len(missing):,} of {len(found):,} files do not exist: '
                f'{", ".join(missing[:_SHOWN])}{more}.'
            )
        super().__init__(None, {'image': Names.of(map(str, found))}, max_megapixels)


class FilePairs(ImageFiles):
    """Examples of two pictures each: files of a folder, paired by two patterns of names.

    A pattern is a path relative to the folder, without the extension, with one `*` that stands for
    anything: `*_left` and `*_right` pair `street/7_left.png` with `street/7_right.jpg`, and
    `left/*` and `right/*` pair `left/7.png` with `right/7.png`. The patterns are the keys of the
    pictures. Files that match neither are left out. The labels are those that `Folder` gives the
    files of the first pattern.
    """

    def __init__(
        self,
        root: str | Path,
        patterns: tuple[str, ...],
        max_megapixels: float = 200,
        index: str = '',
        progress: Progress = no_progress,
        exclude: Sequence[str] = (),
    ):
        """Lists the files; decodes none.

        Args:
          root: the folder.
          patterns: the patterns of the pictures' names.
          max_megapixels: larger pictures are refused.
          index: as in `Folder`.
          progress: as in `Folder`.
          exclude: as in `Folder`.

        Raises:
          UserError: the folder does not exist or holds no image, a pattern does not hold exactly
            one `*` or matches no file, or a file has no partner, or two.
        """
        root = Path(root).expanduser()
        keys = tuple(dict.fromkeys(patterns))
        for pattern in keys:
            if pattern.count('*') != 1:
                raise UserError(
                    f'data.pair_keys={patterns}: a pattern of file names must hold one *, such as '
                    f"'*_left'; '{pattern}' holds {pattern.count('*')}."
                )
        files, unused = list_files(
            root, 'data.path', index=index, progress=progress, exclude=exclude
        )
        found = {pattern: _matching(root, pattern, files) for pattern in keys}
        first = found[keys[0]]
        for pattern, other in found.items():
            _check_partners(root, files, first, other, pattern)
            _check_partners(root, files, other, first, keys[0])
        # All keys in the order of the first pattern's files.
        chosen = {key: files.take(found[key][name] for name in first) for key in keys}
        super().__init__(root, chosen, max_megapixels)
        self.labels, self.label_names = class_labels(chosen[keys[0]])
        self.unlabelled = '' if self.label_names else why_no_labels(chosen[keys[0]])
        # An array: as a set, a million places take 50 MB more.
        lone = np.ones(len(files), bool)
        for places in found.values():
            lone[np.fromiter(places.values(), np.int64, len(places))] = False
        alone = np.flatnonzero(lone).tolist()
        self.unused = unused
        if alone:
            some = _some([files[place] for place in alone[:_SHOWN]], len(alone))
            self.unused = [
                *unused,
                f'not used, {len(alone):,} images that match neither pattern of data.pair_keys: '
                f'{some}',
            ]


def _matching(root: Path, pattern: str, files: Names) -> dict[str, int]:
    """The places in `files` of those that match a pattern, by the text that its * stands for."""
    before, after = pattern.split('*')
    found: dict[str, int] = {}
    for place, file in enumerate(files):
        name = file[: file.rindex('.')]
        if not (name.startswith(before) and name.endswith(after)):
            continue
        between = name[len(before) : len(name) - len(after)]
        if between in found:
            raise UserError(
                f'{files[found[between]]} and {file} in {root} are the same picture to '
                f"the pattern '{pattern}'. Take one of them out."
            )
        if between:
            found[between] = place
    if not found:
        raise UserError(
            f"No image in {root} follows the pattern '{pattern}' of data.pair_keys; its "
            f'{len(files):,} images are {", ".join(files[:_SHOWN])}'
            f'{", ..." if len(files) > _SHOWN else ""}. A pattern is written without the extension.'
        )
    return found


def _check_partners(
    root: Path, files: Names, some: dict[str, int], others: dict[str, int], pattern: str
) -> None:
    """Raises UserError if some files have no partner among the `others`, which match `pattern`."""
    alone = [place for name, place in some.items() if name not in others]
    if alone:
        shown = ', '.join(files[place] for place in alone[:_SHOWN])
        raise UserError(
            f"{len(alone):,} of {len(some):,} images in {root} have no partner '{pattern}'"
            f': {shown}{", ..." if len(alone) > _SHOWN else ""}. Add the partners, or take '
            'these files out.'
        )


_DIV2K_SUBSETS = {'train': 'train', 'validation': 'valid', 'valid': 'valid'}


class Div2k(ImageFiles):
    """DIV2K as unpacked from its own archives: pictures in high and bicubically reduced resolution.

    `root` holds `DIV2K_train_HR/0001.png` and, for 'lr', `DIV2K_train_LR_bicubic/X2/0001x2.png`
    (`valid` for the validation split). `root` may also be the HR folder itself.
    """

    def __init__(
        self, root: str | Path, split: str, keys: tuple[str, ...], max_megapixels: float = 200
    ):
        """Lists the pictures and checks that each has all of `keys`; decodes none.

        Args:
          root: the folder.
          split: 'train' or 'validation'.
          keys: the pictures that are used: 'hr', 'lr' or both.
          max_megapixels: larger pictures are refused.

        Raises:
          UserError: a folder or a picture's partner is missing.
        """
        root = existing_folder(Path(root).expanduser())
        if split not in _DIV2K_SUBSETS:
            raise UserError(f"data.split='{split}': DIV2K's folders have 'train' and 'validation'.")
        subset = _DIV2K_SUBSETS[split]
        if root.name == f'DIV2K_{subset}_HR':
            root = root.parent
        folder = root / f'DIV2K_{subset}_HR'
        if not folder.is_dir():
            raise UserError(
                f'data.path={root} holds no folder {folder.name}. It holds: '
                f'{", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"}. A folder '
                'that TFDS has prepared DIV2K in would hold div2k.'
            )
        names = sorted(path.name for path in folder.glob('[0-9]*.png'))
        if not names:
            raise UserError(f'{folder} holds no picture such as 0001.png.')
        files = {'hr': Names.of(f'{folder.name}/{name}' for name in names)}
        if 'lr' in keys:
            files['lr'] = Names.of(_reduced(root, subset, names))
        super().__init__(root, files, max_megapixels)
        # The data set has both, while `files` has only those that are used.
        self.keys = ('hr', 'lr')

    def name(self, index: int) -> str:
        """The picture's own name, such as 0001.png."""
        return Path(super().name(index)).name

    def names(self, indices: np.ndarray) -> Iterator[str]:
        return map(self.name, indices.tolist())


def prepared_by_tfds(root: str | Path) -> bool:
    """Whether a folder holds DIV2K as prepared by TFDS, not as unpacked from its archives."""
    root = Path(root).expanduser()
    return (root / 'div2k').is_dir() and not any(root.glob('DIV2K_*_HR'))


def _reduced(root: Path, subset: str, names: Sequence[str]) -> list[str]:
    """The low-resolution file of each high-resolution file, in the smallest factor that exists."""
    folders = sorted((root / f'DIV2K_{subset}_LR_bicubic').glob('X[0-9]'))
    if not folders:
        raise UserError(
            f"data.pair_keys asks for 'lr', but {root} holds no folder "
            f'DIV2K_{subset}_LR_bicubic/X2.'
        )
    factor = re.sub('[^0-9]', '', folders[0].name)
    files = [folders[0] / f'{Path(name).stem}x{factor}.png' for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f'{folders[0]} lacks {len(missing)} of {len(files)} pictures, {missing[0]} first.'
        )
    return [file.relative_to(root).as_posix() for file in files]


def existing_folder(root: Path, key: str = 'data.path') -> Path:
    """Returns `root`; raises UserError, with the nearest folder's name, if it is not a folder."""
    if root.is_dir():
        return root
    if root.exists():
        raise UserError(f'{key}={root} is a file, not a folder.')
    beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
    raise UserError(f'{key}={root} does not exist.{did_you_mean(root.name, beside)}')


def list_files(
    root: Path,
    given_as: str,
    extensions: tuple[str, ...] = EXTENSIONS,
    kind: str = 'image',
    index: str = '',
    progress: Progress = no_progress,
    exclude: Sequence[str] = (),
) -> tuple[Names, list[str]]:
    """Lists all files below a folder that have one of some extensions; skips hidden files.

    Args:
      root: the folder.
      given_as: the flag or key by which the user gave the folder, for messages.
      extensions: extensions in lower case, such as '.jpg'.
      kind: what messages call the files.
      index: the file that keeps the list (data.index): '' for none, 'auto' for one in the user's
        cache folder.
      progress: called with the number of files listed.
      exclude: patterns of what is left out (data.exclude).

    Returns:
      Paths relative to `root` with '/', sorted, and lines about what is there and not used.

    Raises:
      UserError: the folder does not exist, holds no such file, or cannot be listed.
    """
    listing = listed(existing_folder(root, given_as), extensions, index, progress, exclude)
    unused = unused_lines(listing, extensions, kind)
    if not listing.files:
        there = '; '.join(unused) or f'no file ends in {", ".join(extensions)}'
        raise UserError(f'{given_as}={root} holds no {kind}: {there}.')
    return listing.files, unused


def unused_lines(listing: Listing, extensions: tuple[str, ...], kind: str = 'image') -> list[str]:
    """Lines for a person about files that a listing leaves out, by extension and with examples.

    Args:
      listing: of a folder.
      extensions: of the files that are used.
      kind: what the files are called.
    """
    lines = []
    if listing.others:
        counted = sorted(listing.others.items(), key=lambda item: (-item[1].number, item[0]))
        kinds = [f'{found.number:,} {ext or "without an extension"}' for ext, found in counted]
        total = sum(found.number for found in listing.others.values())
        # One of each kind, and more of the first.
        examples = [found.examples[0] for _, found in counted] + counted[0][1].examples[1:]
        pictures = sorted(_PICTURES & listing.others.keys())
        ways = f'; convert {", ".join(pictures)} to PNG or JPEG to use them' if pictures else ''
        if len(kinds) > _KINDS:
            kinds[_KINDS:] = ['others']
        lines.append(
            f'not used, {", ".join(kinds)}: {_some(examples, total)} ({kind} files end in '
            f'{", ".join(extensions)}{ways})'
        )
    for what, found in listing.left_out.items():
        # Files that nobody would take for data, such as .DS_Store, are not worth a line.
        hidden = what == 'hidden files'
        if not hidden or any(name.lower().endswith(extensions) for name in found.examples):
            lines.append(f'left out, {what}: {_some(found.examples, found.number)}')
    return lines


def _some(names: Sequence[str], total: int) -> str:
    """The first few of some names, and how many more there are."""
    shown = ', '.join(printable(name) for name in names[:_SHOWN])
    more = total - min(len(names), _SHOWN)
    return shown + (f', and {more:,} more' if more else '')


def class_labels(files: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels files by the folder on the first level in which they lie.

    Args:
      files: paths relative to the root, with '/', sorted.

    Returns:
      The label of each file, int [N], and the names of the labels. (None, ()) if there are fewer
      than two such folders, or if a file lies in none.
    """
    tops: list[str] = []
    ends = [0]
    while ends[-1] < len(files):
        top, slash, _ = files[ends[-1]].partition('/')
        if not slash:
            return None, ()
        tops.append(top)
        ends.append(_end(files, ends[-1], top))
    if len(tops) < 2:
        return None, ()
    # Sort again: '.' sorts before '/', so paths in 'a.b' come before those in 'a', but the name 'a'
    # comes before 'a.b'.
    order = sorted(range(len(tops)), key=tops.__getitem__)
    label = np.empty(len(tops), np.int64)
    label[order] = np.arange(len(tops))
    return np.repeat(label, np.diff(ends)), tuple(tops[i] for i in order)


def why_no_labels(files: Sequence[str]) -> str:
    """Why `class_labels` finds none, for a person.

    Args:
      files: as there.
    """
    tops: dict[str, int] = {}
    beside: list[str] = []
    place = stray = 0
    while place < len(files):
        top, slash, _ = files[place].partition('/')
        if slash:
            end = _end(files, place, top)
            tops[top] = tops.get(top, 0) + end - place
            place = end
            continue
        stray += 1
        if len(beside) < _SHOWN:
            beside.append(top)
        place += 1
    if not tops:
        return 'no image lies in a class folder'
    folders = _some([f'{top} ({count:,})' for top, count in sorted(tops.items())], len(tops))
    if stray:
        return (
            f'{stray:,} of {len(files):,} images lie beside the class folders {folders}: '
            f'{_some(beside, stray)}. Move them into one of these, or leave them out with '
            'data.exclude'
        )
    return f'all images lie in the one folder {folders}'


def _end(files: Sequence[str], start: int, top: str) -> int:
    """The end of the files in folder `top`, which begin at `start`.

    Found by a binary search: `files` makes each string when it is indexed, which is slow for a
    million.
    """
    step = 1
    while start + step < len(files) and files[start + step].startswith(top + '/'):
        step *= 2
    # '0' is the character after '/'.
    return bisect_left(files, top + '0', start + step // 2, min(start + step, len(files)))
