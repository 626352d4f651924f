"""Flags and config files with errors that a person can use."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from byol_jax.app.plan import OPTIMIZERS, unknown_optimizer
from byol_jax.app.recipes import (
    find_recipe,
    load_recipe,
    recipe_names,
    recipes_importable,
)
from byol_jax.errors import UserError, did_you_mean

_OVERRIDE = re.compile(r'--?config\.([^=]+)(?:=(.*))?', re.DOTALL)
_KWARGS = 'encoder.kwargs.'

# Durations of which a config has exactly one, in epochs or in steps.
_DURATIONS = ('total', 'warmup', 'checkpoint.every')

# Arguments for the encoder given on the command line; its constructor knows them, no config does.
_encoder_kwargs: dict[str, Any] = {}
# Config keys given on the command line.
_overridden: set[str] = set()


def checked_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; absl's parser for `app.run`.

    Raises:
      UserError: a flag, config file or config key does not exist, or a value does not fit.
    """
    argv, name = _find_config(argv)
    if name is not None:
        config = load_recipe(name)
        known = _keys(config)
        # With another encoder, the types of the arguments of the config's own mean nothing.
        another = any(argument.lstrip('-').startswith('config.encoder.name') for argument in argv)
        typed = [key for key in known if not (another and key.startswith(_KWARGS))]
        argv = [argument for argument in argv if not _is_encoder_argument(argument, typed)]
        for argument in argv:
            match = _OVERRIDE.fullmatch(argument)
            if not match:
                continue
            if match[1] not in known:
                raise UserError(
                    f"There is no config key '{match[1]}'.{did_you_mean(match[1], known)} "
                    'configs/default.py lists them.'
                )
            _overridden.add(match[1])
        _check_optimizer(config, argv)
        # ml_collections reads the overrides from here, not from what it is given.
        sys.argv = list(argv)
    try:
        with recipes_importable():  # It executes the config file once more.
            rest = flags.FLAGS(list(argv))
    except flags.Error as error:
        raise UserError(str(error)) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'The command line cannot be used: {error}') from error
    if len(rest) > 1:
        raise UserError(f"'{rest[1]}' is not a flag: write --name=value.")
    return rest


def load_config(holder: Any) -> Any:
    """The config of a config_flags holder, with the encoder's arguments, resolved and locked.

    A duration given in steps on the command line takes the place of the config's epochs, and the
    other way round.

    Raises:
      UserError: no config was given.
    """
    if holder.value is None:
        raise UserError(
            f'No --config given. Recipes: {", ".join(recipe_names())}. The flags that a run '
            'began with are in its command.txt.'
        )
    config = holder.value.copy_and_resolve_references().unlock()
    if 'encoder.name' in _overridden:
        # The config's own arguments are for the encoder it names.
        config.encoder.kwargs = {}
        config.encoder.kwargs.unlock()
    for key, value in _encoder_kwargs.items():
        config.encoder.kwargs[key] = value
    for name in _DURATIONS:
        for given, other in (('steps', 'epochs'), ('epochs', 'steps')):
            if f'{name}_{given}' in _overridden and f'{name}_{other}' not in _overridden:
                config.update_from_flattened_dict({f'{name}_{other}': None})
    return config.lock()


def _check_optimizer(config: Any, argv: Sequence[str]) -> None:
    """Raises UserError if another optimizer would run with this one's learning rate."""
    given = [
        a.partition('=')[2] for a in argv if a.lstrip('-').startswith('config.optimizer.name=')
    ]
    key = 'optimizer.base_learning_rate'
    if given and given[-1] not in OPTIMIZERS:
        raise unknown_optimizer(given[-1])
    if given and given[-1] != config.optimizer.name and key not in _overridden:
        raise UserError(
            f"--config.optimizer.name={given[-1]} needs a learning rate of its own: the config's "
            f'{config.optimizer.base_learning_rate:g} is for {config.optimizer.name}. Add '
            f'--config.{key}=RATE and --config.optimizer.weight_decay=DECAY (for adamw 1.5e-4 and '
            '0.1 as in configs/imagenet_vit.py; small networks take more, 4e-3 on the sample).'
        )


def _find_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments with the file that --config names in place of the name; that file, or None."""
    found = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition('=')
        if flag in ('--config', '-config'):
            name = find_recipe(value if equals else ''.join(argv[i + 1 : i + 2]))
            found[i : i + (1 if equals else 2)] = [f'--config={name}']
            return found, name
    return found, None


def _is_encoder_argument(argument: str, known: Sequence[str]) -> bool:
    """Notes --config.encoder.kwargs.NAME=VALUE for an argument whose type `known` does not give."""
    match = _OVERRIDE.fullmatch(argument)
    if not match or match[1] in known or not match[1].startswith(_KWARGS):
        return False
    if match[2] is None:
        raise UserError(f'{argument}: write --config.{match[1]}=VALUE.')
    try:
        value = ast.literal_eval(match[2])
    except (ValueError, SyntaxError):
        value = match[2]
    _encoder_kwargs[match[1].removeprefix(_KWARGS)] = value
    return True


def _keys(config: Any, prefix: str = '') -> list[str]:
    """All keys of a config, dotted, sections included."""
    keys = []
    for key in config:
        keys.append(prefix + key)
        if hasattr(config[key], 'keys'):
            keys += _keys(config[key], f'{prefix}{key}.')
    return keys
