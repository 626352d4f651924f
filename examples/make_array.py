"""Makes the .npz file of data.source='array' from a folder of pictures, in class folders or not.

    python examples/make_array.py --folder=DIR --output=FILE.npz [--size=S] [--per_class=N]

Without --size, all pictures must have the same size. With it, the centre square of each is resized
to S x S pixels (bicubic, antialiased). Choose about the size of the views: larger pictures give
random crops more detail, but all must fit into the accelerator's memory (N x S x S x 3 bytes).
--per_class keeps the first N pictures of each class, by name.

The file holds 'images', uint8 [N, H, W, 3]; 'names', the paths below the folder; and, for class
folders, 'labels' and 'label_names'. It is not compressed: that would save little and load slowly.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from byol_jax.cores import usable_cores
from byol_jax.errors import BadPicture, UserError
from byol_jax.files import write_whole
from byol_jax.sources.bad_files import BadFile, bad_file, name_some
from byol_jax.sources.base import Source, Subset
from byol_jax.sources.folder import Folder
from byol_jax.views.crop import center_view


def make_array(source: Source, size: int | None) -> dict[str, np.ndarray]:
    """Makes the arrays of the file.

    Args:
      source: the pictures.
      size: side of the stored pictures, pixels; None to keep their size.

    Raises:
      UserError: pictures cannot be read, or they differ in size and `size` is None.
    """
    height, width = (size, size) if size else source.size(0, 'image')
    images = np.empty((len(source), height, width, 3), np.uint8)

    def fill(index: int) -> BadFile | None:
        try:
            picture = source.load(index, 'image')
        except BadPicture as error:
            return bad_file(error)
        if size:
            picture = center_view(picture, size, crop_fraction=1.0)
        if picture.shape != images.shape[1:]:
            return BadFile(source.name(index), f'has {picture.shape[1]}x{picture.shape[0]} pixels')
        images[index] = picture
        return None

    with ThreadPoolExecutor(usable_cores()) as pool:
        bad = [found for found in pool.map(fill, range(len(source))) if found is not None]
    if bad:
        of_other_size = any(file.reason.startswith('has ') for file in bad)
        expected, advice = '', 'Mend, convert or remove them'
        if of_other_size:
            expected = f'The first picture has {width}x{height} pixels. '
            advice += ', or give --size=S to bring all to one size'
        raise UserError(
            f'{expected}{len(bad):,} of {len(source):,} pictures cannot be used: '
            f'{name_some(bad)}. {advice}.'
        )
    arrays = {'images': images, 'names': np.array([source.name(i) for i in range(len(source))])}
    if source.labels is not None:
        arrays |= {'labels': source.labels, 'label_names': np.array(source.label_names)}
    return arrays


def first_of_each_class(source: Source, count: int) -> Source:
    """Keeps the first `count` pictures of each class, in the source's order.

    Raises:
      UserError: the source has no labels.
    """
    if source.labels is None:
        raise UserError(
            f'--per_class={count} needs class folders: every picture in one of at least two '
            'folders directly below --folder.'
        )
    members = [np.flatnonzero(source.labels == label) for label in np.unique(source.labels)]
    return Subset(source, np.sort(np.concatenate([m[:count] for m in members])))


def positive(text: str) -> int:
    """Parses a whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--folder', required=True, help='the pictures')
    parser.add_argument('--output', required=True, type=Path, help='the .npz file to write')
    parser.add_argument('--size', type=positive, help='side of the stored pictures, pixels')
    parser.add_argument('--per_class', type=positive, help='pictures kept of each class')
    arguments = parser.parse_args()
    output = arguments.output.expanduser()
    try:
        if output.suffix != '.npz':
            raise UserError(f'--output={output} must end in .npz.')
        if not output.parent.is_dir():
            raise UserError(f'--output={output}: there is no folder {output.parent}.')
        source: Source = Folder(arguments.folder, given_as='--folder')
        for line in source.unused:
            print(line)
        if arguments.per_class:
            source = first_of_each_class(source, arguments.per_class)
        arrays = make_array(source, arguments.size)
    except UserError as error:
        sys.exit(f'error: {error}')

    def write(partial: Path) -> None:
        # An open file, because NumPy would add .npz to a name.
        with partial.open('wb') as file:
            np.savez(file, **arrays)

    write_whole(output, write)
    images = arrays['images']
    classes = f', {len(arrays["label_names"])} classes' if 'labels' in arrays else ''
    print(
        f'{len(images):,} pictures of {images.shape[2]}x{images.shape[1]}{classes}, '
        f'{images.nbytes / 2**20:.1f} MiB: {output}'
    )


if __name__ == '__main__':
    main()
