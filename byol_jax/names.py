"""One rule for every name in a config: a registered short name, or 'package.module:attribute'."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from byol_jax.errors import UserError, did_you_mean, shown


class Named(NamedTuple):
    """A name in a config, with the arguments for what it names.

    Attributes:
      name: a registered short name, or 'package.module:attribute'.
      kwargs: the arguments.
    """

    name: str
    kwargs: Mapping[str, Any] = {}


def named(value: Any, key: str) -> Named:
    """Converts a config's 'name' or ('name', {kwargs}) to a `Named`.

    Args:
      value: the config's value; a list, as JSON has it, counts as a tuple.
      key: the config key, for the message.

    Raises:
      UserError: the value has neither form.
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
    """Finds things of one kind by a short name or by 'package.module:attribute'.

    Attributes:
      kind: what is named, such as 'encoder', for messages.
      key: the config key that holds the name.
      kwargs_key: the config key that holds the arguments.
      entries: the thing by short name, or its 'package.module:attribute', which is imported when
        it is first asked for.
    """

    def __init__(self, kind: str, key: str, entries: Mapping[str, Any], kwargs_key: str = ''):
        """Imports nothing yet.

        Args:
          kind: what is named, for messages.
          key: the config key that holds the name.
          entries: the thing by short name, or its 'package.module:attribute'.
          kwargs_key: the config key that holds the arguments; '' if `key` holds them too.
        """
        self.kind = kind
        self.key = key
        self.kwargs_key = kwargs_key or key
        self.entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def find(self, name: str) -> Any:
        """Returns what a name stands for.

        Args:
          name: a short name, or 'package.module:attribute', which is imported.

        Raises:
          UserError: nothing has that name; the message lists the known names and the nearest one.
        """
        if not isinstance(name, str):
            raise UserError(f'{self.key}={name!r} must be the name of {_a(self.kind)}.')
        if ':' not in name:
            if name in self.entries:
                entry = self.entries[name]
                return self._import(entry) if isinstance(entry, str) else entry
            raise UserError(
                f"{self.key}='{shown(name)}' is not a known {self.kind}."
                f'{_with_colon(name) or did_you_mean(name, self.entries)}'
                f' Known: {", ".join(self.entries) or "none"}; or give your own as '
                "'package.module:attribute'."
            )
        return self._import(name)

    def build(self, name: str, kwargs: Mapping[str, Any], *args: Any, **given: Any) -> Any:
        """Calls what a name stands for and returns the result.

        Args:
          name: as in `find`.
          kwargs: the user's arguments.
          args: positional arguments of the caller.
          given: keyword arguments of the caller; the user may not give these.

        Raises:
          UserError: nothing has that name, or it does not take these arguments.
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
        """Checks that a function or class takes the user's arguments.

        Args:
          name: the name that the user gave, for the message.
          function: the function or class.
          kwargs: the user's arguments.
          given: names of the caller's arguments, which the user may not give.

        Raises:
          UserError: it does not take an argument; the message has the nearest and all it takes.
        """
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:
            # Some built-in functions have no signature: the call will show a wrong argument.
            return
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        taken = [
            each
            for each, p in parameters.items()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and each not in given
        ]
        for key in kwargs:
            if key not in taken and key in _undecorated(function):
                raise UserError(
                    f"{self.kwargs_key}: '{name}' takes no argument '{key}', although its class "
                    'has that field: write @dataclasses.dataclass(frozen=True) above the class.'
                )
        self.check_known(name, kwargs, taken)

    def check_known(self, name: str, kwargs: Mapping[str, Any], taken: Sequence[str]) -> None:
        """Like `check_kwargs`, for something that takes the arguments named in `taken`."""
        for key in kwargs:
            if key not in taken:
                raise UserError(
                    f"{self.kwargs_key}: '{name}' takes no argument '{key}'."
                    f'{did_you_mean(key, taken)} It takes: {", ".join(taken) or "none"}.'
                )

    def _import(self, name: str) -> Any:
        module_name, attribute = _split(name, self.key)
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{self.key}='{name}': module '{error.name}' cannot be imported. Install it, or "
                'put its folder on PYTHONPATH.'
            ) from error
        if not hasattr(module, attribute):
            raise UserError(
                f"{self.key}='{name}': module '{module_name}' has no '{attribute}'."
                f'{did_you_mean(attribute, dir(module))}'
            )
        return getattr(module, attribute)


def check_word(name: Any, allow: Collection[str], where: str, encoder: bool = True) -> None:
    """Checks a name that a file gives: no word of a file makes this program import a module.

    Short names pass, and so does what a module holds that is imported already.

    Args:
      name: as the file has it.
      allow: modules and packages that the user trusts; what they hold passes too.
      where: the file and its key, for the message.
      encoder: whether `load_encoder` may be told to allow it.

    Raises:
      UserError: the name is of no such module; says how to allow it.
    """
    if not isinstance(name, str):
        raise UserError(f'{where}={shown(name)} must be a name.')
    if ':' not in name:
        return
    module_name, attribute = _split(name, where)
    trusted = (allow,) if isinstance(allow, str) else allow
    if any(f'{module_name}.'.startswith(f'{each}.') for each in trusted):
        return
    module = sys.modules.get(module_name)
    if module is None:
        word = shown(module_name)
        way = (
            f"or allow it: load_encoder(folder, allow=('{word}',)). The command line allows the "
            f'modules that its config names: --config.encoder.name={shown(name)}.'
        )
        raise UserError(
            f"{where}='{shown(name)}' is of a module that is not imported, and no word of a file "
            f'makes this program import one. If you trust it, import {word} first'
            + (f', {way}' if encoder else '.')
        )
    # Not getattr: a module may import others when it is asked for what it does not hold yet.
    if attribute not in vars(module):
        raise UserError(f"{where}='{shown(name)}': module '{module_name}' holds no '{attribute}'.")


def _split(name: str, key: str) -> tuple[str, str]:
    """The module and the attribute of 'package.module:attribute'.

    Raises:
      UserError: the name is not of this form; says what is meant where that is clear.
    """
    module, _, attribute = name.partition(':')
    if _is_dotted(module) and attribute.isidentifier() and not module.endswith('.py'):
        return module, attribute
    dotted = module.removesuffix('.py').strip('./').replace('/', '.')
    if _is_dotted(dotted) and attribute.isidentifier():
        raise UserError(
            f"{key}='{shown(name)}' must name a module with dots, from the current folder or one "
            f"on PYTHONPATH: 'package.module:attribute'. Did you mean '{dotted}:{attribute}'?"
        )
    raise UserError(f"{key}='{shown(name)}' must be of the form 'package.module:attribute'.")


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split('.'))


def _with_colon(name: str) -> str:
    """Suggests 'package.module:attribute' for 'package.module.attribute'; '' for other names."""
    module, _, attribute = name.rpartition('.')
    if not module or attribute == 'py' or '/' in name:
        return ''
    return f" Did you mean '{module}:{attribute}'?"


def _undecorated(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The fields of a class that is no dataclass itself, so that it takes none of them."""
    made = ('__init__', '__dataclass_fields__')
    if not isinstance(function, type) or any(name in vars(function) for name in made):
        return {}
    return inspect.get_annotations(function)


def _a(noun: str) -> str:
    return f'an {noun}' if noun[0] in 'aeiou' else f'a {noun}'
