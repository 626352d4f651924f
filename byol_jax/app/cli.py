"""Parses flags and config files, with helpful errors."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from byol_jax import settings
from byol_jax.app.recipes import (
    check_optimizer,
    find_recipe,
    load_recipe,
    recipe_names,
    recipes_importable,
)
from byol_jax.errors import UserError, did_you_mean
from byol_jax.settings import Settings

_OVERRIDE = re.compile(r'--?config\.([^=]+)(?:=(.*))?', re.DOTALL)

# `*.kwargs.*` overrides from the command line that the config does not list, by dotted key.
_kwargs: dict[str, Any] = {}
# The config as in its file, before overrides, by dotted key.
_own: dict[str, Any] = {}


def checked_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; passed to absl's `app.run` as its flags parser.

    Args:
      argv: the command and its arguments.

    Returns:
      What is left when the flags are taken out: the command alone.

    Raises:
      UserError: a flag, config file or config key does not exist, or a value has the wrong type.
    """
    argv, name = _find_config(_joined(_with_flag_files(argv)))
    if name is not None:
        config = load_recipe(name)
        _own.update(settings.flatten(settings.plain(config)))
        known = list(settings.keys(config))
        argv = [_under_new_name(argument, known) for argument in argv]
        # If the command line names another class, the config's kwargs (and their types) are those
        # of its own class and do not apply.
        given = {match[1] for match in map(_OVERRIDE.fullmatch, argv) if match}
        anew = tuple(f'{part}.kwargs.' for part, key in settings.NAMED.items() if key in given)
        typed = [key for key in known if not key.startswith(anew)]
        argv = [argument for argument in argv if not _is_kwarg(argument, typed)]
        for argument in argv:
            match = _OVERRIDE.fullmatch(argument)
            if match and match[1] not in known:
                raise UserError(
                    f"There is no config key '{match[1]}'.{did_you_mean(match[1], known)} "
                    'configs/default.py lists them.'
                )
        # ml_collections reads the overrides from sys.argv, not from its arguments.
        sys.argv = list(argv)
    try:
        with recipes_importable():  # absl executes the config file once more.
            rest = flags.FLAGS(list(argv))
    except flags.Error as error:
        raise UserError(str(error)) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'The command line cannot be used: {error}') from error
    if len(rest) > 1:
        raise UserError(f"'{rest[1]}' is not a flag: write --name=value.")
    return rest


def load_config(holder: Any) -> Settings:
    """The config with the overrides of the command line, checked.

    A duration given in steps on the command line replaces one in epochs in the config, and vice
    versa. If the command line gives another name (say, of the encoder), the kwargs that the config
    has for its own are dropped.

    Args:
      holder: the flag holder of --config.

    Raises:
      UserError: no config is given, or a value cannot be used.
    """
    if holder.value is None:
        raise UserError(
            f'No --config given. Recipes: {", ".join(recipe_names())}. The flags that a run '
            'began with are in its command.txt.'
        )
    overridden = config_flags.get_override_values(flags.FLAGS[holder.name])
    plain = settings.plain(holder.value)
    said: list[str] = []
    config = settings.modern(settings.changed(plain, {**overridden, **_kwargs}), said)
    for line in said:
        print(line, flush=True)
    checked = Settings.of(config)
    check_optimizer(_own, checked, overridden)
    return checked


def _with_flag_files(argv: Sequence[str]) -> list[str]:
    """Replaces each --flagfile=FILE by the arguments in that file."""
    try:
        return [*argv[:1], *flags.FLAGS.read_flags_from_files(list(argv[1:]), force_gnu=False)]
    except flags.Error as error:
        raise UserError(str(error)) from error


def _joined(argv: Sequence[str]) -> list[str]:
    """Rewrites `--config.key value` as `--config.key=value`."""
    joined: list[str] = []
    for argument in argv:
        match = _OVERRIDE.fullmatch(joined[-1]) if joined else None
        if match and match[2] is None and not argument.startswith('--'):
            joined[-1] += f'={argument}'
        else:
            joined.append(argument)
    return joined


def _under_new_name(argument: str, known: Sequence[str]) -> str:
    """Replaces an old config key in an argument by its new name, and prints a line about it."""
    match = _OVERRIDE.fullmatch(argument)
    if not match or match[1] in known or match[1] not in settings.RENAMED:
        return argument
    new = settings.RENAMED[match[1]]
    print(f'config key {match[1]} is called {new} now', flush=True)
    return f'--config.{new}' + ('' if match[2] is None else f'={match[2]}')


def _find_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Replaces the recipe name after --config by the path of its file.

    Returns:
      The new arguments, and the path; None if --config is not given.
    """
    found = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition('=')
        if flag in ('--config', '-config'):
            name = find_recipe(value if equals else ''.join(argv[i + 1 : i + 2]))
            found[i : i + (1 if equals else 2)] = [f'--config={name}']
            return found, name
    return found, None


def _is_kwarg(argument: str, typed: Sequence[str]) -> bool:
    """Takes --config.PART.kwargs.NAME=VALUE if the config does not define the type of the key.

    The value is kept in `_kwargs` until `load_config` needs it.

    Args:
      argument: one argument of the command line.
      typed: keys whose types the config defines.

    Returns:
      Whether the argument was taken.
    """
    match = _OVERRIDE.fullmatch(argument)
    prefixes = tuple(f'{part}.kwargs.' for part in settings.NAMED)
    if not match or match[1] in typed or not match[1].startswith(prefixes):
        return False
    if match[2] is None:
        raise UserError(f'{argument}: write --config.{match[1]}=VALUE.')
    try:
        value = ast.literal_eval(match[2])
    except (ValueError, SyntaxError):
        value = match[2]
    _kwargs[match[1]] = value
    return True
