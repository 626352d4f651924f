"""A TFDS data set by its name, prepared on disk, with or without the network."""

from __future__ import annotations

import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

import byol_jax.sources.quiet_tensorflow  # noqa: F401  (must come before TFDS imports it)
from byol_jax.errors import UserError, did_you_mean
from byol_jax.sources.folder import existing_folder

_DOWNLOAD_ERRORS = (
    OSError,  # those of requests among them
    AssertionError,  # files that must be downloaded by hand are missing
    tfds.download.DownloadError,
    tfds.download.download_manager.NonMatchingChecksumError,
)

# TFDS puts the arguments of its own call before what is wrong with them.
_PREFIX = re.compile('Failed to construct dataset ".*?", builder_kwargs ".*?": ')


def open_builder(name: str, data_dir: str | None) -> Any:
    """The TFDS builder of a name such as 'imagenette/160px-v2' or 'mnist:3.0.1'.

    Raises:
      UserError: the folder does not exist, or there is no such data set, config or version.
    """
    if data_dir and '://' in data_dir:
        raise UserError(
            f'data.path={data_dir} is no folder of this machine. Records are read in random order, '
            'so copy the prepared data set to a local disk or mount it.'
        )
    if data_dir:
        _check_folder(Path(data_dir).expanduser())
    short = re.split('[/:]', name)[0]
    if ':' in name.split('/')[0] and name.split(':')[0] == 'huggingface':
        raise UserError(
            f"data.name='{name}': data sets of Hugging Face are opened from the network. Prepare "
            'it with TFDS under a name of its own, or save its pictures to a folder.'
        )
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(
            f"data.name='{name}' is no TFDS data set.{did_you_mean(short, known)} "
            'tensorflow.org/datasets/catalog lists them.'
        ) from error
    except (ValueError, AssertionError) as error:
        # How TFDS reports an unknown config or version of a data set it knows.
        configs = ''
        if short in tfds.list_builders(with_community_datasets=False):
            names = tfds.builder_cls(short).builder_configs
            configs = f' Configs: {", ".join(names)}.' if names else ''
        said = _PREFIX.sub('', str(error).splitlines()[0])
        raise UserError(f"data.name='{name}': {said}{configs}") from error


def _check_folder(root: Path) -> None:
    try:
        existing_folder(root)
    except UserError as error:
        # Not made here: a slip of the pen would download everything again, to another place.
        made = '' if root.exists() else ' TFDS prepares data sets in there once you have made it.'
        raise UserError(f'{error}{made}') from error


def prepare(builder: Any, name: str, download: bool) -> None:
    """Has TFDS download and prepare a data set, unless it is on disk; then no network is needed.

    Args:
      builder: of the data set.
      name: of the data set.
      download: whether it may; else what is not on disk is an error.

    Raises:
      UserError: it is not on disk, and must not be downloaded or cannot be.
    """
    if builder.is_prepared():
        return
    missing = f"TFDS '{name}' is not prepared in {builder.data_path}"
    manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    how = (
        f'{_others(builder)}Give the folder that holds it with --config.data.path=DIR; or prepare '
        f'it where the network can be reached, and copy {builder.data_path} from there:\n'
        f'{prepare_command(name, builder.data_dir_root)}'
    )
    if manual:
        how += f'\nIts archives must be downloaded by hand first: {" ".join(manual.split())[:600]}'
    if not download:
        raise UserError(f'{missing}, and data.download=False. {how}')
    try:
        if not manual:
            _check_hosts(builder)
        builder.download_and_prepare()
    except _DOWNLOAD_ERRORS as e:
        raise UserError(
            f'{missing} and could not be downloaded: {type(e).__name__}: {str(e)[:400]}\n{how}'
        ) from e


def prepare_command(name: str, data_dir: Any, file_format: str = '') -> str:
    """The command that prepares a data set; not `tfds build`, which needs Apache Beam for all."""
    which = f", file_format='{file_format}'" if file_format else ''
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{data_dir}'{which}).download_and_prepare()\""
    )


def _others(builder: Any) -> str:
    """Names the versions and configs of the data set that are prepared, in a sentence, or ''."""
    root = Path(builder.data_dir_root)
    found = sorted(path.parent for path in (root / builder.name).glob('**/dataset_info.json'))
    names = [f'{path.parent.relative_to(root).as_posix()}:{path.name}' for path in found]
    return f'Prepared there: {", ".join(names)}. ' if names else ''


def _check_hosts(builder: Any) -> None:
    """Raises OSError at once if a host to download from has no address.

    TFDS would try again for over three minutes before it gave up.
    """
    if urllib.request.getproxies():
        return  # The proxy resolves the names.
    urls = builder.url_infos or ()
    for host in sorted({urllib.parse.urlparse(url).hostname or '' for url in urls}):
        try:
            socket.getaddrinfo(host, 443)
        except socket.gaierror as error:
            raise OSError(f'{host} cannot be reached ({error.strerror})') from error
