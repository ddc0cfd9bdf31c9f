"""In vLLM's environment, with no engine: load models as weightd does and as vLLM does, and compare them whole.

Each line of standard input is an object with what to ``do``:

- ``compare``: ``own`` are settings of an engine, ``ours`` what weightd's has besides. The answer is which tensors
  ``differ``, and what weightd ``report``s, or what was ``raised``. With ``gpu``, a list, lent memory is taken for a
  GPU's by those who decide what is copied, while those switches of the configuration are on that the list names; what
  loading ``again`` says is in the answer then.
- ``configure``: the configuration that an engine with these ``settings`` reads, and the files of its folder
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import vllm

if "cpu" not in vllm.__version__:  # a wheel for GPUs, which does all but compute: before anybody asks where it is
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
from probe_vllm import digests, reported
from vllm.config import set_current_vllm_config
from vllm.distributed import destroy_model_parallel, ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.model_loader import get_model, get_model_loader

torch.accelerator.empty_cache = lambda: None  # as vLLM's own worker for CPUs has it
cpu_moe.cpu_prepack_moe_weight = lambda weight, isa: weight
FIXED = {"dtype": "bfloat16", "max_model_len": 128, "skip_tokenizer_init": True, "enforce_eager": True}


def made(settings: dict[str, Any]) -> Any:
    return EngineArgs(**FIXED | settings).create_engine_config()


def loaded(config: Any) -> torch.nn.Module:
    destroy_model_parallel()  # which groups there are depends on the model
    with set_current_vllm_config(config):
        ensure_model_parallel_initialized(1, 1)
        return get_model(vllm_config=config)


@functools.cache
def wanted(own: str) -> dict[str, str]:
    return digests(loaded(made(json.loads(own))))


@contextlib.contextmanager
def as_on_a_gpu(config: Any, switches: Sequence[str]) -> Iterator[None]:
    from weightd.ipc.engines.binding import Binding
    from weightd.ipc.weights import Weights

    for switch in switches:
        where, _, name = switch.rpartition(".")
        setattr(getattr(config, where) if where else config, name, True)
    cloned = Binding._cloned

    def decided(*arguments: Any) -> Any:
        with mock.patch.object(Weights, "device", "cuda:0"):
            return cloned(*arguments)

    with mock.patch.object(Binding, "_cloned", decided):
        yield


def loaded_again(config: Any, model: torch.nn.Module) -> str | None:
    """What that raises where lent memory is a GPU's."""
    from weightd.ipc.weights import Weights

    with mock.patch.object(Weights, "device", "cuda:0"):
        try:
            next(iter(get_model_loader(config.load_config).get_all_weights(config.model_config, model)))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def compare(own: dict[str, Any], ours: dict[str, Any], gpu: Sequence[str] | None = None) -> dict[str, Any]:
    try:
        config = made(own | {"load_format": "weightd"} | ours)
        with contextlib.nullcontext() if gpu is None else as_on_a_gpu(config, gpu):
            bound = loaded(config)
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    want, found = wanted(json.dumps(own)), digests(bound)
    differ = [name for name in want.keys() | found.keys() if want.get(name) != found.get(name)]
    again = {} if gpu is None else {"again": loaded_again(config, bound)}
    return {"differ": differ, "report": reported(bound), **again}


def configure(settings: dict[str, Any]) -> dict[str, Any]:
    found = made(settings).model_config
    return {"config": found.hf_config.to_dict(), "files": sorted(os.listdir(found.model))}


if __name__ == "__main__":
    init_distributed_environment(1, 0, f"file://{os.getcwd()}/rendezvous", 0, "gloo")
    for line in sys.stdin:
        command = json.loads(line)
        answer = {"compare": compare, "configure": configure}[command.pop("do")](**command)
        print("ANSWER", json.dumps(answer, default=str), flush=True)
