"""An engine that is started by itself, in its own environment: how long until it has generated, and what that takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.contender import ROOT, TIMEOUT, ContenderFailed, die_with_parent
from tests.bench.measure import Sample


def python(engine: str) -> Path | None:
    """The interpreter of an engine's environment, or None where there is none: ``make .venv/vllm.stamp``."""
    folder = Path(sys.executable).parents[1]
    return folder / engine / "bin" / "python" if (folder / f"{engine}.stamp").exists() else None


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


def run(engine: str, script: str, settings: Mapping[str, Any], home: Path, environment: Mapping[str, str]) -> Sample:
    """One of this folder's scripts, in an engine's environment: its ``SAMPLE``, and the ``seconds`` until it was said.

    Raises ContenderFailed.
    """
    home.mkdir()
    found = python(engine)
    assert found is not None
    own = {
        "PATH": f"{found.parent}:{os.environ['PATH']}", "HOME": str(home), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else it imports everything once more while it is made
        **environment,
    }  # fmt: skip
    command = [str(found), str(ROOT / "tests" / "bench" / script), json.dumps(settings)]
    with (home / "log").open("wb") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env=own, cwd=home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("SAMPLE "):
                    seconds = time.perf_counter() - began
                    process.communicate(timeout=TIMEOUT)
                    return {**json.loads(line.removeprefix("SAMPLE ")), "seconds": seconds}
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    tail = (home / "log").read_text(errors="replace")[-3000:]
    raise ContenderFailed(f"{engine} ended with {process.returncode}:\n{tail}")
