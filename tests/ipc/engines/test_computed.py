"""What Transformers classes compute themselves is really computed, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Daemon
from weightd.ipc import ModelMismatch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.ipc.engines.conftest import Lend  # noqa: E402
from tests.ipc.engines.models import BART, MARIAN, drop, llama, rewritten, same, saved  # noqa: E402
from weightd.ipc.engines.transformers import load  # noqa: E402


class Scaled(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
    """Has a buffer that its constructor makes of ``scale``, and that its initialisation fills in where it ``fills``."""

    scale_of: Any = torch.full((4,), 2.0)
    fills: Callable[[Any], object] = staticmethod(lambda _: None)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("scale", self.scale_of.clone(), persistent=False)

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if module is self:
            self.fills(self.scale)


@pytest.mark.parametrize(
    "scale",
    [
        torch.full((4,), 2.0), torch.full((4,), 2.0).bfloat16(), torch.arange(4), torch.arange(4, dtype=torch.int32),
        torch.arange(4, dtype=torch.uint8), torch.tensor([True, False]), torch.full((4,), 2 + 1j), torch.tensor(7),
        torch.zeros(3), torch.ones(3, dtype=torch.int64), torch.ones(2, 3).to(torch.float8_e4m3fn),
    ],
    ids=lambda scale: f"{scale.dtype}-{tuple(scale.shape)}",
)  # fmt: skip
def test_a_class_that_computes_buffers_in_its_constructor_only_is_refused(
    daemon: Daemon, tmp_path: Path, scale: Any
) -> None:
    folder = llama(tmp_path / "m")

    class Constructed(Scaled):
        scale_of = scale

    with pytest.raises(ModelMismatch, match=r"Constructed does not compute 'scale'.*_init_weights"):
        load(folder, model_class=Constructed)

    class Initialised(Scaled):
        scale_of = scale
        fills = staticmethod(lambda buffer: buffer.copy_(scale))

    found = load(folder, model_class=Initialised).scale
    assert found.dtype == scale.dtype
    assert found.tolist() == scale.tolist()


@pytest.mark.parametrize(
    "fills",
    [lambda buffer: buffer[1:].fill_(3), lambda buffer: buffer.normal_()],
    ids=["in part", "at random"],
)
def test_a_buffer_that_is_filled_in_part_or_at_random_is_refused(daemon: Daemon, tmp_path: Path, fills: Any) -> None:
    class Filled(Scaled):
        pass

    Filled.fills = staticmethod(fills)
    folder = llama(tmp_path / "m")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(ModelMismatch, match="Filled does not compute 'scale'"):
        load(folder, model_class=Filled)
    assert torch.equal(torch.rand(3), expected)  # whoever loads keeps the random numbers that were to come


def test_an_empty_buffer_is_computed_as_it_is(daemon: Daemon, tmp_path: Path) -> None:
    class Empty(Scaled):
        scale_of = torch.empty(0, dtype=torch.int64)

    assert load(llama(tmp_path / "m"), model_class=Empty).scale.shape == (0,)


SINUSOIDS = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")


@pytest.mark.parametrize(
    ("architecture", "options", "without", "own"),
    [
        ("MarianMTModel", MARIAN, (), SINUSOIDS),
        ("MarianMTModel", MARIAN, ("final_logits_bias",), (*SINUSOIDS, "final_logits_bias")),
        ("BartForConditionalGeneration", BART, (), ()),
        ("BartForConditionalGeneration", BART, ("final_logits_bias",), ("final_logits_bias",)),
        ("PegasusForConditionalGeneration", BART, ("final_logits_bias",), ("final_logits_bias",)),
    ],
)
def test_what_a_class_may_do_without_is_computed_as_from_pretrained_does(
    lend: Lend,
    tmp_path: Path,
    architecture: str,
    options: dict[str, Any],
    without: tuple[str, ...],
    own: tuple[str, ...],
) -> None:
    folder = saved(tmp_path / "m", architecture, **options)

    def change(tensors: dict[str, Any]) -> None:
        for name in without:
            del tensors[name]

    weights = lend(rewritten(folder, change))
    if architecture.startswith("Pegasus"):
        own += tuple(name for name in SINUSOIDS if name not in weights)
    model = same(weights, folder, own)
    assert type(model).__name__ == architecture


def test_what_a_class_may_do_without_but_draws_at_random_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    class Forgetful(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        _keys_to_ignore_on_load_missing = (r"lm_head\.weight",)

    folder = rewritten(llama(tmp_path / "m", tie_word_embeddings=False), drop("lm_head.weight"))
    with pytest.raises(ModelMismatch, match=r"does not compute 'lm_head\.weight'.*at random"):
        load(folder, model_class=Forgetful)
