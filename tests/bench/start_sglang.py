"""In SGLang's environment: start an engine and have it generate one token.

Its argument is JSON: the engine's settings. Prints ``SAMPLE`` and JSON, as start_vllm.py does. The engine loads in a
process of its own, which this module runs in as well, and tells by a file in the working folder.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from own_memory import anonymous

# torchvision's wheel is compiled for CUDA, and asks for operators of its own that no language model runs.
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import sglang  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: E402

TOLD = Path("weights.json")
SETTINGS = {
    "device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch", "grammar_backend": "none",
    "skip_tokenizer_init": True, "disable_cuda_graph": True, "disable_radix_cache": True,
    "disable_overlap_schedule": True, "mem_fraction_static": 0.3, "max_total_tokens": 2048, "dtype": "bfloat16",
}  # fmt: skip


def timed(load: Any, *arguments: Any, **named: Any) -> Any:
    before, began = anonymous(), time.perf_counter()
    loaded = load(*arguments, **named)
    TOLD.write_text(json.dumps({"weights": time.perf_counter() - began, "own": anonymous() - before}))
    return loaded


LOAD = "sglang.srt.model_executor.model_runner_components.load_model_utils.load_model_with_memory_saver"
HookRegistry.register(LOAD, timed, HookType.AROUND)

if __name__ == "__main__":
    began = time.perf_counter()
    engine = sglang.Engine(**SETTINGS | json.loads(sys.argv[1]))
    made = time.perf_counter() - began
    answer = engine.generate(input_ids=[1, 5, 9], sampling_params={"temperature": 0, "max_new_tokens": 1})
    first = time.perf_counter() - began
    token = answer["output_ids"][0]
    print("SAMPLE", json.dumps({**json.loads(TOLD.read_text()), "made": made, "first": first, "token": token}))
    engine.shutdown()
