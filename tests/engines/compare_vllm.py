"""In vLLM's environment, with no engine: load models as weightd does and as vLLM does, and compare them whole.

Its argument is a JSON list of cases: settings of both, and what weightd's has besides. Prints a line of JSON for each:
which tensors differ, and what weightd reports, or what was raised.
"""

import json
import os
import sys
from typing import Any

import torch
import vllm

if "cpu" not in vllm.__version__:  # a wheel for GPUs, which does all but compute: before anybody asks where it is
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
from probe_vllm import digests, reported

torch.accelerator.empty_cache = lambda: None  # as vLLM's own worker for CPUs has it


def loaded(config: Any) -> torch.nn.Module:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import destroy_model_parallel, ensure_model_parallel_initialized
    from vllm.model_executor.model_loader import get_model

    destroy_model_parallel()  # which groups there are depends on the model
    with set_current_vllm_config(config):
        ensure_model_parallel_initialized(1, 1)
        return get_model(vllm_config=config)


if __name__ == "__main__":
    from vllm.distributed import init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs

    init_distributed_environment(1, 0, f"file://{os.getcwd()}/rendezvous", 0, "gloo")
    fixed = {"dtype": "bfloat16", "max_model_len": 128, "skip_tokenizer_init": True, "enforce_eager": True}
    wanted: dict[str, dict[str, str]] = {}
    for both, ours in json.loads(sys.argv[1]):
        settings, own = {**fixed, **both}, json.dumps(both)
        if own not in wanted:
            wanted[own] = digests(loaded(EngineArgs(**settings).create_engine_config()))
        try:
            bound = loaded(EngineArgs(**settings, **{"load_format": "weightd", **ours}).create_engine_config())
        except Exception as error:
            answer: dict[str, Any] = {"raised": f"{type(error).__name__}: {error}"}
        else:
            found = digests(bound)
            differ = [name for name in wanted[own].keys() | found.keys() if wanted[own].get(name) != found.get(name)]
            answer = {"differ": differ, "report": reported(bound)}
            del bound
        print("ANSWER", json.dumps(answer), flush=True)
