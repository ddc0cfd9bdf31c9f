"""SGLang's layouts ahead of time: its model is built, and traced, in a group of processes that are not there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
from sglang.srt.distributed import bootstrap, parallel_state
from sglang.srt.eplb.expert_location import (
    compute_initial_expert_location_metadata,
    set_global_expert_location_metadata,
)
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish, spawn_world_rank
from sglang.srt.server_args import ServerArgs, prepare_server_args
from torch.testing._internal.distributed.fake_pg import FakeStore

from weightd.ipc.engines.ahead import Asked
from weightd.ipc.engines.binding import Binding, Options
from weightd.ipc.engines.sglang import build, key_of, load_with, uri_of
from weightd.ipc.errors import ModelMismatch

# What runs on a CPU, and has no say in how a model is laid out.
_ON_CPU = (
    "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend",
    "none", "--skip-tokenizer-init", "--disable-cuda-graph", "--disable-custom-all-reduce", "--log-level", "warning",
)  # fmt: skip


def processes(asked: Asked) -> Iterator[Callable[[], dict[str, Any]]]:
    """As ``ahead.Processes``."""
    os.environ["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "0"  # it waits for the others
    HookRegistry.register("sglang.srt.utils.common.get_device", lambda *_: "cpu", HookType.REPLACE)
    load_plugins()
    sizes = ["--tp-size", str(asked.tp_size), "--pp-size", str(asked.pp_size)]
    arguments = prepare_server_args(["--model-path", asked.model, *sizes, *asked.options, *_ON_CPU])
    arguments.resolve_once()
    for pp_rank in range(asked.pp_size):
        for tp_rank in range(asked.tp_size):
            yield functools.partial(_trace, asked, arguments, tp_rank, pp_rank)


def _trace(asked: Asked, arguments: ServerArgs, tp_rank: int, pp_rank: int) -> dict[str, Any]:
    rank = spawn_world_rank(arguments, tp_rank=tp_rank, pp_rank=pp_rank)
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0))
    _pretend(rank, asked.tp_size * asked.pp_size)
    initialize_dp_attention(server_args=arguments)
    model_config, load_config = ModelConfig.from_server_args(arguments), LoadConfig()
    if asked.processor != "cpu" and model_config.quantization is not None:
        raise ModelMismatch(
            f"{asked.model} is quantised ({model_config.quantization}), whose layout hangs on the GPU's kernels: the "
            "engine's first start on one traces it"
        )
    if asked.processor == "cpu":
        model_config = adjust_config_with_unaligned_cpu_tp(model_config, load_config, get_parallel().tp_size)
    bootstrap.init_layer_runtime(model_config=model_config)
    initialize_moe_config()
    set_global_expert_location_metadata(
        compute_initial_expert_location_metadata(model_config=model_config, moe_ep_rank=get_parallel().moe_ep_rank)
    )
    device = torch.device("cpu")
    with (
        Binding(uri_of(model_config), Options(socket=asked.socket)) as binding,
        set_default_torch_dtype(model_config.dtype),
    ):
        key = key_of(binding.headers, model_config, load_config, asked.processor)
        model = build(model_config, load_config, device)
        return binding.teach(model, load_with(model, load_config, device), key)


def _pretend(rank: int, world_size: int) -> None:
    """SGLang's groups, in which nobody is but this process: what is sent goes nowhere."""
    dist.init_process_group(backend="fake", store=FakeStore(), rank=rank, world_size=world_size)
    new_group = dist.new_group

    def fake(ranks: Any = None, *_: Any, **options: Any) -> Any:
        return new_group(ranks, backend="fake")

    dist.new_group = fake
    parallel_state.init_distributed_environment(
        world_size=world_size, rank=rank, local_rank=0, backend="fake", distributed_init_method="none://"
    )
    parallel_state.initialize_model_parallel()
