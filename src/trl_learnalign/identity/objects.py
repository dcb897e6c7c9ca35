"""
Digests of functions and objects of the user: equal digests mean that they do the same. A digest covers the code that
runs, not its text on the disk, and the values that it works with.
"""

import collections
import copyreg
import functools
import hashlib
import importlib
import itertools
import logging
import random
import sys
import threading
import types
import uuid
from pathlib import PurePath

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.rows import dataset_fingerprint, format_of
from ..ground.user_code import file_of, is_library, version_of
from .bytecode import Code, read_code
from .contents import ATOMS, digest_of_tensors, plain_content, tensor_bytes, tokenizer_content


_MOST = 200_000  # objects looked at: a value that leads to more is not known
_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Event, threading.Condition, threading.Semaphore)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_OF_NOBODY = (random._inst, np.random.mtrand._rand, torch.default_generator)  # seeded before rewards are computed
_OF_A_CLASS = {
    *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__firstlineno__", "__static_attributes__"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "_abc_impl", "__signature__"),
}
_BUILTIN = (types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodWrapperType)
_DESCRIPTORS = (types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType)


def identify(value) -> str:
    """
    Compute the digest of a function, an object or a value as it is now. It is another one at every call if the value
    may depend on something that cannot be known, see [`examine`]. Changes that a function makes itself are part of it;
    [`~trl_learnalign.identity.seen.seen`] leaves them out.

    A function is its code, its defaults, and the variables that its code names: functions of the user's, classes and
    objects in turn, plain values, containers, arrays, tables and datasets by their content, modules and functions of
    installed packages by name and version. An object is its class and its attributes; a model its class, its name, and
    a sample of its weights.
    """
    found, unknown = examine(value)
    return uuid.uuid4().hex if unknown else found


def examine(value) -> tuple[str, list[str]]:
    """
    Compute the digest of a function, an object or a value, and list the parts of it that cannot be identified, such as
    a connection, by type and name. The digest has the address of such a part, so it says only whether anything changed
    since the last time in this process.
    """
    walk = _Walk()
    return walk.of(value), walk.unknown


class _Walk:
    """A walk over a value and all that it leads to. A value met again is named by the place of the first time."""

    def __init__(self) -> None:
        self.unknown: list[str] = []
        self._hash = hashlib.sha256()
        self._met: dict[int, int] = {}
        self._kept: list[object] = []  # or else another object might get the address of one that was looked at
        self._path: list[str] = []
        self._looks = itertools.count()

    def of(self, value) -> str:
        self._add(value)
        return self._hash.hexdigest()

    def _say(self, *parts):
        for part in parts:
            content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            self._hash.update(b"%d:" % len(content) + content)

    def _apart(self, value) -> str:
        """Compute a digest of its own, for parts in no order."""
        other = _Walk()
        other._path, other._looks = self._path, self._looks
        found = other.of(value)
        self.unknown += other.unknown
        return found

    def _add(self, value, name=""):
        kind = type(value)
        if kind in ATOMS:
            self._say(kind.__name__, value if kind is bytes else repr(value))
            return
        if kind in (list, tuple, dict, set, frozenset) and (content := plain_content(value)) is not None:
            self._say("plain", content)
            return
        if kind not in (tuple, frozenset):  # one process may share constants where another does not
            if id(value) in self._met:
                self._say("again", self._met[id(value)])
                return
            self._met[id(value)] = len(self._met)
        self._kept.append(value)
        if name:
            self._path.append(name)
        try:
            number = next(self._looks)
            if number < _MOST:
                self._look(value, kind)
            elif number == _MOST:
                self._not_known(self._path[:1], f"more than {_MOST:,} objects", id(value))
            else:
                self._say("unknown", id(value))
        except Exception:  # an object of the user may do anything when it is looked at
            self._unknown(value)
        finally:
            if name:
                self._path.pop()

    def _unknown(self, value):
        self._not_known(self._path, f"{type(value).__module__}.{type(value).__qualname__}", id(value))

    def _not_known(self, path, what, address):
        if len(self.unknown) < 10:
            self.unknown.append(f"`{'.'.join(path)}` ({what})" if path else what)
        self._say("unknown", address)

    def _look(self, value, kind):
        for kinds, look in self._LOOKS:
            if isinstance(value, kinds):
                look(self, value)
                return
        if kind.__name__ == "cython_function_or_method":
            self._builtin(value)
        elif is_library(kind.__module__):
            self._reduced(value)
        else:
            self._object(value)

    # Code -------------------------------------------------------------------------------------------------------

    def _function(self, function):
        around, of = function.__globals__, function.__globals__.get("__name__", "")
        library = is_library(of) and vars(sys.modules.get(of, types)) is around
        code = Code() if library else read_code(function.__code__)
        self._say(*("function", of, function.__qualname__, version_of(of)) if library else ("code",))
        self._add(code.steps)
        closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
        for name, cell in closure.items():
            self._say(name)
            if cell != types.CellType():
                self._add(cell.cell_contents, name)
        if library:
            return
        defaults = dict(enumerate(function.__defaults__ or ())) | (function.__kwdefaults__ or {})
        for name, default in defaults.items():
            self._say("default", name)
            self._add(default, str(name))
        self._attributes(vars(function))
        self._names(around, code)

    def _method(self, method):
        self._add(method.__func__)
        self._add(method.__self__)

    def _names(self, around: dict, code: Code):
        for name in code.globals:
            if name in around:
                self._say(name)
                if isinstance(around[name], types.ModuleType):
                    self._module(around[name], code)
                else:
                    self._add(around[name], name)
        for level, name in code.imports:
            self._say("import", level, name)
            if level == 0 and is_library(name):
                self._say(version_of(name))
                continue
            try:
                whole = "." * level + name
                module = importlib.import_module(whole, around.get("__package__") if level else None)
            except Exception as error:  # the function will fail likewise
                self._say(type(error).__name__)
            else:
                self._module(module, code)

    def _module(self, module, code):
        self._say("module", module.__name__)
        if is_library(module.__name__):
            self._say(version_of(module.__name__))
            return
        for name in code.attributes:  # the code may look them up there
            value = vars(module).get(name, module)
            if not isinstance(value, types.ModuleType):
                self._say(name)
                self._add(value, name)
            elif value is not module and id(value) not in self._met:
                self._met[id(value)] = len(self._met)
                self._module(value, code)

    def _builtin(self, function):
        module, owner = getattr(function, "__module__", None) or "", getattr(function, "__self__", None)
        self._say("builtin", module, getattr(function, "__qualname__", function.__name__), version_of(module))
        if owner is not None and not isinstance(owner, types.ModuleType):
            self._add(owner)  # a method of a value
        elif module and not is_library(module):
            self._say(file_of(module))  # compiled

    def _class(self, kind):
        self._say("class", kind.__module__, kind.__qualname__)
        if is_library(kind.__module__):
            self._say(version_of(kind.__module__))
            return
        for base in kind.__bases__:
            self._add(base)
        self._attributes({name: value for name, value in vars(kind).items() if _is_own(name)})
        if (found := vars(kind).get("__pydantic_decorators__")) is not None:
            groups = [getattr(found, name) for name in found.__dataclass_fields__]
            self._add([(name, one.info) for group in groups if isinstance(group, dict) for name, one in group.items()])

    def _descriptor(self, value):
        wrapped = [getattr(value, name, None) for name in ("__func__", "fget", "fset", "fdel", "func")]
        self._say(type(value).__name__)
        self._add([one for one in wrapped if one is not None])

    # Objects ----------------------------------------------------------------------------------------------------

    def _attributes(self, values):
        for name, value in values.items():
            self._say(name)
            self._add(value, name)

    def _object(self, value):
        """Add an object of a class of the user: the class and the attributes."""
        kind = type(value)
        self._say("object")
        self._add(kind)
        slots = [name for base in kind.__mro__ for name in _slots(base) if hasattr(value, name)]
        values = getattr(value, "__dict__", {}) | {name: getattr(value, name) for name in slots}
        self._attributes(values)
        if isinstance(value, collections.deque | list | tuple | dict | set | frozenset):
            self._add(list(value.items()) if isinstance(value, dict) else list(value))
        for base in ATOMS[2:7]:
            if isinstance(value, base):
                self._say(base.__repr__(value))

    def _reduced(self, value):
        """Add an object of a class of an installed package, by the parts that a copy would be made from."""
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            made_from = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception:
            self._unknown(value)
            return
        self._say("reduced")
        if isinstance(made_from, str):
            self._say(type(value).__module__, type(value).__qualname__, made_from)
            return
        function, arguments, *more = made_from
        self._add(function)
        for name, part in zip(("", "", "items", "items", ""), (arguments, *more), strict=False):
            self._add(list(part) if name and part is not None else part)

    def _sequence(self, values):
        if type(values) not in (list, tuple, collections.deque) and not is_library(type(values).__module__):
            self._object(values)
            return
        self._say(type(values).__qualname__, len(values))
        for value in list(values):
            self._add(value)

    def _mapping(self, values):
        if not is_library(type(values).__module__):
            self._object(values)
            return
        self._say(type(values).__qualname__, len(values))
        self._add(getattr(values, "default_factory", None))
        for key, value in list(values.items()):
            self._add(key)
            self._add(value, key if isinstance(key, str) else "")

    def _set(self, values):
        self._say(type(values).__qualname__, *sorted(map(self._apart, values)))

    def _model(self, model):
        self._say("model", getattr(getattr(model, "config", None), "_name_or_path", ""), digest_of_tensors(model))
        for kind in dict.fromkeys(map(type, model.modules())):
            self._add(kind)
        for name, module in model.named_modules():
            plain = {one: value for one, value in vars(module).items() if type(value) in ATOMS and one[0] != "_"}
            self._say(name, repr(sorted(plain.items() - {("training", True), ("training", False)}, key=repr)))

    def _generator(self, value):
        if any(value is one for one in _OF_NOBODY):
            self._say("generator", type(value).__qualname__)
            return
        state = getattr(value, "bit_generator", value)
        look = next(getattr(state, name) for name in ("getstate", "get_state", "state") if hasattr(state, name))
        self._add(look() if callable(look) else look)

    def _tokenizer(self, tokenizer):
        self._say("tokenizer", type(tokenizer).__qualname__, tokenizer_content(tokenizer))

    # Content ----------------------------------------------------------------------------------------------------

    def _array(self, array):
        self._say("array", array.dtype, array.shape)
        if array.dtype.hasobject:
            self._add(array.tolist())
        else:
            self._say(np.ascontiguousarray(array).tobytes())

    def _tensor(self, tensor):
        if tensor.device.type == "meta":
            self._unknown(tensor)
            return
        self._say("tensor", tensor.dtype, tuple(tensor.shape), tensor_bytes(tensor))

    def _table(self, table):
        self._say(type(table).__name__)
        frame = table if isinstance(table, pd.DataFrame) else table.to_frame()
        if isinstance(table, pd.Series | pd.DataFrame):
            self._add(frame.index)
            self._add(list(frame.columns))
        for place in range(frame.shape[1]):
            column = frame.iloc[:, place]
            self._say(column.dtype)
            values = column.to_numpy()
            self._add(values if not values.dtype.hasobject else [None if v is pd.NA else v for v in values])

    def _arrow(self, table):
        table = pa.table({"": table}) if isinstance(table, pa.Array | pa.ChunkedArray) else table
        self._add(Dataset(pa.table(table)))

    def _dataset(self, dataset):
        self._say("dataset", dataset_fingerprint(dataset))
        self._add(format_of(dataset))

    _LOOKS = (
        (types.FunctionType, _function),
        (types.MethodType, _method),
        (_BUILTIN, _builtin),
        (_DESCRIPTORS, lambda self, value: self._say(value.__objclass__.__qualname__, value.__name__)),
        (types.MemberDescriptorType, lambda self, value: self._say("slot", value.__name__)),
        (functools._lru_cache_wrapper, lambda self, value: self._add(value.__wrapped__)),
        ((staticmethod, classmethod, property, functools.cached_property), _descriptor),
        (type, _class),
        (types.ModuleType, lambda self, value: self._module(value, Code())),
        (nn.Module, _model),
        (PreTrainedTokenizerBase, _tokenizer),
        (np.ndarray, _array),
        (np.generic, lambda self, value: self._array(np.asarray(value))),
        (torch.Tensor, _tensor),
        ((pd.DataFrame, pd.Series, pd.Index), _table),
        ((pa.Table, pa.RecordBatch, pa.Array, pa.ChunkedArray), _arrow),
        (Dataset, _dataset),
        (_GENERATORS, _generator),
        (_LOCKS, lambda self, value: self._say("lock", type(value).__qualname__)),
        (logging.Logger, lambda self, value: self._say("logger", value.name)),
        (PurePath, lambda self, value: self._say("path", value)),
        ((list, tuple, collections.deque), _sequence),
        ((dict, types.MappingProxyType), _mapping),
        ((set, frozenset), _set),
    )


def _slots(kind):
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_own(name):
    """Tell whether the author of a class wrote an entry. Those that pydantic makes hold addresses."""
    return name not in _OF_A_CLASS and (not name.startswith("__pydantic_") or name == "__pydantic_fields__")
