"""Binding a model, whatever engine builds it, to a real daemon's memory."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.ipc.engines.conftest import leases_of
from tests.servers import Daemon
from weightd.ipc import AttachTimeout, DaemonUnavailable, ModelMismatch, RequestRefused
from weightd.ipc.engines.binding import Binding, Options, Untraceable, fall, report, weights_of
from weightd.ipc.recipe import Key
from weightd.ipc.trace import Trace, meta_parameters

Load = Callable[[nn.Module, Iterable[tuple[str, torch.Tensor]]], None]


class Model(nn.Module):
    """A fused weight, of which a rank has its columns, and a decay that is a function of what is stored."""

    def __init__(self, columns: int = 8) -> None:
        super().__init__()
        self.register_parameter("qk", nn.Parameter(torch.empty(12, columns), requires_grad=False))
        self.register_parameter("decay", nn.Parameter(torch.empty(5), requires_grad=False))
        self.register_buffer("table", torch.arange(3))


def loader(model: Any, rank: int = 0, ranks: int = 1) -> Callable[[Iterable[tuple[str, torch.Tensor]]], None]:
    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            width = 8 // ranks
            if name == "q":
                model.qk.data[:8].copy_(tensor[:, rank * width : (rank + 1) * width])
            elif name == "k":
                model.qk.data[8:].copy_(tensor[:, rank * width : (rank + 1) * width])
            elif name == "log_decay":
                model.decay.data.copy_(-torch.exp(tensor))

    return load


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    tensors = {"q": (8, 8), "k": (4, 8), "log_decay": (5,), "unused": (1000,)}
    save_file({name: torch.randn(shape, generator=generator) for name, shape in tensors.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    return tmp_path


def key_of(binding: Binding, rank: int = 0, ranks: int = 1) -> Key:
    """Of this test alone: the daemon is all tests'."""
    return Key(binding.headers, "tests", binding.model, "float32", "0" * 64, rank, {"tensor": ranks})


def assert_nothing_is_leased(daemon: Daemon, folder: Path) -> None:
    """The daemon notices that a connection was closed, in its own time."""
    deadline = time.monotonic() + 10
    while found := leases_of(daemon, folder):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def built(columns: int = 8) -> Any:
    with meta_parameters():
        return Model(columns)


def expected(folder: Path, rank: int = 0, ranks: int = 1) -> Model:
    from safetensors.torch import load_file

    model = Model(8 // ranks)
    loader(model, rank, ranks)(load_file(folder / "model.safetensors").items())
    return model


def assert_equal(model: Any, wanted: Any) -> None:
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_parameters_are_the_segment_and_what_is_computed_is_the_loaders(daemon: Daemon, checkpoint: Path) -> None:
    model = built()
    held = dict(model.named_parameters())
    with Binding(checkpoint, Options()) as binding:
        weights = binding.bind(model, loader(model), [key_of(binding)])
    assert_equal(model, expected(checkpoint))
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert weights.aliases(model.qk)
    assert not weights.aliases(model.decay)
    assert weights_of(model) is weights
    found = report(model)
    assert found is weights.report
    assert found is not None
    assert found.modes == {"zero-copy": 1, "clone": 0, "opaque": 1}
    assert (found.lent_nbytes, found.aliasing_nbytes, found.parameter_nbytes) == (384, 384, 404)
    assert "384 of 404 bytes of parameters (95.0%) are the daemon's memory" in str(found)
    # Of the rest nothing was read, nor does it lie in the segment.
    assert "checkpoint:log_decay" in weights
    assert found.segment_nbytes < 1000
    assert len(leases_of(daemon, checkpoint)) == 1
    del model, weights, held
    gc.collect()
    assert_nothing_is_leased(daemon, checkpoint)


def test_a_second_start_leases_before_it_builds(daemon: Daemon, checkpoint: Path) -> None:
    with Binding(checkpoint, Options()) as binding:
        assert binding.begin([key_of(binding)]) is None
        first = built()
        weights = binding.bind(first, loader(first), [key_of(binding)])
    with Binding(checkpoint, Options()) as binding:
        begun = binding.begin([key_of(binding)])
        assert begun is not None
        assert begun.footprint >= begun.manifest.nbytes
        second = built()
        assert binding.bind(second, loader(second), [key_of(binding)]) is begun
        assert second.qk.data_ptr() == first.qk.data_ptr()  # one mapping in a process
    assert begun.manifest.stage == weights.manifest.stage
    assert_equal(second, expected(checkpoint))


def test_ranks_upload_their_own_recipes_and_share_a_stage(daemon: Daemon, checkpoint: Path) -> None:
    models: list[Any] = [built(4), built(4)]

    def bind(rank: int) -> None:
        with Binding(checkpoint, Options()) as binding:
            keys = [key_of(binding, number, 2) for number in range(2)]
            binding.bind(models[rank], loader(models[rank], rank, 2), keys, rank)

    threads = [threading.Thread(target=bind, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank, model in enumerate(models):
        assert_equal(model, expected(checkpoint, rank, 2))
        weights = weights_of(model)
        assert weights is not None
        assert weights.manifest.tp_rank == rank
    assert len({lease["stage"] for lease in leases_of(daemon, checkpoint)}) == 1


def test_private_copies_end_the_lease(daemon: Daemon, checkpoint: Path) -> None:
    model = built()
    with Binding(checkpoint, Options(mode="clone")) as binding:
        weights = binding.bind(model, loader(model), [key_of(binding)])
    assert_equal(model, expected(checkpoint))
    assert not weights.aliases(model.qk)
    found = report(model)
    assert found is not None
    assert (found.share, found.modes["clone"]) == (0.0, 1)
    assert_nothing_is_leased(daemon, checkpoint)


def test_what_is_streamed_is_the_checkpoint(daemon: Daemon, checkpoint: Path) -> None:
    model = Model()
    with Binding(checkpoint, Options(mode="stream")) as binding:
        loader(model)(binding.stream())
    assert_equal(model, expected(checkpoint))
    assert_nothing_is_leased(daemon, checkpoint)


def test_another_recipe_by_the_same_key_is_refused_and_nothing_is_left(daemon: Daemon, checkpoint: Path) -> None:
    first, other = built(), built()
    with Binding(checkpoint, Options()) as binding:
        binding.bind(first, loader(first), [key_of(binding)])

        def swapped(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for name, tensor in weights:
                if name == "q":
                    other.qk.data.copy_(tensor[:1].expand(12, 8))
                elif name == "log_decay":
                    other.decay.data.copy_(tensor)

    (lease,) = leases_of(daemon, checkpoint)
    with Binding(checkpoint, Options()) as binding, pytest.raises(RequestRefused) as refused:
        binding.bind(other, swapped, [key_of(binding)])
    assert refused.value.code == "layout_differs"
    assert leases_of(daemon, checkpoint) == [lease]
    assert weights_of(other) is None


def test_the_recipe_of_another_checkpoint_is_refused(daemon: Daemon, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file({"q": torch.zeros(8, 8), "k": torch.zeros(4, 8), "log_decay": torch.zeros(6)}, other / "m.safetensors")
    with Binding(other, Options()) as binding:
        foreign = binding.headers
    model = built()
    with Binding(checkpoint, Options()) as binding, pytest.raises(RequestRefused, match="it is of a checkpoint with"):
        binding.bind(model, loader(model), [Key(foreign, "tests", "1", "float32", "0" * 64)])
    assert_nothing_is_leased(daemon, checkpoint)


def test_what_nothing_covers_is_never_filled(daemon: Daemon, checkpoint: Path) -> None:
    model = built()
    model.register_parameter("extra", nn.Parameter(torch.empty(2, device="meta"), requires_grad=False))
    with Binding(checkpoint, Options()) as binding, pytest.raises(ModelMismatch, match="has nothing for 'extra' of"):
        binding.bind(model, loader(model), [key_of(binding)])
    model = built()
    model.register_buffer("lost", torch.empty(2, device="meta"))
    with Binding(checkpoint, Options()) as binding, pytest.raises(ModelMismatch, match="has nothing for 'lost' of"):
        binding.bind(model, loader(model), [key_of(binding)])
    model = built()

    def half(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        loader(model)((name, tensor) for name, tensor in weights if name != "k")

    with (
        Binding(checkpoint, Options()) as binding,
        pytest.raises(Untraceable, match="is not known to fill all of 'qk'"),
    ):
        binding.bind(model, half, [key_of(binding)])
    assert_nothing_is_leased(daemon, checkpoint)


def test_what_a_mode_does_not_allow_is_an_error(daemon: Daemon, checkpoint: Path) -> None:
    model = built()
    with (
        Binding(checkpoint, Options(mode="zero-copy")) as binding,
        pytest.raises(ModelMismatch, match=r"'decay' \(it is computed from weights\): mode 'auto' gives"),
    ):
        binding.bind(model, loader(model), [key_of(binding)])


def test_on_a_gpu_what_may_be_written_to_is_a_copy_whoever_shares_it(daemon: Daemon, checkpoint: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.written, self.read, self.alone = nn.Module(), nn.Module(), nn.Module()
            for module in (self.written, self.alone):
                module.weight = nn.Parameter(torch.empty(2, 2), requires_grad=False)
            self.read.weight = self.written.weight

    model: Any = Tied()
    owners = {"written.weight": "written.weight", "alone.weight": "alone.weight"}
    traced = Trace([], [], [], {}, [], [], owners)
    there: Any = SimpleNamespace(device="cuda:0")
    here: Any = SimpleNamespace(device="cpu")

    def writes(module: nn.Module) -> bool:
        return module is model.read

    with Binding(checkpoint, Options()) as binding:
        assert binding._cloned(model, traced, there, writes) == {"written.weight"}
        assert binding._cloned(model, traced, here, writes) == set()
    with (
        Binding(checkpoint, Options(mode="zero-copy")) as binding,
        pytest.raises(ModelMismatch, match="lent read-only"),
    ):
        binding._cloned(model, traced, there, writes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sokcet": "x"}, "weightd knows no option 'sokcet', but fallback, mode, socket, timeout"),
        ({"mode": "fast"}, "mode is 'fast', and can be auto, zero-copy, clone, stream"),
        ({"fallback": "no"}, "fallback is 'no', and can be true or false"),
        ({"timeout": 0}, "timeout is 0, and can be a number of seconds above 0"),
        ({"timeout": True}, "timeout is True, and can be a number of seconds above 0"),
        ({"socket": 3}, "socket is 3, and can be a path"),
    ],
)
def test_options_that_are_not_known_are_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options.read(given)


def test_time_that_is_up_and_daemons_that_are_away_are_told_apart(
    daemon: Daemon, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(DaemonUnavailable):
        Binding(checkpoint, Options(socket=str(tmp_path)))
    model = built()
    with Binding(checkpoint, Options(timeout=1e-9)) as binding, pytest.raises(AttachTimeout):
        binding.bind(model, loader(model), [key_of(binding)])


def test_falling_is_said_once_or_raised(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("tests")
    fall(ModelMismatch("no"), Options(), log, "a model")
    assert [record.message for record in caplog.records] == [
        "weightd: the engine loads a model itself: ModelMismatch: no"
    ]
    with pytest.raises(ModelMismatch):
        fall(ModelMismatch("no"), Options(fallback=False), log, "a model")
