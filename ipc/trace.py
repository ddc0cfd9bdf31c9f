"""Tracing: an engine's own layout, learned from the engine itself.

The model is built with its parameters on torch's meta device (``meta_parameters``), the engine's own ``load_weights``
runs over meta tensors that stand for the checkpoint's, and every write to a parameter is recorded (``trace``). What
comes out is a recipe: which strided box of which tensor goes to which strided box of which parameter. Fused
projections, stacked experts, padded vocabularies and rank shards come out of it for any model that the engine knows.

What no recipe can say (a function of weights, a permutation that is no view of the tensor) is *opaque*, and named: it
takes the engine's own weight loader.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weightd.ipc.boxes import apart, blocks, covered, longest_rows, parted, through
from weightd.ipc.dtypes import DTYPES
from weightd.ipc.recipe import Box, Constant, Move, Parameter

_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
          _aten.new_empty_strided.default}  # fmt: skip
_JOINS = {_aten.cat.default, _aten.stack.default}
_FILLS = {_aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default}
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
_CAST_TO = {torch.float32, torch.float16, torch.bfloat16}
"""Casts that a recipe can say: from any of ``_FLOATS`` to one of these."""
MAX_BLOCKS = 1 << 20
"""Pieces that the copies of one layout may fall into. Transposed, a weight falls into one for each of its rows or
columns, and hundreds of experts come to more than a daemon plans with."""


def _key(tensor: torch.Tensor) -> int:
    """Which storage a tensor is of: as long as that lives, nothing else has this number."""
    key: int = tensor.untyped_storage()._cdata
    return key


def _box(tensor: torch.Tensor) -> Box:
    """Where a tensor lies in its storage."""
    return Box(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


# ---------------------------------------------------------------------- building without memory


class _Unwritten(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows which storages came from ``torch.empty`` and its like and have not been written to since."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._to_copy.default and not args[0].is_meta and _key(args[0]) not in self.storages:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "meta":
                # It goes to where a parameter seems to be, and would be lost there.
                kwargs = {**kwargs, "device": args[0].device}
        out = func(*args, **kwargs)
        if func in _EMPTY:
            self.storages.add(_key(out))
            return out
        if not self.storages:
            return out
        given = {_key(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            if _key(tensor) not in given:  # a number that an earlier storage had
                self.storages.discard(_key(tensor))
        for tensor in _written(func, args, kwargs):
            self.storages.discard(_key(tensor))
        return out


@contextlib.contextmanager
def meta_parameters() -> Iterator[None]:
    """Parameters that modules register in here hold no memory, unless something was written to them before.

    Buffers, caches and whatever else a constructor computes are made as always. A parameter stays the object that it
    is, with its class and attributes.
    """
    unwritten = _Unwritten()
    register = torch.nn.Module.register_parameter

    def registered(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and not param.is_meta and _key(param) in unwritten.storages:
            with torch._C._DisableTorchDispatch():
                rebind(param, torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device="meta"))
        register(module, name, param)

    torch.nn.Module.register_parameter = registered  # type: ignore[method-assign,assignment]
    try:
        with unwritten:
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def rebind(param: torch.Tensor, memory: torch.Tensor) -> None:
    """Let a parameter be ``memory`` from now on: the same object, of the same class, with the same attributes."""
    if type(param) is torch.nn.Parameter:
        new: torch.Tensor = torch.nn.Parameter(memory, requires_grad=False)
    else:
        new = torch.Tensor._make_subclass(type(param), memory, False)
    new.__dict__.update(param.__dict__)
    torch.utils.swap_tensors(param, new)  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------------- recording


class _Origin(NamedTuple):
    """What a storage is a copy of, element by element: ``box`` of checkpoint tensor ``tensor``.

    ``shape`` is what the storage is row-major of, ``dtypes`` the tensor's own and those that it was converted to.
    """

    tensor: str
    box: Box
    dtypes: tuple[torch.dtype, ...]


class _Joined(NamedTuple):
    """What a storage is put together of, row-major: ``parts`` side by side in dimension ``dim``."""

    shape: tuple[int, ...]
    dim: int
    parts: list[torch.Tensor]
    """Each of a storage of its own, whose origin is known."""


@dataclass
class Opaque:
    """A parameter that no recipe can describe: ``why``, and which tensors its loader wants."""

    why: str
    tensors: set[str] = field(default_factory=set)


@dataclass
class _Writes:
    moves: list[tuple[str, Box, Box, bool]] = field(default_factory=list)
    fills: list[tuple[bytes, Box]] = field(default_factory=list)
    unsaid: list[Box] = field(default_factory=list)
    """Where something is written that no recipe can say."""


@dataclass
class Trace:
    """What an engine's loader does to a model: ``entries``, ``moves``, ``constants`` are a recipe."""

    entries: list[Parameter]
    """By the first name that each parameter, or buffer, has in the model."""
    moves: list[Move]
    constants: list[Constant]
    opaque: dict[str, Opaque]
    untouched: list[str]
    """Parameters without memory to which nothing was written."""
    uncovered: list[str]
    """Opaque ones without memory of which it is not known that all elements are written."""
    owners: dict[str, str]
    """Each parameter and buffer → the name by which its storage is an entry, or opaque."""

    @property
    def tensors(self) -> set[str]:
        """The checkpoint's tensors that the opaque ones want."""
        return set().union(*(opaque.tensors for opaque in self.opaque.values()))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, targets: Mapping[int, str], sources: Mapping[int, _Origin]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.targets = targets
        self.origins = dict(sources)
        self.mixed: dict[int, set[str]] = {}
        """Storages that are functions of weights → of which."""
        self.joined: dict[int, _Joined] = {}
        """Of these, those that are weights side by side."""
        self.filled: dict[int, Any] = {}
        """Weights that the loader itself has overwritten with one value."""
        self.writes: dict[str, _Writes] = {}
        self.opaque: dict[str, Opaque] = {}
        self.kept: list[torch.UntypedStorage] = []
        """A storage that is gone would lend its number to another."""
        self.given: str | None = None
        """The tensor that the loader was given last."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:  # most of what a loader does: it is of the same storage, and writes nothing
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and any(tensor.is_meta for tensor in _tensors(args)):
            kwargs |= {"device": torch.device("meta"), "pin_memory": None}  # weights on their way to the device
        if func is _aten.copy_.default and self._copy(args[0], args[1]):
            return args[0]
        if func in _FILLS and self._overwritten(*args):
            return args[0]
        if func in _FILLS and _key(args[0]) in self.targets:
            value = args[1] if len(args) > 1 else 0
            if isinstance(value, torch.Tensor):
                if value.is_meta:
                    self._give_up(args[0], self._named(args[1:]), "it is filled with a weight's value")
                    return args[0]
                value = value.item()
            self._fill(args[0], value)
            return args[0]
        if func in (_aten.clone.default, _aten._to_copy.default):
            found = self._duplicate(func, args, kwargs)
            if found is not None:
                return found
        joined = self._joined(func, args, kwargs) if func in _JOINS else None
        written = list(_written(func, args, kwargs))
        for tensor in written:
            self._change(tensor, self._named((args, kwargs)), func)
        if any(_key(tensor) in self.targets and not tensor.is_meta for tensor in written):
            return written[0]  # it has memory: the loader runs once more over that, and must find it as it was
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            raise ValueError("its loader looks at the values of weights, which a trace does not have")
        out = func(*args, **kwargs)
        names = self._named((args, kwargs))
        if names:
            given = {_key(tensor) for tensor in _tensors((args, kwargs))}
            for tensor in _tensors(out):
                if _key(tensor) not in given:
                    self.mixed[_key(tensor)] = names
                    self.kept.append(tensor.untyped_storage())
        if joined is not None:
            self.joined[_key(out)] = joined
        return out

    def giving(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """What the loader is given, one after the other."""
        for name, tensor in tensors.items():
            self.given = name
            yield name, tensor

    def _named(self, args: Any) -> set[str]:
        """The checkpoint's tensors that these were made of."""
        names: set[str] = set()
        for tensor in _tensors(args):
            key = _key(tensor)
            if origin := self.origins.get(key):
                names.add(origin.tensor)
            names |= self.mixed.get(key, set())
        return names

    def _give_up(self, target: torch.Tensor, names: set[str], why: str, *, covers: bool = True) -> None:
        name = self.targets[_key(target)]
        if not names and self.given is not None:
            names = {self.given}  # at which the loader does it again
        self.opaque.setdefault(name, Opaque(why)).tensors.update(names)
        if covers:
            self.writes.setdefault(name, _Writes()).unsaid.append(_box(target))

    def _change(self, tensor: torch.Tensor, names: set[str], func: Any) -> None:
        key = _key(tensor)
        if key in self.targets:
            self._give_up(tensor, names, f"{func.name()} computes it", covers=False)
        elif names:
            self.origins.pop(key, None)
            self.joined.pop(key, None)
            self.filled.pop(key, None)
            self.mixed[key] = self.mixed.get(key, set()) | names
            self.kept.append(tensor.untyped_storage())

    def _overwritten(self, tensor: torch.Tensor, value: Any = 0) -> bool:
        """Whether all of a weight is one value from now on."""
        key = _key(tensor)
        if key not in self.origins or tensor.numel() != _elements(tensor) or isinstance(value, torch.Tensor):
            return False
        del self.origins[key]
        self.filled[key] = value
        return True

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        """Record a copy into a parameter; whether it was one."""
        key = _key(target)
        if key not in self.targets:
            return False
        if not target.numel():
            return True
        name, from_key = self.targets[key], _key(source)
        if from_key in self.joined and (pieces := _pieces(self.joined[from_key], target, source)) is not None:
            return all(self._copy(*piece) for piece in pieces)
        if from_key not in self.origins:
            if from_key in self.filled:
                self._fill(target, self.filled[from_key])
            elif from_key in self.mixed:
                self._give_up(target, self.mixed[from_key], "it is computed from weights")
            elif not source.is_meta and source.numel() and (source == source.flatten()[0]).all():
                self._fill(target, source.flatten()[0].item())
            else:
                self._give_up(target, set(), "it is copied from what is no weight")
            return True
        moved = self._moved(target, source)
        if isinstance(moved, str):
            self._give_up(target, {self.origins[from_key].tensor}, moved)
        else:
            self.writes.setdefault(name, _Writes()).moves.append(moved)
        return True

    def _moved(self, target: torch.Tensor, source: torch.Tensor) -> tuple[str, Box, Box, bool] | str:
        origin = self.origins[_key(source)]
        if source.shape != target.shape:
            source = source.broadcast_to(target.shape)
        found = through(origin.box, _box(source))
        if found is None:
            return "its elements are in an order that no view of the tensor has"
        box, parts = found
        cast = _cast([*origin.dtypes, source.dtype], target.dtype)
        if cast is None:
            return f"it is converted, {' to '.join(map(str, (*origin.dtypes, target.dtype)))}"
        return origin.tensor, *longest_rows(box, parted(_box(target), parts)), cast

    def _fill(self, target: torch.Tensor, value: Any) -> None:
        if not target.numel():
            return
        writes = self.writes.setdefault(self.targets[_key(target)], _Writes())
        element = torch.full((1,), value, dtype=target.dtype, device="cpu").view(torch.uint8).numpy().tobytes()
        box = _box(target)
        if writes.moves and not apart([box, *(move[2] for move in writes.moves)]):
            self._give_up(target, set(), "a value is written over weights")
            return
        writes.fills.append((element, box))

    def _duplicate(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
        """A whole copy of a view of a tensor, perhaps of another dtype: it is known what its elements are."""
        tensor = args[0]
        origin = self.origins.get(_key(tensor))
        if origin is None or not tensor.numel():
            return None
        new: torch.Tensor = func(*args, **kwargs)
        self.kept.append(new.untyped_storage())
        # The new storage in its own order: dimensions by falling stride.
        order = sorted(range(new.dim()), key=new.stride().__getitem__, reverse=True)
        view = _box(tensor)
        view = Box(view.offset, tuple(view.shape[dim] for dim in order), tuple(view.strides[dim] for dim in order))
        found = through(origin.box, view) if _dense(new) else None
        if found is None:
            self.mixed[_key(new)] = {origin.tensor}
            return new
        box, _ = found
        self.origins[_key(new)] = _Origin(origin.tensor, box, (*origin.dtypes, tensor.dtype, new.dtype))
        return new

    def _joined(self, func: Any, args: Any, kwargs: Any) -> _Joined | None:
        """What a new tensor is put together of; None where that is more than weights of one dtype."""
        tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if func is _aten.stack.default:
            dim %= tensors[0].dim() + 1
            tensors = [tensor.unsqueeze(dim) for tensor in tensors]
        dim %= tensors[0].dim()
        parts = []
        for tensor in tensors:
            part = self._duplicate(_aten.clone.default, (tensor,), {"memory_format": torch.contiguous_format})
            if part is None or _key(part) not in self.origins or part.dtype != tensors[0].dtype:
                return None
            parts.append(part)
        shape = list(parts[0].shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        return _Joined(tuple(shape), dim, parts)


def _pieces(
    joined: _Joined, target: torch.Tensor, source: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """A copy from a view of what was put together, part by part; None where its dimensions are no more what they were
    there."""
    source = source.broadcast_to(target.shape)
    steps = [prod(joined.shape[dim + 1 :]) for dim in range(len(joined.shape))]
    first, rest = [], int(source.storage_offset())
    for step in steps:
        first.append(rest // step)
        rest %= step
    size = [1] * len(steps)
    dims: list[int] = []
    """Of the view's dimensions, those that are longer than 1: which each is there."""
    free = [dim for dim, there in enumerate(joined.shape) if there > 1]
    for count, step in zip(source.shape, source.stride(), strict=True):
        if count == 1:
            continue
        here = next((dim for dim in free if steps[dim] == step and first[dim] + count <= joined.shape[dim]), None)
        if here is None:
            return None
        free.remove(here)
        dims.append(here)
        size[here] = count
    target = target.squeeze()
    found, end = [], 0
    for part in joined.parts:
        begin, end = end, end + part.shape[joined.dim]
        low, high = max(begin, first[joined.dim]), min(end, first[joined.dim] + size[joined.dim])
        if low >= high:
            continue
        rows = target
        if joined.dim in dims:
            rows = target.narrow(dims.index(joined.dim), low - first[joined.dim], high - low)
        for dim in range(part.dim()):
            at, count = (low - begin, high - low) if dim == joined.dim else (first[dim], size[dim])
            part = part.narrow(dim, at, count)
        others = [dim for dim in range(part.dim()) if dim not in dims]
        found.append((rows, part.permute(*dims, *others).reshape(rows.shape)))
    return found


def _dense(tensor: torch.Tensor) -> bool:
    """Whether it fills its storage from the start, in whatever order of its dimensions."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != step:
            return False
        step *= size
    return tensor.storage_offset() == 0


def _cast(dtypes: Sequence[torch.dtype], to: torch.dtype) -> bool | None:
    """Whether a value on its way to ``to`` is cast (True) or keeps its bits (False); None where it is neither.

    ``dtypes`` are pairs: what a storage holds, and what it is taken for there.
    """
    taken = list(zip(dtypes[::2], dtypes[1::2], strict=True))
    converted = [(a, b) for (_, a), (b, _) in pairwise([*taken, (to, to)]) if a != b]
    if not converted:
        return False if all(dtype.itemsize == to.itemsize for dtype in dtypes) else None
    # One rounding, of what is stored: two may end elsewhere.
    if converted == [(dtypes[0], to)] and dtypes[0] in _FLOATS and to in _CAST_TO and all(a == b for a, b in taken):
        return True
    return None


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that an operator writes to."""
    if not func._schema.is_mutable:
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


# ---------------------------------------------------------------------- tracing


def trace(
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], object],
) -> Trace:
    """What ``load``, the engine's own loader, does to the model's parameters with a checkpoint's tensors.

    ``tensors`` stand for the checkpoint's, on the meta device; ``load`` is given them by name. Parameters and buffers
    are named as in the model, by their first name where they have several; an entry is flat where the parameter's own
    strides are not row-major. Raises what ``load`` raises.
    """
    held = dict((*model.named_parameters(), *model.named_buffers()))
    targets: dict[int, str] = {}
    for name, tensor in held.items():
        targets.setdefault(_key(tensor), name)
    kept = [tensor.untyped_storage() for tensor in held.values()]
    sources = {
        _key(tensor): _Origin(name, Box(0, (tensor.numel(),), (1,)), (tensor.dtype,))
        for name, tensor in tensors.items()
    }
    recorder = _Recorder(targets, sources)
    with torch.no_grad(), recorder:
        load(recorder.giving(tensors))
    # What took the place of another parameter was not copied into it.
    writes, opaque = recorder.writes, recorder.opaque
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in now.items():
        key = _key(tensor)
        if key in targets:
            continue
        before = targets.get(_key(held[name])) if name in held else None
        if before is not None:
            writes.pop(before, None)
        if key in recorder.origins:
            own = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            moved = recorder._moved(own, tensor)
            if isinstance(moved, str):
                opaque[name] = Opaque(moved, {recorder.origins[key].tensor})
                writes[name] = _Writes(unsaid=[_whole(tensor)])
            else:
                writes[name] = _Writes(moves=[moved])
            rebind(tensor, own)
        elif key in recorder.mixed:
            opaque[name] = Opaque("it is computed from weights", set(recorder.mixed[key]))
            writes[name] = _Writes(unsaid=[_whole(tensor)])
    del kept
    owners: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in now.items():
        owners[name] = first.setdefault(_key(tensor), name)
    return _traced({name: now[name] for name in first.values()}, writes, opaque, owners)


def _traced(
    held: Mapping[str, torch.Tensor],
    writes: Mapping[str, _Writes],
    opaque: Mapping[str, Opaque],
    owners: dict[str, str],
) -> Trace:
    found = Trace([], [], [], {}, [], [], owners)
    last = {name: _last(writes[name].moves) for name in held if name in writes}
    scattered = _scattered({name: moves for name, moves in last.items() if name not in opaque})
    for name, tensor in held.items():
        done = writes.get(name, _Writes())
        moves = last.get(name, [])
        names = {move[0] for move in done.moves}
        boxes = [*(move[2] for move in moves), *(box for _, box in done.fills), *done.unsaid]
        if name in opaque:
            found.opaque[name] = Opaque(opaque[name].why, opaque[name].tensors | names)
        elif not moves and not done.fills:
            if tensor.is_meta and tensor.numel():
                found.untouched.append(name)
        elif why := scattered.get(name) or _unsaid(tensor, moves, done.fills):
            found.opaque[name] = Opaque(why, names)
        else:
            entry = len(found.entries)
            found.entries.append(Parameter(name, dtype_name(tensor.dtype), _laid_out(tensor)))
            found.moves += [Move(of, entry, source, target, cast) for of, source, target, cast in moves]
            found.constants += [Constant(entry, value, box) for value, box in done.fills]
        if name in found.opaque and tensor.is_meta and covered(boxes) != _elements(tensor):
            found.uncovered.append(name)
    return found


def _scattered(moves: Mapping[str, Sequence[tuple[str, Box, Box, bool]]]) -> dict[str, str]:
    """Why parameters are left out of a recipe that would fall into too many pieces, those with most of them first."""
    counts = {name: sum(blocks(source, target) for _, source, target, _ in each) for name, each in moves.items()}
    total, found = sum(counts.values()), {}
    for name in sorted(counts, key=counts.__getitem__, reverse=True):
        if total <= MAX_BLOCKS:
            break
        total -= counts[name]
        found[name] = f"it is copied in {counts[name]} pieces, and all together in more than {MAX_BLOCKS}"
    return found


def _elements(tensor: torch.Tensor) -> int:
    """That its storage has room for."""
    return tensor.untyped_storage().nbytes() // tensor.dtype.itemsize


def _whole(tensor: torch.Tensor) -> Box:
    return Box(0, (_elements(tensor),), (1,))


def _last(moves: Sequence[tuple[str, Box, Box, bool]]) -> list[tuple[str, Box, Box, bool]]:
    """What is written to the very same place again stands as it was written last."""
    return list({move[2]: move for move in moves}.values())


def _unsaid(
    tensor: torch.Tensor, moves: Sequence[tuple[str, Box, Box, bool]], fills: Sequence[tuple[bytes, Box]]
) -> str:
    """Why these writes are no recipe; empty where they are one."""
    targets = [move[2] for move in moves]
    count = _elements(tensor)
    if not apart(targets):
        return "weights are written over weights"
    if len(fills) > 1 and not apart([box for _, box in fills]):
        return "values are written over values"
    written = sum(prod(box.shape) for box in targets)
    if written == count:
        return ""
    left = covered([*targets, *(box for _, box in fills)])
    if left is None:
        return "its writes are too many to tell what they cover"
    if left != count:
        return f"{left} of {count} elements are written"
    return ""


def _laid_out(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of its entry: its own where it is its storage row by row, else that of the storage, flat."""
    count = _elements(tensor)
    return tuple(tensor.shape) if tensor.is_contiguous() and tensor.numel() == count else (count,)


def placed(tensor: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
    """An attached entry as the parameter that it is of: with that one's shape, strides and offset."""
    flat = entry.view(-1)
    return flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset() + tensor.storage_offset())


_NAMES = {
    getattr(torch, kind.torch): name
    for name, kind in DTYPES.items()
    if kind.torch and kind.bits >= 8 and hasattr(torch, kind.torch)
}


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors names it. Raises ValueError where it has no name there."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ValueError(f"{dtype} has no name in safetensors that torch tensors are saved by") from None
