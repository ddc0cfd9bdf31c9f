"""In vLLM's environment: start an engine and have it generate one token.

Its argument is JSON: the engine's settings, and ``pack``: whether layers may be packed into the form that kernels for
CPUs compute with, which takes a copy of the weights, whoever loaded them. Prints ``SAMPLE`` and JSON: seconds of the
weight phase (a model is built, loaded and post-processed), bytes of the process's own memory that it took, seconds from
the end of imports to the engine and to its first token.
"""

import json
import sys
import time
from typing import Any

from own_memory import anonymous
from vllm import LLM, SamplingParams, _custom_ops
from vllm.inputs import TokensPrompt
from vllm.model_executor.layers import utils
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    if not settings.pop("pack"):
        _custom_ops._supports_onednn = False
        utils.check_cpu_sgl_kernel = lambda *sizes: False
    sample: dict[str, Any] = {}
    load = CPUModelRunner.load_model

    def timed(*arguments: Any, **named: Any) -> None:
        before, began = anonymous(), time.perf_counter()
        load(*arguments, **named)
        sample.update(weights=time.perf_counter() - began, own=anonymous() - before)

    CPUModelRunner.load_model = timed
    began = time.perf_counter()
    llm = LLM(
        dtype="bfloat16", max_model_len=128, skip_tokenizer_init=True, enforce_eager=True, disable_log_stats=True,
        **settings,
    )  # fmt: skip
    sample["made"] = time.perf_counter() - began
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    (answer,) = llm.generate([TokensPrompt(prompt_token_ids=[1, 5, 9])], sampling, use_tqdm=False)
    sample |= {"first": time.perf_counter() - began, "token": answer.outputs[0].token_ids[0]}
    print("SAMPLE", json.dumps(sample), flush=True)
