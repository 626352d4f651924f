"""--mode=compare: runs side by side, in the terminal and as a page."""

from __future__ import annotations

import shutil
from pathlib import Path

from byol_jax.app.report.compare_page import is_comparison, write_page
from byol_jax.app.report.compare_run import read_runs
from byol_jax.app.report.compare_tables import tables
from byol_jax.app.report.compare_text import text_of
from byol_jax.errors import UserError

_DEFAULT = Path('compare.html')


def compare(workdirs: str | None, output: Path | None) -> None:
    """Prints a comparison of runs and writes it as a page; reads their workdirs only.

    Args:
      workdirs: of two runs or more, separated by commas.
      output: the page; None: compare.html in the current folder.

    Raises:
      UserError: the runs cannot be compared, or the page would replace something else.
    """
    path = output or _DEFAULT
    given = [name.strip() for name in (workdirs or '').split(',')]
    runs = read_runs([Path(name).expanduser() for name in given if name])
    _check_output(path)
    made = tables(runs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(path, runs, made)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}.') from error
    width = shutil.get_terminal_size().columns
    print(text_of([run.name for run in runs], made, width))
    print(f'\nwritten: {path}')


def _check_output(path: Path) -> None:
    if path.suffix.lower() not in ('.html', '.htm'):
        raise UserError(f'--output={path}: the comparison is a web page, give it a name in .html.')
    if path.is_dir():
        raise UserError(f'--output={path} is a folder: give the name of a file.')
    if path.exists() and not is_comparison(path):
        raise UserError(
            f'{path} is there already and is no page of --mode=compare, so it is not replaced. '
            'Give another --output=FILE.html.'
        )
