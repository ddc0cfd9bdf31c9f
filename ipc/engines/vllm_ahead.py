"""vLLM's layouts ahead of time: its model is built, and traced, in a group of processes that are not there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import vllm.platforms
from torch.testing._internal.distributed.fake_pg import FakeStore
from vllm.platforms.cpu import CpuPlatform

if not vllm.platforms.current_platform.is_cpu():
    vllm.platforms._current_platform = CpuPlatform()  # a wheel for GPUs, where there is none

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.torch_utils import set_default_torch_dtype

from weightd.ipc.engines.ahead import Asked
from weightd.ipc.engines.binding import Binding, Options
from weightd.ipc.engines.vllm import _key, _uri
from weightd.ipc.errors import ModelMismatch
from weightd.ipc.trace import meta_parameters


def processes(asked: Asked) -> Iterator[Callable[[], dict[str, Any]]]:
    """As ``ahead.Processes``."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # it wants a part of the machine's memory otherwise
    sizes = ["--tensor-parallel-size", str(asked.tp_size), "--pipeline-parallel-size", str(asked.pp_size)]
    parser = EngineArgs.add_cli_args(_EngineParser())
    arguments = EngineArgs.from_cli_args(
        parser.parse_args(["--model", asked.model, *sizes, "--skip-tokenizer-init", *asked.options])
    )
    config = arguments.create_engine_config()
    if asked.processor != "cpu" and config.model_config.quantization is not None:
        raise ModelMismatch(
            f"{asked.model} is quantised ({config.model_config.quantization}), whose layout hangs on the GPU's "
            "kernels: the engine's first start on one traces it"
        )
    for rank in range(asked.tp_size * asked.pp_size):
        yield functools.partial(_trace, asked, config, rank)


class _EngineParser(FlexibleArgumentParser):
    """What vLLM's server is started with may be said as it is: options that are none of the engine's are left out."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        known, _ = super().parse_known_args(*args, **kwargs)
        return known, []


def _trace(asked: Asked, config: VllmConfig, rank: int) -> dict[str, Any]:
    config.parallel_config.rank = rank
    model_config = config.model_config
    with set_current_vllm_config(config), set_default_torch_dtype(model_config.dtype):
        _pretend(rank, asked.tp_size, asked.pp_size)
        with Binding(_uri(model_config), Options(socket=asked.socket)) as binding:
            key = _key(binding.headers, config, model_config, "", rank)
            key = replace(key, backends=[asked.processor, *key.backends[1:]])
            with torch.device("cpu"), meta_parameters():
                model = initialize_model(vllm_config=config, model_config=model_config)
            return binding.teach(model, model.load_weights, key)


def _pretend(rank: int, tp_size: int, pp_size: int) -> None:
    """vLLM's groups, in which nobody is but this process: what is sent goes nowhere."""
    dist.init_process_group(backend="fake", store=FakeStore(), rank=rank, world_size=tp_size * pp_size)
    new_group, group = dist.new_group, parallel_state.GroupCoordinator.__init__

    def fake(ranks: Any = None, *_: Any, **options: Any) -> Any:
        return new_group(ranks, backend="fake")

    def alone(self: Any, *args: Any, **options: Any) -> None:
        # Both of these wait for the others.
        group(self, *args, **options | {"use_device_communicator": False, "use_message_queue_broadcaster": False})

    def same_node(*_: Any, **__: Any) -> list[bool]:
        return [True] * (tp_size * pp_size)  # else it reads what nobody has sent

    dist.new_group = fake
    parallel_state.GroupCoordinator.__init__ = alone
    parallel_state.in_the_same_node_as = same_node
    parallel_state.init_distributed_environment(tp_size * pp_size, rank, "none://", 0, "fake")
    parallel_state.ensure_model_parallel_initialized(tp_size, pp_size)
