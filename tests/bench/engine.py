"""An engine as it comes, started by itself: how long until it has generated, and how long of that it is being made."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.bench.contender import ROOT, ContenderFailed
from tests.bench.measure import Sample

PYTHON = Path(sys.executable).parents[1] / "vllm" / "bin" / "python"
"""In an environment of its own: ``make .venv/vllm.stamp``."""
_MADE = re.compile(r"^MADE ([\d.]+)$", re.MULTILINE)


def llama(folder: Path, size: int) -> None:
    """A Llama of about ``size`` bytes, in shards, that generates nothing sensible."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width, vocabulary = 2048, 8192
    a_layer = 2 * (2 * width * width + 2 * width * width // 4 + 3 * width * 2 * width)
    layers = max(1, (size - 4 * vocabulary * width) // a_layer)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(15)
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=max(size // 4, 1 << 20))
    finally:
        torch.set_default_dtype(torch.float32)


def start(home: Path, model: str, environment: Mapping[str, str]) -> Sample:
    """vLLM from nothing to its first tokens. Raises ContenderFailed."""
    home.mkdir()
    own = {
        "PATH": f"{PYTHON.parent}:{os.environ['PATH']}", "HOME": str(home), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else it imports everything once more while it is made
        **environment,
    }  # fmt: skip
    command = [str(PYTHON), str(ROOT / "tests/engines/run_vllm.py"), model, json.dumps([[1, 5, 9]])]
    began = time.perf_counter()
    done = subprocess.run(command, env=own, cwd=home, capture_output=True, text=True, check=False, timeout=900)
    seconds = time.perf_counter() - began
    made = _MADE.findall(done.stdout)
    if done.returncode or not made:
        raise ContenderFailed(f"vLLM ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return {"seconds": seconds, "made": float(made[0])}
