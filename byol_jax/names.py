"""One rule for every name in a config: a registered short name, or 'package.module:attribute'."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from byol_jax.errors import UserError, did_you_mean


class Named(NamedTuple):
    """A name of a config with its arguments.

    Attributes:
      name: a registered short name, or 'package.module:attribute'.
      kwargs: arguments of what it names.
    """

    name: str
    kwargs: Mapping[str, Any] = {}


def named(value: Any, key: str) -> Named:
    """A 'name' or ('name', {kwargs}) as a `Named`.

    Args:
      value: as a config has it; lists, as JSON has them, count as tuples.
      key: of the config, for the message.

    Raises:
      UserError: it is neither.
    """
    if isinstance(value, str):
        return Named(value)
    if isinstance(value, Sequence) and len(value) == 2:
        name, kwargs = value
        if isinstance(name, str) and isinstance(kwargs, Mapping):
            return Named(name, dict(kwargs))
    raise UserError(
        f"{key}: {value!r} is neither a name nor ('name', {{arguments}}). Several are given as "
        f"""--config.{key}="('first',('second',{{'argument':1}}))"."""
    )


class Registry:
    """The short names of one kind of thing, and the way to anything else of that kind.

    Attributes:
      kind: what is named, such as 'encoder', for messages.
      key: the config key that holds the name.
      kwargs_key: the config key that holds the arguments.
      entries: short name -> the thing, or 'package.module:attribute' of it, imported when it is
        first asked for.
    """

    def __init__(self, kind: str, key: str, entries: Mapping[str, Any], kwargs_key: str = ''):
        """Keeps what it is given.

        Args:
          kind: see above.
          key: see above.
          entries: see above.
          kwargs_key: see above; '' for the key itself.
        """
        self.kind = kind
        self.key = key
        self.kwargs_key = kwargs_key or key
        self.entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def find(self, name: str) -> Any:
        """What a name stands for.

        Args:
          name: a short name, or 'package.module:attribute', which is imported.

        Raises:
          UserError: there is no such thing; says what there is and the nearest.
        """
        if not isinstance(name, str):
            raise UserError(f'{self.key}={name!r} must be the name of {_a(self.kind)}.')
        if ':' not in name:
            if name in self.entries:
                entry = self.entries[name]
                return self._import(entry) if isinstance(entry, str) else entry
            raise UserError(
                f"{self.key}='{name}' is not a known {self.kind}."
                f'{_with_colon(name) or did_you_mean(name, self.entries)}'
                f' Known: {", ".join(self.entries) or "none"}; or give your own as '
                "'package.module:attribute'."
            )
        return self._import(name)

    def build(self, name: str, kwargs: Mapping[str, Any], *args: Any, **given: Any) -> Any:
        """Calls what a name stands for.

        Args:
          name: see `find`.
          kwargs: the user's arguments.
          args: ours, by position.
          given: ours, by name; the user may not give these.

        Raises:
          UserError: there is no such thing, or it does not take these arguments.
        """
        found = self.find(name)
        if not callable(found):
            raise UserError(
                f"{self.key}='{name}' cannot be called: it is a {type(found).__name__}."
            )
        self.check_kwargs(name, found, kwargs, given)
        try:
            return found(*args, **given, **kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.kwargs_key} do not fit '{name}': {error}") from error

    def check_kwargs(
        self, name: str, function: Callable[..., Any], kwargs: Mapping[str, Any], given: Any = ()
    ) -> None:
        """Checks that something takes the user's arguments.

        Args:
          name: that the user gave.
          function: a function or class.
          kwargs: the user's arguments.
          given: names of ours, which the user may not give.

        Raises:
          UserError: names the first that it does not take, the nearest and all there are.
        """
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:
            # Some built-in functions do not say what they take; calling them will.
            return
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        taken = [
            each
            for each, p in parameters.items()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and each not in given
        ]
        self.check_known(name, kwargs, taken)

    def check_known(self, name: str, kwargs: Mapping[str, Any], taken: Sequence[str]) -> None:
        """As `check_kwargs`, of something that takes the arguments named `taken`."""
        for key in kwargs:
            if key not in taken:
                raise UserError(
                    f"{self.kwargs_key}: '{name}' takes no argument '{key}'."
                    f'{did_you_mean(key, taken)} It takes: {", ".join(taken) or "none"}.'
                )

    def _import(self, name: str) -> Any:
        module_name, _, attribute = name.partition(':')
        if not module_name or not attribute.isidentifier():
            raise UserError(f"{self.key}='{name}' must be of the form 'package.module:attribute'.")
        if '/' in module_name or module_name.endswith('.py'):
            dotted = module_name.removesuffix('.py').strip('./').replace('/', '.')
            raise UserError(
                f"{self.key}='{name}' is a path; a module is named with dots, from the current "
                f"folder or one on PYTHONPATH. Did you mean '{dotted}:{attribute}'?"
            )
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{self.key}='{name}': module '{error.name}' cannot be imported. Install it, or "
                'put its folder on PYTHONPATH.'
            ) from error
        except TypeError as error:
            # A relative name, such as '.net'.
            raise UserError(f"{self.key}='{name}': {error}.") from error
        if not hasattr(module, attribute):
            raise UserError(
                f"{self.key}='{name}': module '{module_name}' has no '{attribute}'."
                f'{did_you_mean(attribute, dir(module))}'
            )
        return getattr(module, attribute)


def _with_colon(name: str) -> str:
    """' Did you mean ..?' for 'package.module.attribute', or ''."""
    module, _, attribute = name.rpartition('.')
    if not module or attribute == 'py' or '/' in name:
        return ''
    return f" Did you mean '{module}:{attribute}'?"


def _a(noun: str) -> str:
    return f'an {noun}' if noun[0] in 'aeiou' else f'a {noun}'
