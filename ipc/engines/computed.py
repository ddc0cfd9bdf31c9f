"""What a Transformers class computes itself, as no checkpoint holds it: rotary frequencies, position ids, sinusoids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from weightd.ipc.errors import ModelMismatch

_SHOWN = 5


def compute(model: Any, held: Iterable[Sequence[str]], device: torch.device) -> None:
    """Fill the non-persistent buffers of a model on the meta device, and those of ``held`` (groups of names that one
    tensor has in the state dict) which the class may do without in a checkpoint.

    The class does so in its initialisation of weights, which is run while all that is lent is still to come: parameters
    are on the meta device, where no class can write to them. It is run twice, over memory of zeros and of ones: what is
    not the same after both was left as it was, in part perhaps, or drawn at random. Raises ModelMismatch for that.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # what Transformers marks by it, it does not initialise
    groups = [[name] for name, _ in model.named_non_persistent_buffers(remove_duplicate=False)]
    groups += [list(names) for names in held]
    if not groups:
        return
    # What draws at random is refused; whoever calls shall not notice that it has drawn.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        first, second = (_fill(model, groups, device, byte) for byte in (0, 1))
    kept = {
        names[0] for names, old, new in zip(groups, first, second, strict=True) if not torch.equal(_raw(old), _raw(new))
    }
    if kept:
        shown = sorted(kept)[:_SHOWN]
        raise ModelMismatch(
            f"{type(model).__name__} does not compute {', '.join(map(repr, shown))}"
            + (f" and {len(kept) - len(shown)} more" if len(kept) > len(shown) else "")
            + ", which the checkpoint does not hold, in its _init_weights, or draws it at random there (what its "
            "constructor computes is lost, as the model has no memory yet then): compute it in _init_weights, as "
            "Transformers 5 wants, or store it in the checkpoint"
        )


def _fill(model: Any, groups: Sequence[Sequence[str]], device: torch.device, byte: int) -> list[torch.Tensor]:
    """The tensors of these groups after the class has initialised them, from memory that is all this byte."""
    tensors = []
    for names in groups:
        tensor = model.get_parameter_or_buffer(names[0])
        memory = torch.full((tensor.numel() * tensor.element_size(),), byte, dtype=torch.uint8, device=device)
        new = memory.view(tensor.dtype).view(tensor.shape)
        if isinstance(tensor, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=False)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, new)
        tensors.append(new)
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    model.initialize_weights()
    return [model.get_parameter_or_buffer(names[0]) for names in groups]


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: NaN equals itself, and any dtype can be compared."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
