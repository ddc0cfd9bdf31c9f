"""torch, CuPy and Transformers on what the daemon lends, and the digests' kernels: on a real GPU only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.machine import TORCH_DTYPES, Checkpoint, Machine
from tests.gpu.test_dying import kill_daemon
from tests.gpu.test_lending import staged

pytestmark = pytest.mark.gpu

Say = Callable[[str], None]

SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 1024, "max_position_embeddings": 128,
}  # fmt: skip


def test_torch_sees_every_dtype_bit_for_bit_before_and_after_a_restart(
    gpu: Machine, tmp_path: Path, model: Checkpoint
) -> None:
    daemon = gpu.daemon(tmp_path / "weightd")
    record = staged(daemon, model)
    before = gpu.engine()
    before.ask("attach", runtime_dir=str(daemon.runtime_dir), model=model.model, device="cuda:0")
    count = before.ask("torch_equal", files=model.typed)
    assert count > 4 * len(TORCH_DTYPES)
    kill_daemon(daemon)
    assert before.ask("torch_equal", files=model.typed) == count
    after = gpu.engine()
    after.ask("attach", runtime_dir=str(daemon.runtime_dir), stage=record["id"])
    assert after.ask("torch_equal", files=model.typed) == count


def test_cupy_sees_every_dtype_that_it_has_bit_for_bit(
    gpu: Machine, tmp_path: Path, model: Checkpoint, say: Say
) -> None:
    daemon = gpu.daemon(tmp_path / "weightd")
    staged(daemon, model)
    engine = gpu.engine()
    engine.ask("attach", runtime_dir=str(daemon.runtime_dir), model=model.model, device="cuda:0")
    found = engine.ask("cupy_equal", files=model.typed)
    say(f"compared {', '.join(found['compared'])}; CuPy has no {', '.join(found['refused'])}")
    numpys = {dtype for dtype in TORCH_DTYPES if not dtype.startswith(("F8", "BF16"))}
    assert numpys <= set(found["compared"])


def test_tensors_stream_in_while_later_ones_still_load(gpu: Machine, tmp_path: Path, model: Checkpoint) -> None:
    daemon = gpu.daemon(tmp_path / "weightd")
    engine = gpu.engine()
    request = {"exclude": ["*.packed"]}
    count = engine.ask(
        "torch_streams", runtime_dir=str(daemon.runtime_dir), files=model.typed, model=model.model, device="cuda:0",
        tensors=request,
    )  # fmt: skip
    assert count > 4 * len(TORCH_DTYPES)


def test_the_kernels_digest_what_the_host_digests_at_every_length(gpu: Machine) -> None:
    assert gpu.engine().ask("digests", count=500) > 2500


def test_the_daemon_computes_digests_on_the_gpu(gpu: Machine, tmp_path: Path, model: Checkpoint) -> None:
    daemon = gpu.daemon(tmp_path / "weightd")
    staged(daemon, model)
    device = next(one for one in daemon.client.node()["devices"] if one["name"] == "cuda:0")
    assert device["digest_path"] == "gpu", daemon.log.read_text()[-2000:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transformers_model_on_the_gpu_gives_the_logits_of_from_pretrained(
    gpu: Machine, tmp_path: Path, dtype: str, say: Say
) -> None:
    import torch
    import transformers

    folder = tmp_path / "llama"
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).to(getattr(torch, dtype))
    made.save_pretrained(folder)
    daemon = gpu.daemon(tmp_path / "weightd")
    found = gpu.engine().ask("logits", runtime_dir=str(daemon.runtime_dir), folder=str(folder))
    say(f"{found['parameters']} bytes of parameters, {found['allocated']} allocated by torch while loading")
    say(f"largest difference of logits from from_pretrained, {found['differences']}")
    assert min(found["differences"].values()) == 0.0
    assert max(found["differences"].values()) < (1e-4 if dtype == "float32" else 1e-1)
    assert found["dtype"] == f"torch.{dtype}"
    assert found["allocated"] < found["parameters"] / 10
