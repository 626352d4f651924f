"""The workdir of a run: which run it belongs to, and what may differ when the run resumes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from byol_jax import settings
from byol_jax.app.fingerprint import Excused, check_same_data, no_excuse
from byol_jax.app.hosts import say
from byol_jax.app.lock import release_lock, take_lock
from byol_jax.app.old_config import check_config, completed
from byol_jax.app.side_files import SideFile
from byol_jax.errors import UserError
from byol_jax.files import (
    Damaged,
    not_a_file,
    read_object,
    seal_holds,
    sealed,
    set_aside,
    write_object,
)
from byol_jax.settings import Settings

# What a workdir has of files, besides those that one process alone reads and writes.
_FILES = (
    'command.txt',
    'metrics.jsonl',
    'alarms.jsonl',
    'bad_files.txt',
    'layers.txt',
    'views.png',
    'report.html',
    'results.json',
)
_FOLDERS = ('tensorboard', 'encoder')

# Numbers of data.json; all else in it is text.
_COUNTS = ('examples', 'held_out')


class Start(NamedTuple):
    """The weights that an encoder started from (encoder.init_from).

    Attributes:
      source: as it was given.
      weights_sha256: of the encoder.
    """

    source: str
    weights_sha256: str


class About(NamedTuple):
    """What identifies a run besides its config and data; '' or empty: not known.

    Attributes:
      layer: path of the tapped layer.
      computed: what parts of the user's own compute (`computed.computed`).
      start: first weights; None: random.
    """

    layer: str = ''
    computed: Mapping[str, Any] = {}
    start: Start | None = None


class Begun(NamedTuple):
    """A run as its workdir knows it.

    Attributes:
      config: plain values, perhaps of an older version.
      data: `fingerprint.fingerprint`; empty: not known.
      about: see `About`; None: it was begun by a version that kept none.
      damage: files that are not as they were written, or missing.
    """

    config: dict[str, Any]
    data: dict[str, Any]
    about: About | None
    damage: tuple[Damaged, ...]


def read_begun(workdir: Path) -> Begun | None:
    """The run that a workdir belongs to; None for no run.

    config.json and data.json are there once more in identity.json, with a digest of all: where they
    differ from that, they are damaged.

    Raises:
      UserError: it belongs to a run, and which one cannot be told; or a file cannot be read.
    """
    identity, of_identity = _tolerant(workdir / 'identity.json', _check_identity)
    config, of_config = _tolerant(workdir / 'config.json', check_config)
    data, of_data = _tolerant(workdir / 'data.json', _check_data)
    if identity is None:
        if of_config is not None:
            raise UserError(f'{of_config} Restore it, or give another --workdir.')
        if config is None:
            _check_no_checkpoints(workdir)
            return None
        damage = tuple(each for each in (of_identity, of_data) if each)
        return Begun(config, data or {}, None, damage)
    of_config = of_config or _other(workdir / 'config.json', config, identity['config'])
    of_data = of_data or _other(workdir / 'data.json', data, identity['data'])
    start = identity['start']
    about = About(identity['layer'], identity['computed'], None if start is None else Start(*start))
    damage = tuple(each for each in (of_config, of_data) if each)
    return Begun(identity['config'], identity['data'], about, damage)


def _tolerant(
    path: Path, check: Callable[[Path, Mapping[str, Any]], None]
) -> tuple[dict[str, Any] | None, Damaged | None]:
    """The object in a file, and what is wrong with the file."""
    try:
        content = read_object(path)
        if content is not None:
            check(path, content)
    except Damaged as damage:
        return None, damage
    return content, None


def _other(path: Path, found: Any, right: Any) -> Damaged | None:
    """What is wrong with a file that should hold `right`."""
    if found == right:
        return None
    return Damaged(path, 'it is missing' if found is None else 'it is not what the run began with')


def _check_identity(path: Path, content: Mapping[str, Any]) -> None:
    if not seal_holds(content):
        raise Damaged(path, 'the digest in it is not that of the rest')


def _check_data(path: Path, content: Mapping[str, Any]) -> None:
    for key in _COUNTS:
        value = content.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise Damaged(path, f"its '{key}' is {value!r}")
    for key, value in content.items():
        if key not in _COUNTS and not isinstance(value, str):
            raise Damaged(path, f"its '{key}' is {value!r}")


def _check_no_checkpoints(workdir: Path) -> None:
    if os.path.lexists(workdir / 'checkpoints'):
        raise UserError(
            f'{workdir} holds checkpoints but no config.json: it is not clear whose they are. '
            'Give another --workdir, or move them away.'
        )


def claim_workdir(
    workdir: Path,
    config: Any,
    data: Mapping[str, Any],
    command: str = '',
    *,
    about: About | None = None,
    excused: Excused = no_excuse,
) -> None:
    """Creates the workdir of a new run, or checks that it belongs to this config and data.

    Then locks it for this process, and mends what is damaged and known.

    Args:
      workdir: the workdir of the run.
      config: the run's config, whatever `Settings.of` takes.
      data: what the run trains on, from `fingerprint`; written to data.json.
      command: the command line; written to command.txt for people to read.
      about: what else identifies the run.
      excused: finds files that may have changed (`check_same_data`).

    Raises:
      UserError: the workdir belongs to another config or other data (the message names the
        differences), another process is training there, or it cannot be written. Nothing is
        overwritten in these cases.
    """
    config, about = Settings.of(config), about or About()
    begun = read_begun(workdir)
    said: list[str] = []
    if begun is not None:
        said = _check_same(workdir, begun, config, data, about, excused)
    plain = config.plain
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_written(workdir, error) from error
    take_lock(workdir)
    try:
        for line in said:
            say(line)
        if begun is None:
            _begin(workdir, plain, data, about)
        else:
            _mend(workdir, begun, data, about)
        _set_odd_aside(workdir)
        _write_command(workdir, command)
    except OSError as error:
        release_workdir(workdir)
        raise _cannot_be_written(workdir, error) from error


def _cannot_be_written(workdir: Path, error: OSError) -> UserError:
    return UserError(f'--workdir={workdir} cannot be written: {error.strerror or error}.')


def _check_same(
    workdir: Path,
    begun: Begun,
    config: Settings,
    data: Mapping[str, Any],
    about: About,
    excused: Excused,
) -> list[str]:
    """Checks that a run is the one that a workdir belongs to; returns lines for a person."""
    then = begun.about or About()
    # Imported here: a comparison needs neither networks nor optimizers.
    from byol_jax.app.computed import check_same_computed

    examples = (begun.data or data).get('examples', 0)
    _check_config_same(workdir, begun, config, examples, (then.layer, about.layer))
    said = check_same_data(begun.data, data, excused) if begun.data else []
    check_same_computed(then.computed, about.computed, config)
    return said


def _begin(workdir: Path, plain: dict[str, Any], data: Mapping[str, Any], about: About) -> None:
    write_object(workdir / 'data.json', data)
    # From now on the workdir is this run's.
    write_object(workdir / 'config.json', plain)
    _write_identity(workdir, plain, data, about)


def _mend(workdir: Path, begun: Begun, data: Mapping[str, Any], about: About) -> None:
    """Writes what is damaged, missing or was not kept by an older version."""
    for damage in begun.damage:
        kept = ''
        if os.path.lexists(damage.path):
            kept = f'; what was there is kept as {set_aside(damage.path).name}'
        say(f'{damage} It is written again from what is known{kept}')
    damaged = {damage.path.name for damage in begun.damage}
    if 'config.json' in damaged:
        write_object(workdir / 'config.json', begun.config)
    if 'data.json' in damaged or begun.data != data:
        write_object(workdir / 'data.json', data)
    then = begun.about
    if then is None:
        say(f'{workdir / "identity.json"} notes from now on by what this run is known again')
        then = about
    # A part that could not be looked at then may be looked at now.
    kept_about = then._replace(
        layer=then.layer or about.layer, computed={**about.computed, **then.computed}
    )
    if (kept_about, data) != (begun.about, begun.data) or 'identity.json' in damaged:
        _write_identity(workdir, begun.config, data, kept_about)


def _write_identity(
    workdir: Path, plain: Mapping[str, Any], data: Mapping[str, Any], about: About
) -> None:
    content = {
        'config': plain,
        'data': dict(data),
        'layer': about.layer,
        'computed': dict(about.computed),
        'start': None if about.start is None else list(about.start),
    }
    write_object(workdir / 'identity.json', sealed(content))


def _set_odd_aside(workdir: Path) -> None:
    """Makes room where a folder, a pipe or a broken link is in the place of a file of ours."""
    for name in (*_FILES, *_FOLDERS):
        path = workdir / name
        if not os.path.lexists(path):
            continue
        right = path.is_dir() if name in _FOLDERS else path.exists() and _is_file(path)
        if not right:
            kind = 'folder' if name in _FOLDERS else 'file'
            say(f'{path} is no {kind}; it is kept as {set_aside(path).name}')


def _is_file(path: Path) -> bool:
    return not not_a_file(path.stat())


def check_workdir(workdir: Path, config: Any) -> None:
    """Raises UserError if a workdir belongs to a run with another config."""
    begun = read_begun(workdir)
    if begun is not None:
        _check_config_same(workdir, begun, Settings.of(config), begun.data.get('examples', 0))


def _check_config_same(
    workdir: Path,
    begun: Begun,
    config: Settings,
    examples: int,
    layers: tuple[str, str] = ('', ''),
) -> None:
    from byol_jax.app.identity import changed_keys, refusal

    try:
        changed = changed_keys(begun.config, config, examples, layers)
    except UserError as error:
        raise _without_meaning(workdir, error) from error
    if changed:
        raise refusal(workdir, changed)


def _without_meaning(workdir: Path, error: UserError) -> UserError:
    return UserError(
        f'{workdir / "config.json"} is of another version, or damaged: {error} Give another '
        '--workdir.'
    )


def check_apart(workdir: Path, data: settings.Data) -> None:
    """Raises UserError if the workdir is the folder of the data: views.png would become data."""
    if data.path and os.path.realpath(os.path.expanduser(data.path)) == os.path.realpath(workdir):
        raise UserError(
            f'--workdir={workdir} is the folder of the pictures, data.path={data.path}: what is '
            'written there would become data. Give another --workdir; one inside of the folder '
            'will do.'
        )


def release_workdir(workdir: Path) -> None:
    """Releases the lock on a workdir if this process holds it."""
    release_lock(workdir)


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run has saved a state there."""
    folder = workdir / 'checkpoints'
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def _write_command(workdir: Path, command: str) -> None:
    if command:
        # A path on a command line may hold bytes that are no valid text.
        text = f'{command}\n'.encode(errors='surrogateescape')
        SideFile(workdir / 'command.txt').replace(lambda partial: partial.write_bytes(text))


def config_of_run(workdir: Path) -> Settings:
    """Reads the config that a run began with.

    Raises:
      UserError: there is no run, its config is damaged, or it has no meaning here.
    """
    begun = read_begun(workdir)
    if begun is None:
        raise UserError(f'{workdir} belongs to no run: there is no config.json in it.')
    try:
        return Settings.of(completed(begun.config))
    except UserError as error:
        raise _without_meaning(workdir, error) from error


def steps_between_records(workdir: Path) -> int:
    """log.every_steps that the run of a workdir began with; it may be another now. 0: not known."""
    begun = read_begun(workdir)
    steps = 0 if begun is None else completed(begun.config)['log']['every_steps']
    return steps if isinstance(steps, int) else 0
