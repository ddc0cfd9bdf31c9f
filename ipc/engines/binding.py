"""Binding: a model that an engine builds, with the daemon's memory as its parameters. Knows no engine.

A shim hands over what only the engine knows: a model that it built within ``trace.meta_parameters``, its own
``load_weights``, and the ``Key`` of its layout. Everything else is here, and is all or nothing: what is bound is the
whole model, or an error is raised and nothing of it is left.

>>> with Binding("s3://models/llama-3-8b", Options()) as binding:
...     with meta_parameters():
...         model = build()
...     weights = binding.bind(model, model.load_weights, [Key(headers=binding.headers, ...)])
...     post_process(model)
...     log.info("%s", report(model))
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from weightd.ipc.client import Client
from weightd.ipc.dtypes import DTYPES
from weightd.ipc.errors import AttachTimeout, ModelMismatch, RequestRefused, WeightdError
from weightd.ipc.lease import socket_path
from weightd.ipc.recipe import Box, Key, Move, Parameter, digest_of, encode
from weightd.ipc.report import Report
from weightd.ipc.trace import Trace, placed, rebind, trace
from weightd.ipc.weights import Weights, attach

Load = Callable[[Iterable[tuple[str, torch.Tensor]]], object]
"""An engine's own loader: takes a checkpoint's tensors, by name."""
Modules = Callable[[torch.nn.Module], bool]

MODES = ("auto", "zero-copy", "clone", "stream")
_SHOWN = 5
_PROGRESS_SECONDS = 5.0
_OTHERS_SECONDS = 300.0
"""How long the recipes of the engine's other processes are waited for: they build and trace the same, meanwhile."""
_RAW = "checkpoint:"
"""What a tensor's name is written behind where it is an entry itself, as it is stored: no parameter's has a colon."""


@dataclass(frozen=True)
class Options:
    """What a user may say to a shim."""

    socket: str | None = None
    """The lease socket, or the runtime directory that it is in (default: ``WEIGHTD_RUNTIME_DIR``)."""
    mode: str = "auto"
    """``auto``: of each module what is right, zero-copy first. ``zero-copy``: that or an error. ``clone``: private
    copies. ``stream``: through the engine's own loader."""
    fallback: bool = True
    """Whether the engine may load by itself where the daemon cannot serve it."""
    timeout: float = 1800.0
    """Seconds for all of it, waiting for the stage included."""

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Options:
        """From what the user wrote. Raises ValueError for what is not known, or is of another kind."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"weightd knows no option {', '.join(map(repr, unknown))}, but {', '.join(sorted(known))}")
        found = cls(**given)
        if found.mode not in MODES:
            raise ValueError(f"mode is {found.mode!r}, and can be {', '.join(MODES)}")
        if not isinstance(found.fallback, bool):
            raise ValueError(f"fallback is {found.fallback!r}, and can be true or false")
        if isinstance(found.timeout, bool) or not isinstance(found.timeout, int | float) or found.timeout <= 0:
            raise ValueError(f"timeout is {found.timeout!r}, and can be a number of seconds above 0")
        if found.socket is not None and not isinstance(found.socket, str):
            raise ValueError(f"socket is {found.socket!r}, and can be a path")
        return found


class Untraceable(ModelMismatch):
    """A trace does not show what the engine's loader does: it takes the loader itself (``Binding.stream``)."""


class NoRoom(WeightdError):
    """The device has no room for what the daemon holds and for what the engine would load by itself."""


def fall(error: Exception, options: Options, log: logging.Logger, what: str) -> None:
    """Say why the engine loads ``what`` by itself; where it may not, the error is raised again."""
    if not options.fallback or isinstance(error, NoRoom):
        raise error
    log.warning("weightd: the engine loads %s itself: %s: %s", what, type(error).__name__, error)


class Binding:
    """One model on its way from the daemon into an engine. Close it, or use it in a ``with`` block.

    Making it asks the daemon what the checkpoint's headers say. ``model`` is a URI or a path, ``device`` where the
    segment is to be, or one for each of ``bind``'s keys (default: the daemon's own). Raises DaemonUnavailable,
    RequestRefused, ModelMismatch.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        options: Options,
        *,
        device: str | Sequence[str] | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        text = os.fspath(model)
        self.model = text if ":" in text.partition("/")[0] else os.path.abspath(text)
        self.options = options
        self._device = device
        self._log = log or logging.getLogger(__name__)
        self._end = time.monotonic() + options.timeout
        self._socket = socket_path(options.socket)
        self._weights: Weights | None = None
        self._said = time.monotonic()
        self._client = Client(runtime_directory=self._socket.parent)
        try:
            found = self._client.checkpoint(self.model)
            self.headers: str = found["headers"]
            """Identity of what the headers say."""
            self._stored = {name: (dtype, tuple(shape)) for name, dtype, shape in found["tensors"]}
            self.tensors = {name: _meta(name, *stored) for name, stored in self._stored.items()}
            """The checkpoint's tensors on the meta device, by name."""
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> Binding:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what no model was bound to. Safe to call twice."""
        if self._weights is not None:
            self._weights.close()
            self._weights = None
        self._client.close()

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise AttachTimeout(f"{self.model} was not ready within {self.options.timeout} s; it goes on loading")
        return left

    # ------------------------------------------------------------------ leasing

    def begin(self, keys: Sequence[Key], place: int = 0) -> Weights | None:
        """Lease what these layouts give, where the daemon has them all already, so that it loads while the model is
        being built; else None."""
        if self._weights is not None:
            return self._weights
        try:
            for key in keys:
                self._client.layout(key.digest)
        except RequestRefused as error:
            if error.code == "unknown_layout":
                return None
            raise
        self._weights = self._lease(keys, place)
        return self._weights

    def make_room(self) -> None:
        """Let go, for the engine to load by itself. On a GPU that has no room for both, the daemon has given its memory
        back when this returns. Raises NoRoom where it does not, as others lease it."""
        weights, self._weights = self._weights, None
        if weights is None:
            return
        weights.close()
        if weights.device == "cpu" or torch.cuda.mem_get_info(weights.device)[0] > weights.footprint:
            return
        try:
            self._client.remove(weights.manifest.stage)
        except WeightdError as error:
            raise NoRoom(
                f"{weights.device} has no room for {self.model} a second time, and the daemon keeps it: {error}"
            ) from error

    def take_back(self, model: torch.nn.Module) -> None:
        """A model that was bound is not to be used after all: its lease is this one's again, as before ``bind``."""
        self._weights = _bound.pop(model, self._weights)

    def _lease(self, keys: Sequence[Key], place: int) -> Weights:
        return attach(
            self.model,
            layout=[key.digest for key in keys],
            tp_rank=place,
            device=self._device,
            socket=self._socket,
            wait=False,
            timeout=self._left(),
            progress=self._progress,
        )

    def _wait(self, weights: Weights) -> None:
        """Until all of it is verified, with progress in the log."""
        done, said = 0, time.monotonic()
        for name in () if weights.ready else weights.verified(self._left()):
            done += weights.entry(name).nbytes
            if time.monotonic() - said > _PROGRESS_SECONDS:
                said = time.monotonic()
                self._say(f"{done} of {weights.manifest.nbytes} bytes")

    def _progress(self, told: Mapping[str, Any]) -> None:
        if time.monotonic() - self._said > _PROGRESS_SECONDS:
            self._said = time.monotonic()
            self._say(f"{told['state']}, {told['bytes_done']} of {told['bytes_total']} bytes")

    def _say(self, how: str) -> None:
        self._log.info("weightd: waiting for %s, which the daemon stages: %s", self.model, how)

    # ------------------------------------------------------------------ binding

    def bind(
        self,
        model: torch.nn.Module,
        load: Load,
        keys: Sequence[Key],
        place: int = 0,
        *,
        writes: Modules = lambda module: True,
    ) -> Weights:
        """Let the model's parameters be the daemon's memory, laid out as ``load`` would have done it.

        ``keys`` are those of all the engine's processes on this node, each of which uploads its own recipe: a segment
        each, of one stage, so that every byte is read once. ``place`` is this one's. ``writes`` says of a module
        whether the engine's post-processing may write to its parameters: on a GPU such a module gets a copy of its
        own, host memory is copied on write anyhow.

        The lease lasts as long as the model, where anything is lent, and is in ``weights_of(model)``. Raises
        ModelMismatch where a parameter is covered by nothing, Untraceable, and what ``attach`` raises; the model is of
        no use then.
        """
        traced = self._traced(model, load)
        recipe = self._recipe(keys[place], traced)
        self._client.put_layout(keys[place].digest, recipe)
        for key in keys:
            if key != keys[place]:
                self._client.layout(key.digest, wait=min(self._left(), _OTHERS_SECONDS))
        if self._weights is None:
            self._weights = self._lease(keys, place)
        weights = self._weights
        self._wait(weights)
        if weights.manifest.layout != digest_of(recipe):
            raise ModelMismatch(
                f"{self.model}: the segment is in layout {weights.manifest.layout}, this engine has traced "
                f"{digest_of(recipe)}"
            )
        self._load_opaque(_held(model), traced, weights, load)
        modes, lent = self._place(model, traced, weights, self._cloned(model, traced, weights, writes))
        if left := [name for name, tensor in _held(model).items() if tensor.is_meta]:
            raise ModelMismatch(f"{self.model}: nothing gives {_named(left)} of {type(model).__name__} memory")
        weights.report = Report(modes, lent, lent, 0, weights.manifest.nbytes)
        if not lent:
            weights.close()  # all of it is this process's own
        _bound[model] = weights
        self._weights = None  # the model's, from now on
        return weights

    def teach(self, model: torch.nn.Module, load: Load, key: Key) -> dict[str, Any]:
        """Give the daemon the layout of a model that is not to be bound (``weightd trace``); what it says of that, of
        which ``model`` it is, and which parameters are ``opaque``.

        Raises ModelMismatch, Untraceable, RequestRefused.
        """
        traced = self._traced(model, load)
        told = self._client.put_layout(key.digest, self._recipe(key, traced))
        return {**told, "model": self.model, "opaque": sorted(traced.opaque)}

    def _traced(self, model: torch.nn.Module, load: Load) -> Trace:
        """Raises ModelMismatch, Untraceable."""
        what = type(model).__name__
        try:
            traced = trace(model, self.tensors, load)
        except Exception as error:  # whatever an engine's loader raises
            raise Untraceable(f"{self.model}: the loader of {what} needs more than shapes: {error}") from error
        if traced.untouched:
            raise ModelMismatch(f"{self.model} has nothing for {_named(traced.untouched)} of {what}")
        if traced.uncovered:
            raise Untraceable(f"{self.model} is not known to fill all of {_named(traced.uncovered)} of {what}")
        if self.options.mode == "zero-copy" and traced.opaque:
            name, opaque = next(iter(traced.opaque.items()))
            raise ModelMismatch(
                f"{self.model}: {len(traced.opaque)} parameters of {what} are not the checkpoint's elements, as "
                f"{name!r} ({opaque.why}): mode 'auto' gives these memory of their own"
            )
        return traced

    def _place(
        self, model: torch.nn.Module, traced: Trace, weights: Weights, cloned: set[str]
    ) -> tuple[dict[str, int], int]:
        """Put each parameter in its place; returns how many went which way, and the bytes that are lent."""
        modes = {"zero-copy": 0, "clone": 0, "opaque": 0}
        memory: dict[str, torch.Tensor] = {}
        lent = 0
        for name, tensor in _held(model).items():
            owner = traced.owners[name]
            if owner in traced.opaque:
                modes["opaque"] += 1
            elif owner in weights:
                modes["clone" if owner in cloned else "zero-copy"] += 1
                if owner not in memory:
                    entry = weights[owner]
                    memory[owner] = torch.empty_like(entry).copy_(entry) if owner in cloned else entry
                    lent += 0 if owner in cloned else entry.nbytes
                rebind(tensor, placed(tensor, memory[owner]))
            elif tensor.is_meta and not tensor.numel():
                rebind(tensor, placed(tensor, torch.empty(0, dtype=tensor.dtype, device=weights.device)))
        return modes, lent

    def _recipe(self, key: Key, traced: Trace) -> dict[str, Any]:
        entries, moves = list(traced.entries), list(traced.moves)
        for name in sorted(traced.tensors):
            dtype, shape = self._stored[name]
            whole = Box(0, (self.tensors[name].numel(),), (1,))
            moves.append(Move(name, len(entries), whole, whole))
            entries.append(Parameter(_RAW + name, dtype, shape))
        return encode(key, self.tensors, entries, moves, traced.constants)

    def _load_opaque(self, held: Mapping[str, torch.Tensor], traced: Trace, weights: Weights, load: Load) -> None:
        """Give what no recipe describes memory of its own, and let the engine's loader write to it. Whatever else that
        would write to is on the meta device still."""
        if not traced.opaque:
            return
        memory: dict[str, torch.Tensor] = {}
        for name, tensor in held.items():
            owner = traced.owners[name]
            if owner in traced.opaque and tensor.is_meta:
                if owner not in memory:
                    count = held[owner].untyped_storage().nbytes() // tensor.dtype.itemsize
                    memory[owner] = torch.empty(count, dtype=tensor.dtype, device=weights.device)
                rebind(tensor, placed(tensor, memory[owner]))
        self._log.info(
            "weightd: %d parameters go through the engine's own loader: %s",
            len(traced.opaque),
            "; ".join(f"{name}: {opaque.why}" for name, opaque in list(traced.opaque.items())[:_SHOWN]),
        )
        lent = weights.device != "cpu"  # where a loader that writes to what it is given would end the process
        given = ((name, weights[_RAW + name]) for name in self.tensors if name in traced.tensors)
        with torch.no_grad():
            load((name, tensor.clone() if lent else tensor) for name, tensor in given)

    def _cloned(self, model: torch.nn.Module, traced: Trace, weights: Weights, writes: Modules) -> set[str]:
        """Owners of what is to be a private copy."""
        if self.options.mode == "clone":
            return set(traced.owners.values())
        if weights.device == "cpu":
            return set()
        # By object: a tied parameter has one name here, and several modules.
        owners = {id(tensor): traced.owners[name] for name, tensor in _held(model).items()}
        found = {
            owners[id(tensor)]
            for module in model.modules()
            if writes(module)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        }
        if found and self.options.mode == "zero-copy":
            raise ModelMismatch(
                f"{self.model}: post-processing may write to {_named(sorted(found))}, which is lent read-only: mode "
                "'auto' gives these copies of their own"
            )
        return found

    # ------------------------------------------------------------------ streaming

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's own tensors as they become verified, for the engine's loader; the lease ends with the last.

        Raises what ``attach`` and ``Weights.stream`` raise.
        """
        with attach(
            self.model,
            device=self._device if isinstance(self._device, str) or self._device is None else self._device[0],
            socket=self._socket,
            wait=False,
            timeout=self._left(),
        ) as weights:
            lent = weights.device != "cpu"  # read-only there, and loaders may write to what they are given
            for name, tensor in weights.stream(self._left()):
                yield name, tensor.clone() if lent else tensor


_bound: weakref.WeakKeyDictionary[torch.nn.Module, Weights] = weakref.WeakKeyDictionary()
# Not an attribute of the model: a lease can be neither pickled nor deep-copied, and models are.


def weights_of(model: torch.nn.Module) -> Weights | None:
    """What a model was bound to; the lease ends when the model is garbage."""
    return _bound.get(model)


def report(model: torch.nn.Module) -> Report | None:
    """What is lent now, of the model's parameters; it is ``weights_of(model).report`` from then on."""
    weights = _bound.get(model)
    if weights is None or weights.report is None:
        return None
    own = {(tensor.data_ptr(), tensor.nbytes): tensor for tensor in model.parameters()}
    aliasing = sum(tensor.nbytes for tensor in own.values() if weights.aliases(tensor))
    before = weights.report
    nbytes = sum(tensor.nbytes for tensor in own.values())
    weights.report = Report(before.modes, before.lent_nbytes, aliasing, nbytes, before.segment_nbytes)
    return weights.report


def _meta(name: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    kind = DTYPES[dtype].torch if dtype in DTYPES else None
    found = getattr(torch, kind, None) if kind else None
    if found is None:
        raise ModelMismatch(f"tensor {name!r} is {dtype}, for which torch {torch.__version__} has no type")
    if dtype == "F4":
        shape = (*shape[:-1], shape[-1] // 2)
    return torch.empty(shape, dtype=found, device="meta")


def _held(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those first that are views: what has views cannot be given other memory."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return dict(sorted(held.items(), key=lambda item: not item[1]._is_view()))


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
