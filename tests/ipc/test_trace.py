"""Tracing: a recipe makes of a checkpoint, byte for byte, what the loader that was traced makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightd.ipc.boxes import blocks
from weightd.ipc.recipe import Box
from weightd.ipc.trace import MAX_BLOCKS, Trace, meta_parameters, placed, rebind, trace

Weights = Iterable[tuple[str, torch.Tensor]]
Writes = Callable[[nn.Module, torch.Tensor], None]
ROWS, COLUMNS = 8, 6


class Model(nn.Module):
    """One weight and one bias, unless it is told otherwise."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in (shapes or {"weight": (ROWS, COLUMNS), "bias": (ROWS,)}).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16), requires_grad=False))


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def boxed(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    flat = tensor.view(-1)
    return flat.as_strided(box.shape, box.strides, flat.storage_offset() + box.offset)


def written(found: Trace, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of a recipe, carried out; what it leaves is full of ones."""
    kinds = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
    made = [torch.ones(entry.shape, dtype=kinds[entry.dtype]) for entry in found.entries]
    for constant in found.constants:
        target = made[constant.entry]
        boxed(target, constant.target).fill_(torch.frombuffer(bytearray(constant.value), dtype=target.dtype)[0])
    for move in found.moves:
        source, target = boxed(tensors[move.tensor], move.source), made[move.entry]
        boxed(target, move.target).copy_(source if move.cast else source.view(target.dtype))
    return {entry.name: tensor for entry, tensor in zip(found.entries, made, strict=True)}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same(
    build: Callable[[], nn.Module], load: Callable[[nn.Module, Weights], None], tensors: dict[str, torch.Tensor]
) -> Trace:
    """That the recipe of a loader, carried out, is what the loader does; returns the trace."""
    expected = build()
    with torch.no_grad():
        load(expected, {name: tensor.clone() for name, tensor in tensors.items()}.items())
    with meta_parameters():
        model = build()
    assert all(parameter.is_meta for parameter in model.parameters())
    found = traced(model, load, tensors)
    entries = written(found, tensors)
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if (owner := found.owners[name]) in entries:
            rebind(parameter, placed(parameter, entries[owner]))
    for name, parameter in model.named_parameters():
        if found.owners[name] not in found.opaque:
            wanted = expected.get_parameter(name)
            assert (parameter.shape, parameter.stride(), type(parameter)) == (
                wanted.shape, wanted.stride(), type(wanted),
            )  # fmt: skip
            assert torch.equal(raw(parameter), raw(wanted)), name
    return found


def traced(model: nn.Module, load: Callable[[nn.Module, Weights], None], tensors: dict[str, torch.Tensor]) -> Trace:
    shells = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    return trace(model, shells, lambda weights: load(model, weights))


def each(write: Writes) -> Callable[[nn.Module, Weights], None]:
    def load(model: nn.Module, weights: Weights) -> None:
        for _, tensor in weights:
            write(model, tensor)

    return load


def fused(model: Any, weight: torch.Tensor) -> None:
    model.weight.data[:5].copy_(weight[:5])
    model.weight.data.narrow(0, 5, 3).copy_(weight[5:])


def columns(model: Any, weight: torch.Tensor) -> None:
    for first in (0, 2, 4):
        model.weight.data[:, first : first + 2].copy_(weight[:, 4 - first : 6 - first])


def padded(model: Any, weight: torch.Tensor) -> None:
    model.weight.data[:6].copy_(weight[:6])
    model.weight.data[6:].fill_(0)


def interleaved(model: Any, weight: torch.Tensor) -> None:
    model.weight.data.copy_(weight.view(2, 4, COLUMNS).transpose(0, 1).reshape(ROWS, COLUMNS))


def twice(model: Any, weight: torch.Tensor) -> None:
    model.weight.data.copy_(weight)
    model.weight.data.copy_(weight)


def zeroed_first(model: Any, weight: torch.Tensor) -> None:
    model.weight.data.zero_()
    model.weight.data[2:].copy_(weight[2:])


def reshaped(model: Any, weight: torch.Tensor) -> None:
    model.weight.data.view(2, 4, COLUMNS).copy_(weight.reshape(2, 4, COLUMNS))


def broadcast(model: Any, weight: torch.Tensor) -> None:
    model.weight.data.copy_(weight[0])


def joined(model: Any, weight: torch.Tensor) -> None:
    model.weight.data.copy_(torch.cat([weight[4:], weight[:4]]))


def joined_and_cut(model: Any, weight: torch.Tensor) -> None:
    both = torch.cat([weight[:, 3:], weight[:, :2], weight[:, 2:3]], dim=1)
    model.weight.data[:3].copy_(both.narrow(0, 2, 3))
    model.weight.data[3:].copy_(both[:5])


def joined_and_transposed(model: Any, weight: torch.Tensor) -> None:
    tall = torch.cat([weight[:, :2].t(), weight[:, 2:].t()])
    model.weight.data[:, 1:5].copy_(tall[1:5].t())
    model.weight.data[:, 0].copy_(tall[0])
    model.weight.data[:, 5].copy_(tall[5])


def stacked(model: Any, weight: torch.Tensor) -> None:
    rows = torch.stack([weight[4:], weight[:4]])
    model.weight.data[:4].copy_(rows[1])
    model.weight.data.view(2, 4, COLUMNS)[1].copy_(rows[0])


def overwritten(model: Any, weight: torch.Tensor) -> None:
    model.weight.data[:3].copy_(weight.clone()[:3])
    weight.zero_()
    model.weight.data[3:].copy_(weight[3:])


def through_float32(model: Any, weight: torch.Tensor) -> None:
    model.weight.data.copy_(weight.float())


@pytest.mark.parametrize(
    "write",
    [
        lambda model, weight: model.weight.data.copy_(weight),
        lambda model, weight: model.weight.data.copy_(weight.t().contiguous().t()),
        lambda model, weight: model.weight.data.copy_(weight.clone()),
        lambda model, weight: model.weight.data.copy_(weight.to("cpu")),
        fused, columns, padded, interleaved, twice, zeroed_first, reshaped, broadcast, joined, joined_and_cut,
        joined_and_transposed, stacked, overwritten,
    ],
    ids=["whole", "transposed twice", "cloned", "moved", "fused", "columns", "padded", "interleaved", "twice",
         "zeroed first", "reshaped", "broadcast", "joined", "joined and cut", "joined and transposed", "stacked",
         "overwritten"],
)  # fmt: skip
def test_what_a_loader_copies_is_a_recipe(write: Writes) -> None:
    found = assert_same(lambda: Model(weight=(ROWS, COLUMNS)), each(write), {"w": random(ROWS, COLUMNS)})
    assert not found.opaque
    assert not found.untouched


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_a_cast_is_torchs_own_rounding(stored: torch.dtype) -> None:
    for write in (lambda model, weight: model.weight.data.copy_(weight),
                  lambda model, weight: model.weight.data.copy_(weight.to(torch.bfloat16))):  # fmt: skip
        tensors = {"w": (random(ROWS, COLUMNS, dtype=torch.float32) / 3).to(stored)}
        found = assert_same(lambda: Model(weight=(ROWS, COLUMNS)), each(write), tensors)
        assert not found.opaque
        assert all(move.cast for move in found.moves)


def test_bits_that_are_taken_for_others_are_moved_as_they_are() -> None:
    tensors = {"w": random(ROWS, COLUMNS).view(torch.int16)}
    found = assert_same(
        lambda: Model(weight=(ROWS, COLUMNS)),
        each(lambda model, weight: model.weight.data.copy_(weight.view(torch.bfloat16))),
        tensors,
    )
    assert [move.cast for move in found.moves] == [False]


def test_experts_that_are_stacked_and_cut_are_one_entry() -> None:
    experts = {f"experts.{number}.{kind}": random(4, 6) for number in range(3) for kind in ("gate", "up")}

    def load(model: Any, weights: Weights) -> None:
        for name, tensor in weights:
            _, number, kind = name.split(".")
            shard = tensor.narrow(0, 2, 2)
            model.w13.data[int(number)].narrow(0, 0 if kind == "gate" else 2, 2).copy_(shard)

    found = assert_same(lambda: Model(w13=(3, 4, 6)), load, experts)
    assert [entry.name for entry in found.entries] == ["w13"]
    assert len(found.moves) == 6


def test_tied_parameters_are_one_entry_by_either_tie() -> None:
    def build(how: str) -> nn.Module:
        model = Model(embedding=(ROWS, COLUMNS), head=(ROWS, COLUMNS))
        if how == "object":
            model.head = model.embedding
        else:
            rebind(model.head, model.embedding.detach())
        return model

    def load(model: Any, weights: Weights) -> None:
        for _, tensor in weights:
            model.embedding.data.copy_(tensor)

    for how in ("object", "storage"):
        found = assert_same(lambda how=how: build(how), load, {"w": random(ROWS, COLUMNS)})
        assert [entry.name for entry in found.entries] == ["embedding"]
        assert not found.untouched


def test_a_parameter_whose_strides_are_its_own_keeps_them() -> None:
    def build() -> nn.Module:
        model = Model()
        del model.bias
        model.weight = nn.Parameter(torch.empty(COLUMNS, ROWS, dtype=torch.bfloat16).t(), requires_grad=False)
        return model

    load = each(lambda model, weight: model.weight.data.copy_(weight))
    found = assert_same(build, load, {"w": random(ROWS, COLUMNS)})
    assert found.entries[0].shape == (ROWS * COLUMNS,)


def test_a_parameter_that_is_replaced_is_what_took_its_place() -> None:
    def load(model: Any, weights: Weights) -> None:
        for _, tensor in weights:
            model.weight = nn.Parameter(tensor[2:6], requires_grad=False)

    found = assert_same(lambda: Model(weight=(ROWS, COLUMNS)), load, {"w": random(ROWS, COLUMNS)})
    assert found.entries[0].shape == (4, COLUMNS)


def test_a_weight_that_is_transposed_is_copied_along_its_longer_side() -> None:
    for shape in ((ROWS, COLUMNS), (COLUMNS, ROWS)):
        found = assert_same(
            lambda shape=shape: Model(weight=shape),
            each(lambda model, weight: model.weight.data.copy_(weight.t())),
            {"w": random(*reversed(shape))},
        )
        assert [blocks(move.source, move.target) for move in found.moves] == [COLUMNS]


def test_weights_in_more_pieces_than_a_daemon_plans_with_are_left_to_the_loader_the_largest_first() -> None:
    rows = 1 << 18

    def load(model: Any, weights: Weights) -> None:
        for number, (_, tensor) in enumerate(weights):
            model.get_parameter(f"w{number}").data.copy_(tensor.t())

    with torch.device("meta"):
        model = Model(**{f"w{number}": (rows, rows + number) for number in range(6)})
    shells = {f"{number}": torch.empty(rows + number, rows, device="meta").bfloat16() for number in range(6)}
    found = trace(model, shells, lambda weights: load(model, weights))
    # Of six, four come to just as many as may be.
    assert {name: opaque.tensors for name, opaque in found.opaque.items()} == {"w0": {"0"}, "w1": {"1"}}
    assert "copied in 262144 pieces" in found.opaque["w0"].why
    assert sum(blocks(move.source, move.target) for move in found.moves) == MAX_BLOCKS
    assert not found.uncovered


def overlapping(model: Any, weight: torch.Tensor) -> None:
    model.weight.data[:5].copy_(weight[:5])
    model.weight.data[3:].copy_(weight[:5])


def filled_over(model: Any, weight: torch.Tensor) -> None:
    model.weight.data.copy_(weight)
    model.weight.data[3:5].zero_()


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (lambda model, weight: model.weight.data.copy_(-torch.exp(weight.float())), "computed from weights"),
        (lambda model, weight: model.weight.data.copy_(weight[torch.tensor([3, 1, 2, 0, 7, 5, 6, 4])]), "computed"),
        (lambda model, weight: model.weight.data.copy_(weight.double().float()), "converted"),
        (lambda model, weight: model.weight.data.copy_(torch.cat([weight[4:], weight[:4] * 2])), "computed"),
        (lambda model, weight: model.weight.data.copy_(torch.cat([weight[4:], weight[:4]]).mul_(2)), "computed"),
        (lambda model, weight: model.weight.data.view(-1).copy_(torch.cat([weight, weight])[1:9].view(-1)), "computed"),
        (lambda model, weight: torch.add(weight, 1, out=model.weight.data), "computes it"),
        (overlapping, "weights are written over weights"),
        (filled_over, "a value is written over weights"),
        (lambda model, weight: model.weight.data.copy_(torch.arange(COLUMNS)), "no weight"),
    ],
    ids=[
        "computed",
        "permuted",
        "rounded twice",
        "joined with what is computed",
        "joined and computed",
        "joined and flattened",
        "in place",
        "overlapping",
        "filled over",
        "of no weight",
    ],
)
def test_what_is_no_recipe_is_opaque_and_says_why(write: Writes, why: str) -> None:
    with meta_parameters():
        model = Model(weight=(ROWS, COLUMNS))
    found = traced(model, each(write), {"w": random(ROWS, COLUMNS), "x": random(ROWS, COLUMNS)})
    assert why in found.opaque["weight"].why
    assert found.opaque["weight"].tensors
    assert not found.entries
    assert found.uncovered == (["weight"] if why == "computes it" else [])


def test_what_nothing_is_written_to_or_only_in_part_is_named() -> None:
    with meta_parameters():
        model = Model()
    found = traced(model, each(lambda model, weight: model.weight.data[1:].copy_(weight[1:])), {"w": random(8, 6)})
    assert found.untouched == ["bias"]
    assert found.uncovered == ["weight"]
    assert found.opaque["weight"].why == "42 of 48 elements are written"


def test_what_a_constructor_has_written_stays_as_it_was() -> None:
    class Scaled(Model):
        def __init__(self) -> None:
            super().__init__(weight=(ROWS, COLUMNS))
            self.scale = nn.Parameter(torch.ones(3), requires_grad=False)
            self.register_buffer("table", torch.arange(5))

    def load(model: Any, weights: Weights) -> None:
        for _, tensor in weights:
            model.weight.data.copy_(tensor)
            model.scale.data.mul_(2)

    with meta_parameters():
        model = Scaled()
    assert not model.scale.is_meta
    found = traced(model, load, {"w": random(ROWS, COLUMNS)})
    assert torch.equal(model.table, torch.arange(5))
    assert torch.equal(model.scale, torch.ones(3))  # the loader runs over it once more
    assert list(found.opaque) == ["scale"]
    assert not found.uncovered


def test_what_a_constructor_computes_and_moves_to_its_parameters_is_not_lost() -> None:
    class Rotary(Model):
        def __init__(self) -> None:
            super().__init__(weight=(ROWS, COLUMNS))
            self.register_buffer("table", torch.arange(5).to(self.weight.device))

    with meta_parameters():
        model = Rotary()
    assert model.weight.is_meta
    assert torch.equal(model.table, torch.arange(5))


def test_a_loader_that_looks_at_values_is_told_so() -> None:
    with meta_parameters():
        model = Model()
    with pytest.raises(ValueError, match="looks at the values of weights"):
        traced(model, each(lambda model, weight: float(weight.sum())), {"w": random(2, 2)})  # type: ignore[arg-type]


_STEPS = st.lists(
    st.tuples(st.sampled_from(["narrow", "swap", "select", "clone", "double", "flat", "join"]), st.integers(0, 99))
)


def stepped(tensor: torch.Tensor, steps: list[tuple[str, int]]) -> torch.Tensor:
    """A view of a tensor, or a copy of one, as a loader might take it."""
    for kind, number in steps:
        if kind == "clone":
            tensor = tensor.contiguous().clone()
        elif kind == "flat":
            tensor = tensor.reshape(-1)
        elif kind == "join" and tensor.dim():
            dim = number % tensor.dim()
            tensor = torch.cat(tensor.tensor_split([number % tensor.shape[dim]], dim)[::-1], dim)
        elif kind == "double" and tensor.dim() and tensor.shape[0] % 2 == 0:
            tensor = tensor.unflatten(0, (2, tensor.shape[0] // 2))
        elif kind == "narrow" and tensor.dim():
            dim = number % tensor.dim()
            first = number % tensor.shape[dim]
            tensor = tensor.narrow(dim, first, max(1, (tensor.shape[dim] - first) // 2))
        elif kind == "swap" and tensor.dim() > 1:
            tensor = tensor.transpose(number % tensor.dim(), (number + 1) % tensor.dim())
        elif kind == "select" and tensor.dim() > 1:
            tensor = tensor.select(number % tensor.dim(), number % tensor.shape[number % tensor.dim()])
    return tensor


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), _STEPS, _STEPS)
def test_whatever_views_a_loader_takes_the_recipe_is_right_or_there_is_none(
    shape: list[int], steps: list[tuple[str, int]], placing: list[tuple[str, int]]
) -> None:
    weight = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).to(torch.bfloat16).view(shape)
    wanted = stepped(weight, steps)

    def load(model: Any, weights: Weights) -> None:
        for _, tensor in weights:
            model.weight.data.zero_()
            # The first step alone keeps it a view of the parameter.
            target = stepped(model.weight.data, [step for step in placing if step[0] in ("narrow", "swap", "double")])
            source = stepped(tensor, steps)
            if target.shape == source.shape:
                target.copy_(source)
            else:
                model.weight.data.copy_(source)

    found = assert_same(lambda: Model(weight=tuple(wanted.shape)), load, {"w": weight})
    if not any(kind in ("clone", "flat", "join") for kind, _ in steps):
        assert not found.opaque  # views are boxes
