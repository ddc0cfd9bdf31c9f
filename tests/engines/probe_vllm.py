"""In vLLM's workers: what became of the model's parameters.

On a CPU vLLM packs linear weights into a form of its own after loading, and throws away what it packed. As far as
packing can be done without, it is done without here, so that what is left is what was loaded.
"""

import hashlib
from typing import Any

import torch
from vllm import _custom_ops
from vllm.model_executor.layers import utils

_custom_ops._supports_onednn = False
utils.check_cpu_sgl_kernel = lambda *sizes: False


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Class, shape, strides and bytes of every parameter and buffer, by all the names that each has."""
    found = {}
    held = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in held:
        bytes_digest = hashlib.sha256(raw(tensor).numpy().tobytes()).hexdigest()[:16]
        found[name] = f"{type(tensor).__name__} {tensor.dtype} {list(tensor.shape)} {tensor.stride()} {bytes_digest}"
    return found


def reported(model: torch.nn.Module) -> dict[str, Any] | None:
    """What weightd says of the model, with the share that it counts."""
    from weightd.ipc.engines.binding import report, weights_of

    found, weights = report(model), weights_of(model)
    if found is None or weights is None:
        return None
    return {**vars(found), "share": found.share, "lease": weights.lease, "stage": weights.manifest.stage}


class Probe:
    """What ``collective_rpc`` can call, beside the worker's own methods."""

    def digests(self) -> dict[str, str]:
        return digests(self.get_model())

    def report(self) -> dict[str, Any] | None:
        return reported(self.get_model())

    def drafted(self) -> dict[str, Any] | None:
        """``report`` of the model that drafts."""
        return reported(self.model_runner.drafter.model)

    def reload(self) -> None:
        self.reload_weights()

    def scribble(self) -> None:
        """Write to every parameter, as what balances experts or merges adapters does."""
        with torch.no_grad():
            for parameter in self.get_model().parameters():
                parameter.zero_()
