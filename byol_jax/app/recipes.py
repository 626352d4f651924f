"""Recipes: config files, found by path or by the name of one that the package includes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from byol_jax.errors import UserError, did_you_mean
from byol_jax.settings import Settings


def recipes_folder() -> Path:
    """The folder of the package's recipes.

    It is byol_jax/configs in an installed package, and configs/ next to byol_jax/ in a checkout.
    """
    package = Path(__file__).resolve().parent.parent
    installed = package / 'configs'
    return installed if installed.is_dir() else package.parent / 'configs'


def recipe_names() -> list[str]:
    """The recipe names that `find_recipe` knows, sorted: those in ./configs and the package's."""
    folders = (Path('configs'), recipes_folder())
    return sorted({path.stem for folder in folders for path in folder.glob('[!_]*.py')})


def find_recipe(name: str) -> str:
    """Finds a config file.

    Args:
      name: 'FILE.py' or 'NAME', optionally with ':ARG'. NAME.py is looked up in ./configs, then
        among the package's recipes.

    Returns:
      'FILE.py' or 'FILE.py:ARG'; the file exists.

    Raises:
      UserError: there is no such file and no such recipe.
    """
    file, colon, argument = name.partition(':')
    candidates = [Path(file).expanduser()]
    if re.fullmatch(r'\w+', file):
        candidates += [folder / f'{file}.py' for folder in (Path('configs'), recipes_folder())]
    for path in candidates:
        if path.is_file():
            return f'{path}{colon}{argument}'
    known = recipe_names()
    beside = [str(path) for path in candidates[0].parent.glob('[!_]*.py')]
    near = did_you_mean(file, beside) or did_you_mean(candidates[0].stem, known)
    kind = 'file' if len(candidates) == 1 else 'file or recipe'
    raise UserError(
        f"--config={name}: there is no {kind} '{file}'.{near} Recipes, by name: {', '.join(known)}."
    )


def load_recipe(name: str) -> Any:
    """Executes a config file.

    Args:
      name: name or path of the recipe, see `find_recipe`.

    Returns:
      The ConfigDict that its `get_config` returns.

    Raises:
      UserError: there is no such recipe, or its code raises.
    """
    found = find_recipe(name)
    file, _, argument = found.partition(':')
    spec = importlib.util.spec_from_file_location('byol_jax_config', file)
    if spec is None or spec.loader is None:
        raise UserError(f'--config={name}: {file} is not a Python file.')
    module = importlib.util.module_from_spec(spec)
    try:
        with recipes_importable():
            spec.loader.exec_module(module)
            return module.get_config(argument) if argument else module.get_config()
    except Exception as error:  # The file is the user's code, which can raise anything.
        kind = '' if type(error) is ValueError else f'{type(error).__name__}: '
        near = did_you_mean(argument, getattr(module, 'ARGUMENTS', ())) if argument else ''
        raise UserError(f'--config={name} cannot be used: {kind}{error}{near}') from error


def check_optimizer(recipe: Mapping[str, Any], config: Settings, given: Collection[str]) -> None:
    """Checks that a changed optimizer does not run with the recipe's learning rate.

    Args:
      recipe: the recipe's values by dotted key.
      config: the settings after the user's changes.
      given: dotted keys that the user has changed.

    Raises:
      UserError: it would, or there is no such optimizer.
    """
    key, own, name = 'optimizer.base_learning_rate', recipe['optimizer.name'], config.optimizer.name
    if name == own or key in given:
        return
    # Imported late, because it imports JAX.
    from byol_jax.training.optimizers import OPTIMIZERS

    # A wrong name is the first thing to report.
    OPTIMIZERS.find(name)
    raise UserError(
        f'optimizer.name={name} needs a learning rate of its own: {recipe[key]:g} is for {own}. '
        f'Give {key} and optimizer.weight_decay too (for adamw 1.5e-4 and 0.1 as in '
        'configs/imagenet_vit.py; small networks take more, 4e-3 on the sample).'
    )


@contextlib.contextmanager
def recipes_importable() -> Iterator[None]:
    """Lets `from configs import NAME` find the package's recipes while a recipe is executed.

    An installed package keeps its recipes in byol_jax/configs, because a top-level package called
    `configs` would conflict with others. If there is an importable `configs`, it is searched first.
    """
    ours = str(recipes_folder())
    theirs = _package_of_configs()
    if hasattr(theirs, '__path__'):
        before = theirs.__path__
        if ours in (str(Path(folder).resolve()) for folder in before):
            yield
            return
        theirs.__path__ = [*before, ours]
        try:
            yield
        finally:
            theirs.__path__ = before
        return
    package = types.ModuleType('configs')
    package.__path__ = [ours]
    sys.modules['configs'] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition('.')[0] == 'configs']:
            del sys.modules[name]
        if theirs is not None:
            sys.modules['configs'] = theirs


def _package_of_configs() -> Any:
    """The importable module `configs`, or None."""
    try:
        return importlib.import_module('configs')
    except ModuleNotFoundError as error:
        if error.name != 'configs':
            raise
        return None
