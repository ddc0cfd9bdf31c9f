"""Tensors that modules keep beside their parameters: views of these, and what loading computes of them.

A view of a parameter that has no memory yet stays without, whatever the parameter becomes; so does what a model
computes of its parameters at the end of ``load_weights``, while that is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from weightd.ipc.engines.binding import Untraceable


class _View(NamedTuple):
    """A tensor of a parameter's, or a buffer's, storage; offsets in elements, before that is bound."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    owner: torch.Tensor
    owner_offset: int

    def now(self) -> torch.Tensor:
        flat = self.owner.detach()
        offset = flat.storage_offset() - self.owner_offset + self.offset
        return flat.as_strided(self.shape, self.strides, offset)


class Attributes:
    """What a model's modules hold before it is bound. Views of parameters are taken from them until ``restore``: what
    has views cannot be given other memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        owners: dict[int, torch.Tensor] = {}
        for _, held in (*model.named_parameters(), *model.named_buffers()):
            owners.setdefault(held.untyped_storage()._cdata, held)
        self._views: dict[tuple[torch.nn.Module, str], Any] = {}
        for module, name, value in _attributes(model):
            if any(_owner(tensor, owners) is not None for tensor in _tensors(value)):
                taken = [_taken(each, owners) for each in (value if isinstance(value, tuple) else (value,))]
                self._views[module, name] = tuple(taken) if isinstance(value, tuple) else taken[0]
                vars(module)[name] = None
        self._before = {(module, name): value for module in model.modules() for name, value in vars(module).items()}

    def restore(self, model: torch.nn.Module, compute: Callable[[], object] | None) -> None:
        """Once the model is bound: views see what parameters are now, and ``compute`` is what the model computes of
        them anew. Raises Untraceable where something is left without memory."""
        lost = [(module, name) for module, name, value in _attributes(model) if _meta(value)]
        for module, name in lost:
            if (module, name) in self._before:
                vars(module)[name] = self._before[module, name]
            else:
                del vars(module)[name]
        for (module, name), taken in self._views.items():
            vars(module)[name] = tuple(map(_given, taken)) if type(taken) is tuple else _given(taken)
        if lost and compute is not None:
            compute()
        left = [(module, name) for module, name, value in _attributes(model) if _meta(value)]
        if unsaid := left or (lost if compute is None else []):
            names = sorted({f"{type(module).__name__}.{name}" for module, name in unsaid})
            raise Untraceable(f"{type(model).__name__} computes {', '.join(names)} as it loads")


def _attributes(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, Any]]:
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor | tuple) and any(True for _ in _tensors(value)):
                yield module, name, value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, torch.Tensor):
            yield each


def _meta(value: Any) -> bool:
    return any(tensor.is_meta for tensor in _tensors(value))


def _owner(value: Any, owners: dict[int, torch.Tensor]) -> torch.Tensor | None:
    """Of what a tensor is a view; None where it is none, or is taken for another dtype."""
    if not isinstance(value, torch.Tensor):
        return None
    owner = owners.get(value.untyped_storage()._cdata)
    return None if owner is None or owner is value or owner.dtype != value.dtype else owner


def _taken(value: Any, owners: dict[int, torch.Tensor]) -> Any:
    owner = _owner(value, owners)
    if owner is None:
        return value
    at, owned = int(value.storage_offset()), int(owner.storage_offset())
    return _View(tuple(value.shape), tuple(value.stride()), at, owner, owned)


def _given(value: Any) -> Any:
    return value.now() if isinstance(value, _View) else value
