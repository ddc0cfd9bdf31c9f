"""The vLLM shim: ``--load-format weightd``, and object URIs without it where a daemon is there.

Everything that vLLM decides stays its own: it builds the model, its loader says what goes where, it post-processes.
What is not taken, or goes wrong, is loaded by the loader that vLLM would have used, as a whole.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import socket as sockets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
import transformers
import vllm
from vllm.config import ModelConfig, VllmConfig, replace
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor import model_loader as loaders
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.transformers_utils.runai_utils import ObjectStorageModel
from vllm.utils.torch_utils import set_default_torch_dtype

from weightd.ipc import trust
from weightd.ipc.engines import checkpoint
from weightd.ipc.engines.binding import Binding, Options, Untraceable, fall, report, weights_of
from weightd.ipc.errors import ModelMismatch, WeightdError
from weightd.ipc.recipe import Key
from weightd.ipc.runtime_dir import API_SOCKET, runtime_dir
from weightd.ipc.trace import meta_parameters

log = init_logger("vllm.weightd")  # below vLLM's own: it is there that levels and handlers are set

LOAD_FORMAT = "weightd"
_OBJECTS = "runai_streamer"
"""The load format that vLLM takes object URIs by."""
_ANSWER_SECONDS = 2.0
_UNTOUCHED = frozenset({"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"})
"""Quantisation methods whose post-processing on a GPU leaves parameters alone (vLLM 0.32, 0.33)."""
_UNTOUCHED_EXPERTS = frozenset({"TRITON", "BATCHED_TRITON"})
"""Backends of unquantised experts that compute with the weights as they are loaded."""


def register() -> None:
    """Add the load format; where ``WEIGHTD_RUNTIME_DIR`` is set and a daemon listens, take object URIs as well."""
    known = loaders._LOAD_FORMAT_TO_MODEL_LOADER
    if LOAD_FORMAT not in known:
        loaders.register_model_loader(LOAD_FORMAT)(WeightdLoader)
    before = known.get(_OBJECTS)
    if before is None or issubclass(before, WeightdLoader) or not os.environ.get("WEIGHTD_RUNTIME_DIR"):
        return
    if _listens():
        # Not by register_model_loader, which warns of what is meant.
        known[_OBJECTS] = type("WeightdObjectLoader", (WeightdLoader,), {"before": before})
        ObjectStorageModel.pull_files = _configured(ObjectStorageModel.pull_files)
        log.info("weightd: object URIs are asked of the daemon in %s first", runtime_dir())


def _configured(pull: Callable[..., None]) -> Callable[..., None]:
    """Configuration and tokenizer as the daemon has them; of what it does not serve, as ``pull`` does."""

    @functools.wraps(pull)
    def pulled(self: ObjectStorageModel, model_path: str = "", *patterns: Any, **named: Any) -> None:
        try:
            checkpoint.configure(model_path, self.dir)
        except (WeightdError, OSError) as error:
            log.warning("weightd: vLLM downloads the configuration of %s itself: %s", model_path, error)
            pull(self, model_path, *patterns, **named)

    return pulled


def _listens() -> bool:
    path = runtime_dir() / API_SOCKET
    try:
        with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as connection:
            connection.settimeout(_ANSWER_SECONDS)
            connection.connect(str(path))
            trust.check(connection, path)
    except (OSError, WeightdError) as error:
        log.warning("weightd: no daemon at %s, vLLM loads by itself: %s", path, error)
        return False
    return True


class WeightdLoader(BaseModelLoader):
    """Parameters that are the daemon's memory; ``before`` loads what this one does not."""

    before: type[BaseModelLoader] | None = None

    def __init__(self, load_config: LoadConfig) -> None:
        """Raises ValueError for options that neither knows."""
        super().__init__(load_config)
        given: Mapping[str, Any] = load_config.model_loader_extra_config or {}
        ours = {field.name for field in fields(Options)} if self.before else set(given)
        self.options = Options.read({name: value for name, value in given.items() if name in ours})
        self._theirs = {name: value for name, value in given.items() if name not in ours}

    def _own(self, model_config: ModelConfig) -> BaseModelLoader:
        """The loader that vLLM would have used."""
        if self.before is not None:
            return self.before(replace(self.load_config, model_loader_extra_config=self._theirs))
        load_format = _OBJECTS if model_config.model_weights else "auto"
        found = loaders.get_model_loader(
            replace(self.load_config, load_format=load_format, model_loader_extra_config={})
        )
        return found._own(model_config) if isinstance(found, WeightdLoader) else found  # the daemon has been asked

    # ------------------------------------------------------------------ what vLLM calls

    def download_model(self, model_config: ModelConfig) -> None:
        """Of what the daemon serves, nothing is downloaded here; of the rest, what its loader does."""
        self._own(model_config).download_model(model_config)

    def get_external_weight_memory(self, vllm_config: VllmConfig) -> int:
        """Bytes of the GPU that the daemon holds for this process already, and will not need again.

        A lease is taken here, and used when the model is loaded: what is counted stays. What the daemon allocates only
        then, vLLM sees itself.
        """
        model_config, device = vllm_config.model_config, _device(vllm_config, self.load_config)
        if device.type != "cuda" or self.options.mode in ("clone", "stream") or _writes_later(vllm_config):
            return 0
        try:
            binding = self._binding(vllm_config, model_config)
        except Exception as error:  # it is said when the model is loaded
            log.debug("weightd: %s is not there yet: %s", _uri(model_config), error)
            return 0
        try:
            weights = binding.begin(*_keys(binding.headers, vllm_config, model_config, ""))
        except Exception as error:
            log.debug("weightd: %s is not there yet: %s", _uri(model_config), error)
            weights = None
        if weights is None:
            binding.close()
            return 0
        _begun[binding.model] = binding
        return weights.footprint

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        """A model in eval mode, post-processed. Raises what went wrong where ``fallback`` is false."""
        try:
            return self._served(vllm_config, model_config, prefix)
        except Exception as error:  # whatever it is, vLLM's own way is still open
            fall(error, self.options, log, _uri(model_config))
        gc.collect()  # of what was built
        return self._own(model_config).load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Into a model that has memory, through its own loader."""
        _Streamed(self.load_config, self.get_all_weights(model_config, model)).load_weights(model, model_config)

    def get_all_weights(self, model_config: ModelConfig, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors, to load again from. Raises ModelMismatch where that would write to lent memory."""
        weights = weights_of(model)
        if weights is not None and weights.device != "cpu" and weights.report and weights.report.lent_nbytes:
            raise ModelMismatch(
                f"the weights of {_uri(model_config)} are lent, and cannot be written to on a GPU: start the engine "
                "with mode 'clone' to load them again"
            )
        try:
            binding = Binding(_uri(model_config), self.options, log=log)
        except WeightdError as error:
            fall(error, self.options, log, _uri(model_config))
            yield from self._own(model_config).get_all_weights(model_config, model)
            return
        with binding:
            yield from binding.stream()

    # ------------------------------------------------------------------ binding

    def _binding(self, vllm_config: VllmConfig, model_config: ModelConfig) -> Binding:
        if why := _not_taken(vllm_config, model_config, self.load_config):
            raise ModelMismatch(f"weightd does not take {_uri(model_config)}: {why}")
        device = _device(vllm_config, self.load_config)
        return Binding(_uri(model_config), self.options, device=_names(vllm_config, device), log=log)

    def _served(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str) -> torch.nn.Module:
        binding = _begun.pop(_uri(model_config), None) or self._binding(vllm_config, model_config)
        with binding:
            try:
                if self.options.mode != "stream":
                    with _registrations(vllm_config):
                        return self._traced(binding, vllm_config, model_config, prefix)
            except Untraceable as error:
                if self.options.mode != "auto":
                    raise
                log.info("weightd: %s is streamed: %s", _uri(model_config), error)
            except Exception:
                binding.make_room()
                raise
            with _registrations(vllm_config):
                return _Streamed(self.load_config, binding.stream()).load_model(
                    vllm_config=vllm_config, model_config=model_config, prefix=prefix
                )

    def _traced(
        self, binding: Binding, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str
    ) -> torch.nn.Module:
        keys, place = _keys(binding.headers, vllm_config, model_config, prefix)
        binding.begin(keys, place)
        device = _device(vllm_config, self.load_config)
        started = time.perf_counter()
        with set_default_torch_dtype(model_config.dtype):
            with device, meta_parameters():
                model = self.create_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            if getattr(model, "secondary_weights", ()):
                raise ModelMismatch(f"{type(model).__name__} takes weights of other checkpoints as well")
            if any(_quantises_as_it_loads(module) for module in model.modules()):
                raise Untraceable(f"{type(model).__name__} quantises its weights as they are loaded")
            built = time.perf_counter()
            everything = bool(_writes_later(vllm_config)) or hasattr(model, "process_weights_after_loading")
            weights = binding.bind(
                model, model.load_weights, keys, place, writes=lambda module: everything or _writes(module)
            )
            bound = time.perf_counter()
            process_weights_after_loading(model, model_config, device)
        log.info(
            "weightd: %s: %s; built in %.2f s, bound in %.2f s to stage %s by lease %s",
            binding.model, report(model), built - started, bound - built, weights.manifest.stage, weights.lease,
        )  # fmt: skip
        return model.eval()


class _Streamed(DefaultModelLoader):
    """vLLM's own loader, with tensors that come from elsewhere."""

    def __init__(self, load_config: LoadConfig, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        super().__init__(replace(load_config, load_format="auto", model_loader_extra_config={}))
        self._tensors = tensors

    def get_all_weights(self, model_config: ModelConfig, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        self.counter_before_loading_weights = time.perf_counter()
        return self._tensors


_begun: dict[str, Binding] = {}
"""By model: leases that were taken before it is loaded."""


@contextlib.contextmanager
def _registrations(vllm_config: VllmConfig) -> Iterator[None]:
    """What layers register themselves in as they are built is as it was, where that goes wrong: it is built anew."""
    config = vllm_config.compilation_config
    layers, experts = dict(config.static_forward_context), list(config.static_all_moe_layers)
    try:
        yield
    except BaseException:
        config.static_forward_context.clear()
        config.static_forward_context.update(layers)
        config.static_all_moe_layers[:] = experts
        raise


# ---------------------------------------------------------------------- what vLLM's configuration says


def _uri(model_config: ModelConfig) -> str:
    """As the daemon names it: ``model_weights`` is what an object URI becomes, ``model`` is a folder then."""
    return checkpoint.uri(str(model_config.model_weights or model_config.model), model_config.revision)


def _device(vllm_config: VllmConfig, load_config: LoadConfig) -> torch.device:
    device = torch.device(load_config.device or vllm_config.device_config.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _not_taken(vllm_config: VllmConfig, model_config: ModelConfig, load_config: LoadConfig) -> str:
    """Why this is not for the daemon; empty where it is."""
    device, offload = _device(vllm_config, load_config), vllm_config.offload_config
    if device.type not in ("cpu", "cuda"):
        return f"it knows no device {device}"
    if model_config.quantization in ("torchao", "bitsandbytes", "gguf"):
        return f"{model_config.quantization} loads in its own way"
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        return "weights are to be moved to host memory (--cpu-offload-gb and its like)"
    return ""


def _ranks(vllm_config: VllmConfig) -> tuple[int, int]:
    """(how many processes of this engine are on this node, which of them this is)."""
    parallel = vllm_config.parallel_config
    if parallel.world_size == 1 or not torch.distributed.is_initialized():
        return 1, 0
    from vllm.distributed import get_world_group

    return parallel.world_size, get_world_group().rank_in_group % parallel.world_size


def _keys(headers: str, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str) -> tuple[list[Key], int]:
    """The keys of all processes of the engine that are on this node, and which is this one's."""
    count, rank = _ranks(vllm_config)
    keys = [_key(headers, vllm_config, model_config, prefix, number) for number in range(count)]
    if vllm_config.parallel_config.nnodes > 1 or vllm_config.parallel_config.distributed_executor_backend == "ray":
        return [keys[rank]], 0  # the others are elsewhere
    return keys, rank


def _key(headers: str, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str, rank: int) -> Key:
    parallel, kernels = vllm_config.parallel_config, vllm_config.kernel_config
    experts = parallel.enable_expert_parallel
    sizes = {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "context": parallel.prefill_context_parallel_size,
        "expert": int(experts),
        # Replicas of the model are laid out alike, unless experts are spread over them.
        "data": parallel.data_parallel_size if experts else 1,
        "data_rank": parallel.data_parallel_rank if experts else 0,
        "redundant_experts": parallel.eplb_config.num_redundant_experts if parallel.enable_eplb else 0,
    }
    seen = model_config.multimodal_config
    config = {
        "model": model_config.hf_config.to_dict(),
        "architecture": loaders.get_architecture_class_name(model_config),
        "implementation": str(model_config.model_impl),
        "as": [str(model_config.runner_type), str(model_config.convert_type)],
        "quantization": model_config.quantization,
        "prefix": prefix,
        "multimodal": seen and [seen.language_model_only, seen.mm_encoder_only, seen.mm_encoder_tp_mode,
                                {kind: seen.get_limit_per_prompt(kind) for kind in sorted(seen.limit_per_prompt)}],
        "placement": parallel.expert_placement_strategy if experts else "",
    }  # fmt: skip
    return Key(
        headers=headers,
        engine="vllm",
        version=f"{vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        dtype=str(model_config.dtype),
        config=checkpoint.configuration_digest(config),
        rank=rank,
        parallel=sizes,
        backends=[_processor(vllm_config), f"linear {kernels.linear_backend}", f"experts {kernels.moe_backend}"],
    )


def _processor(vllm_config: VllmConfig) -> str:
    if torch.device(vllm_config.device_config.device).type != "cuda":
        return str(vllm_config.device_config.device_type)
    return "cuda " + ".".join(map(str, torch.cuda.get_device_capability()))


def _names(vllm_config: VllmConfig, device: torch.device) -> str | list[str]:
    """The devices of the engine's processes on this node, in their order: neighbours' GPUs are beside one another."""
    count, rank = _ranks(vllm_config)
    if device.type != "cuda" or count == 1:
        return str(device)
    first = device.index - rank
    return [f"cuda:{first + number}" for number in range(count)]


def _writes_later(vllm_config: VllmConfig) -> str:
    """What of this engine writes to weights after they are loaded; empty where nothing does."""
    if vllm_config.model_config.enable_sleep_mode:
        return "sleep mode"
    if vllm_config.parallel_config.enable_eplb:
        return "balancing of experts"
    if vllm_config.weight_transfer_config is not None:
        return "transfer of weights"
    return ""


def _quantises_as_it_loads(module: torch.nn.Module) -> bool:
    return bool(getattr(getattr(module, "quant_method", None), "uses_meta_device", False))


def _writes(module: torch.nn.Module) -> bool:
    """Whether post-processing on a GPU may write to a module's own parameters: yes, where it is not known."""
    method = getattr(module, "quant_method", None)
    if method is None:
        return hasattr(module, "process_weights_after_loading")
    if type(method).__name__ == "UnquantizedFusedMoEMethod":
        return getattr(getattr(method, "unquantized_backend", None), "name", "") not in _UNTOUCHED_EXPERTS
    return type(method).__name__ not in _UNTOUCHED
