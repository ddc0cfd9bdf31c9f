"""In vLLM's environment, with ModelExpress' client beside it: start an engine whose weights that client brings from
MX_MODEL_URI, and print the tokens that it generates.

ModelExpress knows CUDA and XPU only, and asks vLLM's platform for a device's number: a backend for the torch device
"cpu", and that number, are stood in here. All else is its own.
"""

import json
import logging
import sys

import torch
from modelexpress import accelerators
from modelexpress.accelerators.base import AcceleratorBackend
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform


class Cpu(AcceleratorBackend):
    """What has no peers and nothing to wait for."""

    name = "cuda"
    torch_device_type = "cpu"
    nixl_mem_type = "DRAM"

    def set_device(self, device_id: int) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def synchronize(self, device_id: int | None = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def torch_device(self, device_id: int) -> torch.device:
        return torch.device("cpu")

    def is_accel_tensor(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    def supports_rdma_p2p(self) -> bool:
        return False

    def supports_pool_reg(self) -> bool:
        return False

    def supports_vmm(self) -> bool:
        return False

    def supports_gds(self) -> bool:
        return False


if __name__ == "__main__":
    for module in [accelerators, *(found for name, found in sys.modules.items() if name.startswith("modelexpress."))]:
        if hasattr(module, "accelerator_backend_for"):
            module.accelerator_backend_for = lambda device: Cpu()
    type(current_platform).current_device = classmethod(lambda platform: 0)
    logging.basicConfig(level=logging.INFO)
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in json.loads(sys.argv[2])]
    llm = LLM(
        model=sys.argv[1],
        load_format="modelexpress",
        dtype="bfloat16",
        max_model_len=128,
        skip_tokenizer_init=True,
        enforce_eager=True,
    )
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    answers = llm.generate(prompts, sampling)
    print("TOKENS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
