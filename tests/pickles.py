"""Pickles as others write them, with names that cannot be imported here."""

from __future__ import annotations

import io
import pickle

import numpy as np


class Named:
    """Pickles as a call of the function of that name, which need not exist."""

    def __init__(self, module, name, *args):
        self.module, self.name, self.args = module, name, args


class Writer(pickle._Pickler):  # type: ignore[name-defined]
    """Writes names that cannot be imported here, and NumPy's functions as dill writes them."""

    def save_named(self, obj):
        self.write(f'c{obj.module}\n{obj.name}\n'.encode())
        if obj.args:
            self.save(obj.args)
            self.write(b'R')

    def save_namedtuple(self, obj):
        fields = type(obj)._fields
        made = Named('dill._dill', '_create_namedtuple', type(obj).__name__, fields, 'byol.x')
        self.save_named(made)
        self.save(tuple(obj))
        self.write(b'\x81')  # NEWOBJ

    def save_array(self, obj):
        function, args, state = obj.__reduce__()
        module = Named('dill._dill', '_import_module', 'numpy.core._multiarray_umath')
        function = Named('dill._dill', '_get_attr', module, '_reconstruct')
        self.save_named(Named('dill._dill', '_create_array', function, args, state, None))

    dispatch = {  # noqa: RUF012 (the pickler's own way to register)
        **pickle._Pickler.dispatch,  # type: ignore[attr-defined]
        Named: save_named,
        np.ndarray: save_array,
    }


def raw(data, *namedtuples):
    """A pickle of protocol 2, with NamedTuples of the given classes written as by dill."""
    buffer = io.BytesIO()
    writer = Writer(buffer, 2)
    writer.dispatch = {**Writer.dispatch, **dict.fromkeys(namedtuples, Writer.save_namedtuple)}
    writer.dump(data)
    return buffer.getvalue()
