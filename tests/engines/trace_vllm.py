"""In vLLM's environment, with no engine: what vLLM's own loader makes of an architecture, and what becomes of the same
model by its trace, as the second of two tensor-parallel processes has it.

``trace_vllm.py listen SOCKET``, as ``forks`` has it: each fork's argument is an architecture.
"""

import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import transformers.modeling_utils
import transformers.models.llama.modeling_llama  # noqa: F401

from weightd.ipc.engines import vllm_ahead  # before anybody asks which platform it is

# isort: split
# Of a wheel that is compiled for CUDA: models import it, and no weight depends on it.
for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torchvision.transforms.v2"].functional = None

import vllm  # noqa: E402
from architectures import make  # noqa: E402
from forks import listen  # noqa: E402
from probe_vllm import digests  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.model_executor.models import qwen2_5_vl, qwen3_moe, registry  # noqa: E402, F401  # what many share
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402

from weightd.ipc.engines.binding import Binding, Options  # noqa: E402
from weightd.ipc.recipe import Key, digest_of  # noqa: E402
from weightd.ipc.trace import meta_parameters  # noqa: E402

RANK, RANKS = 1, 2

# To look at a class it starts a Python of its own, which takes seconds.
registry._run_in_subprocess = lambda look: look()


class _Kept(Binding):
    """A binding that keeps its trace."""

    def _traced(self, model: Any, load: Any) -> Any:
        self.trace = super()._traced(model, load)
        return self.trace


def compared(name: str, folder: Path) -> dict[str, Any]:
    """Which parameters and buffers differ, which are opaque, and which are memory of the engine's own."""
    make(name, folder)
    config = EngineArgs(
        model=str(folder), dtype="bfloat16", max_model_len=64, tensor_parallel_size=RANKS, enforce_eager=True,
        skip_tokenizer_init=True,
    ).create_engine_config()  # fmt: skip
    config.parallel_config.rank = RANK

    def build() -> torch.nn.Module:
        # Layers register themselves by name, and each of these may be there once.
        config.compilation_config.static_forward_context.clear()
        config.compilation_config.static_all_moe_layers.clear()
        return initialize_model(vllm_config=config, model_config=config.model_config)

    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        vllm_ahead._pretend(RANK, RANKS, 1)
        # What is never written to is no number here: it is none that a daemon lends.
        torch.use_deterministic_algorithms(True)
        with torch.device("cpu"):
            own = build()
        torch.use_deterministic_algorithms(False)
        own.load_weights(item for file in sorted(folder.glob("*.safetensors")) for item in load_file(file).items())
        with torch.device("cpu"), meta_parameters():
            model = build()
        with _Kept(folder, Options(), device="cpu") as binding:
            key = Key(binding.headers, "vllm", vllm.__version__, "bfloat16", digest_of(name), RANK, {"tensor": RANKS})
            weights = binding.bind(model, model.load_weights, [key])
    expected, found = digests(own), digests(model)
    return {
        "differ": sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name)),
        "opaque": {name: opaque.why for name, opaque in binding.trace.opaque.items()},
        "lost": [
            f"{type(module).__name__}.{name}" for module in model.modules() for name, value in vars(module).items()
            if isinstance(value, torch.Tensor) and value.is_meta
        ],
        "own": [
            name for name, parameter in model.named_parameters()
            if parameter.numel() and not weights.aliases(parameter)
        ],
    }  # fmt: skip


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    listen(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        print("ANSWER", json.dumps(compared(sys.argv[1], Path(folder))), flush=True)
    os._exit(0)  # to take down all that was imported takes longer
