"""In vLLM's environment: trace a large mixture of experts, of which there is no more than shapes.

Its argument is JSON: ``layers``, ``experts`` and ``repetitions``. Prints ``SAMPLE`` and JSON: how many ``tensors`` the
checkpoint would have, seconds that each trace has taken (``traced``), bytes of the request that brings it to the daemon
(``wire``).
"""

import json
import os
import sys
import time

import httpx
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from weightd.ipc.recipe import Key, encode
from weightd.ipc.trace import meta_parameters, trace

HIDDEN, EXPERT, HEADS, KV_HEADS, HEAD, VOCABULARY = 2048, 768, 32, 4, 128, 151936
"""As in Qwen3-30B-A3B, which has 48 layers of 128 experts."""


def shapes(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }  # fmt: skip
    for number in range(layers):
        layer = f"model.layers.{number}"
        attention = f"{layer}.self_attn"
        found |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,), f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"{attention}.q_proj.weight": (HEADS * HEAD, HIDDEN), f"{attention}.o_proj.weight": (HIDDEN, HEADS * HEAD),
            f"{attention}.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            f"{attention}.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            f"{attention}.q_norm.weight": (HEAD,), f"{attention}.k_norm.weight": (HEAD,),
            f"{layer}.mlp.gate.weight": (experts, HIDDEN),
        }  # fmt: skip
        for expert in range(experts):
            of = f"{layer}.mlp.experts.{expert}"
            found |= {
                f"{of}.gate_proj.weight": (EXPERT, HIDDEN), f"{of}.up_proj.weight": (EXPERT, HIDDEN),
                f"{of}.down_proj.weight": (HIDDEN, EXPERT),
            }  # fmt: skip
    return found


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": HIDDEN,
        "moe_intermediate_size": EXPERT, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": asked["layers"],
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "vocab_size": VOCABULARY,
        "num_experts": asked["experts"], "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "tie_word_embeddings": False, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
    }  # fmt: skip
    with open("config.json", "w") as file:
        json.dump(config, file)
    engine = EngineArgs(
        model=os.getcwd(), dtype="bfloat16", max_model_len=128, skip_tokenizer_init=True, enforce_eager=True
    ).create_engine_config()
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in shapes(asked["layers"], asked["experts"]).items()
    }
    key = Key("0" * 32, "vllm", "0", "bfloat16", "0" * 64, 0, {})
    seconds: list[float] = []
    with set_current_vllm_config(engine), set_default_torch_dtype(torch.bfloat16):
        init_distributed_environment(1, 0, f"file://{os.getcwd()}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        with torch.device("cpu"), meta_parameters():
            model = initialize_model(vllm_config=engine, model_config=engine.model_config)
        for _ in range(asked["repetitions"]):
            began = time.perf_counter()
            traced = trace(model, tensors, model.load_weights)
            recipe = encode(key, tensors, traced.entries, traced.moves, traced.constants)
            seconds.append(time.perf_counter() - began)
            assert not any((traced.opaque, traced.uncovered, traced.untouched))
    wire = len(httpx.Request("PUT", "http://daemon/", json=recipe).content)
    print("SAMPLE", json.dumps({"tensors": len(tensors), "traced": seconds, "wire": wire}), flush=True)
