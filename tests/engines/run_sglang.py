"""In SGLang's environment: start an engine, unmodified, and print the tokens that it generates."""

import json
import sys

import torch

# torchvision's wheel is compiled for CUDA, and asks for operators of its own that no language model runs.
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import sglang  # noqa: E402

if __name__ == "__main__":
    engine = sglang.Engine(
        model_path=sys.argv[1],
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        skip_tokenizer_init=True,
        disable_cuda_graph=True,
        disable_radix_cache=True,
        disable_overlap_schedule=True,
        mem_fraction_static=0.3,
        max_total_tokens=2048,
        dtype="bfloat16",
        log_level="warning",
    )
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    answers = [engine.generate(input_ids=tokens, sampling_params=sampling) for tokens in json.loads(sys.argv[2])]
    print("TOKENS", json.dumps([answer["output_ids"] for answer in answers]))
    engine.shutdown()
