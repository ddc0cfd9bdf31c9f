"""What modules keep beside their parameters is right once these are other memory, or it is said that it cannot be."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from weightd.ipc.engines.attributes import Attributes  # noqa: E402
from weightd.ipc.engines.binding import Untraceable  # noqa: E402
from weightd.ipc.trace import meta_parameters, placed, rebind  # noqa: E402


class Convolution(torch.nn.Module):
    """Keeps views of its weight, in both ways that SGLang's linear attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(4, 1, 3), requires_grad=False)
        self.squeezed = self.weight.view(4, 3)
        self.halves = (self.weight[:2], "and", self.weight[2:])
        self.register_buffer("table", torch.arange(6.0))
        self.odd = self.table[1::2]

    def absorb(self) -> None:
        """What a model computes of its weights at the end of loading."""
        self.total = self.weight.sum(dim=0)


def test_views_are_of_what_the_parameter_became() -> None:
    with meta_parameters():
        model = Convolution()
    attributes = Attributes(model)
    # In the middle of other memory, as an entry of a segment is.
    lent = torch.arange(30.0)[10:22].view(4, 1, 3)
    rebind(model.weight, placed(model.weight, lent))
    attributes.restore(model, None)
    assert torch.equal(model.squeezed, lent.view(4, 3))
    assert model.squeezed.data_ptr() == lent.data_ptr()
    assert torch.equal(model.halves[0], lent[:2])
    assert model.halves[1] == "and"
    assert torch.equal(model.halves[2], lent[2:])
    assert torch.equal(model.odd, torch.tensor([1.0, 3.0, 5.0]))


def test_what_loading_computes_is_computed_of_what_the_parameter_became() -> None:
    with meta_parameters():
        model = Convolution()
    attributes = Attributes(model)
    model.absorb()  # as it does while it is traced
    assert model.total.is_meta
    lent = torch.arange(12.0).view(4, 1, 3)
    rebind(model.weight, placed(model.weight, lent))
    attributes.restore(model, model.absorb)
    assert torch.equal(model.total, lent.sum(dim=0))


def test_what_nobody_computes_anew_is_named() -> None:
    with meta_parameters():
        model = Convolution()
    attributes = Attributes(model)
    model.absorb()
    rebind(model.weight, placed(model.weight, torch.zeros(4, 1, 3)))
    with pytest.raises(Untraceable, match=r"Convolution computes Convolution\.total as it loads"):
        attributes.restore(model, None)
