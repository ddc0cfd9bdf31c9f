"""The SGLang shim: ``--load-format private``, and object URIs without it where a daemon is there.

Everything that SGLang decides stays its own: it builds the model, its loader says what goes where, it post-processes.
What is not taken, or goes wrong in any process of the engine, is loaded in all of them by the loader that SGLang would
have used.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import sglang
import torch
import transformers
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader import loader as loaders
from sglang.srt.model_loader.utils import get_model_architecture, set_default_torch_dtype
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_exec, get_model, get_parallel

from weightd.ipc.client import Client
from weightd.ipc.cuda import gpu_by_name
from weightd.ipc.engines import checkpoint
from weightd.ipc.engines.attributes import Attributes
from weightd.ipc.engines.binding import Binding, Load, NoRoom, Options, Untraceable, fall, report, weights_of
from weightd.ipc.errors import ModelMismatch, WeightdError
from weightd.ipc.lease import socket_path
from weightd.ipc.recipe import Key
from weightd.ipc.trace import meta_parameters

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_PRIVATE = "sglang.private.private_model_loader"
"""Module that ``--load-format private`` imports; SGLang comes without it."""
_UPDATES = ("update_weights_from_disk", "update_weights_from_tensor", "update_weights_from_ipc",
            "load_weights_from_distributed")  # fmt: skip
_KINDS = (Untraceable, NoRoom)
"""Errors that all processes of an engine make the same of."""
_UNTOUCHED = frozenset({"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"})
"""Quantisation methods whose post-processing on a GPU leaves parameters alone (SGLang 0.5.23)."""
_SIZES = ("tp_size", "pp_size", "moe_ep_size", "moe_tp_size", "moe_dp_size", "moe_dense_tp_size", "attn_tp_size",
          "attn_dp_size", "attn_cp_size", "dcp_size", "dwdp_size", "shared_experts_tp_size", "enable_dp_lm_head",
          "enable_dense_mlp_attn_tp", "enable_shared_experts_attn_tp", "enable_attn_tp_input_scattered",
          "dcp_replicate_q_proj")  # fmt: skip
_RANKS = ("tp_rank", "pp_rank", "moe_ep_rank", "moe_tp_rank", "moe_dp_rank", "attn_tp_rank", "attn_dp_rank",
          "attn_cp_rank", "dcp_rank")  # fmt: skip


# ---------------------------------------------------------------------- what SGLang is told at its start


def register() -> None:
    """Add the load format; where ``WEIGHTD_RUNTIME_DIR`` is set, object URIs are asked of the daemon first."""
    if importlib.util.find_spec("sglang.private") is None and _PRIVATE not in sys.modules:
        package = types.ModuleType("sglang.private")
        package.__path__ = []
        module = types.ModuleType(_PRIVATE)
        module.PrivateModelLoader = WeightdLoader  # type: ignore[attr-defined]
        sys.modules |= {"sglang.private": package, _PRIVATE: module}
    hook = HookRegistry.register
    hook("sglang.srt.distributed.bootstrap.measure_pre_model_load_memory", _measure, HookType.AROUND)
    for name in _UPDATES:
        where = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
        hook(f"{where}.{name}", _update, HookType.AROUND)
    if os.environ.get("WEIGHTD_RUNTIME_DIR"):
        hook("sglang.srt.model_loader.loader.get_model_loader", _choose, HookType.AROUND)
        hook("sglang.srt.utils.runai_utils.ObjectStorageModel.download_and_get_path", _configure, HookType.AROUND)


def _choose(choose: Callable[..., Any], load_config: LoadConfig, model_config: ModelConfig | None = None) -> Any:
    """The loader that SGLang chooses, behind this one where that one reads object URIs.

    SGLang gives those ``runai_streamer``, whatever load format was asked for.
    """
    given: Mapping[str, Any] = load_config.model_loader_extra_config or {}
    if load_config.load_format != LoadFormat.RUNAI_STREAMER:
        return choose(load_config, model_config)
    ours = {field.name for field in fields(Options)}
    theirs = replace(
        load_config, model_loader_extra_config={name: value for name, value in given.items() if name not in ours}
    )
    chosen = choose(theirs, model_config)
    if type(chosen) is not loaders.RunaiModelStreamerLoader or model_config is None:
        return chosen
    options = {name: value for name, value in given.items() if name in ours}
    return WeightdLoader(replace(load_config, model_loader_extra_config=options), chosen)


def _configure(download: Callable[..., str], cls: Any, model_path: str) -> str:
    """Configuration and tokenizer as the daemon has them."""
    try:
        folder: str = cls.get_path(model_path)
        checkpoint.configure(model_path, folder)
        return folder
    except (WeightdError, OSError) as error:
        log.warning("weightd: SGLang downloads the configuration of %s itself: %s", model_path, error)
        return download(cls, model_path)


_resident: set[str] | None = None
"""Stages that took memory before SGLang first looked how much there is."""


def _measure(measure: Callable[..., float], *args: Any, **kwargs: Any) -> float:
    global _resident
    if _resident is None:
        _resident = set()
        try:
            options = _options(get_model().model_loader_extra_config)
            with Client(runtime_directory=socket_path(options.socket).parent) as client:
                taken = ("loading", "verifying", "ready")
                _resident |= {stage["id"] for stage in client.stages() if stage["state"] in taken}
        except (WeightdError, ValueError) as error:
            log.debug("weightd: it is not known what is resident: %s", error)
    return measure(*args, **kwargs)


def _options(given: Any) -> Options:
    ours = {field.name for field in fields(Options)}
    found = LoadConfig(model_loader_extra_config=given or {}).model_loader_extra_config or {}
    assert isinstance(found, dict)
    return Options.read({name: value for name, value in found.items() if name in ours})


def _update(update: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """Weights that are lent are changed by nobody: in host memory a write makes a private copy of its page, on a GPU it
    would end the process."""
    weights = weights_of(updater.get_model())
    if weights is None or weights.device == "cpu" or weights.report is None or not weights.report.lent_nbytes:
        return update(updater, *args, **kwargs)
    return False, (
        f"the weights of {weights.manifest.model} are lent by weightd, and nobody may write to them: start the engine "
        'with --model-loader-extra-config \'{"mode": "clone"}\' to update its weights'
    )


# ---------------------------------------------------------------------- the loader


class WeightdLoader(loaders.BaseModelLoader):
    """Parameters that are the daemon's memory; ``before`` loads what this one does not."""

    def __init__(self, load_config: LoadConfig, before: loaders.BaseModelLoader | None = None) -> None:
        """Raises ValueError for options that are not known."""
        super().__init__(load_config)
        given = load_config.model_loader_extra_config or {}
        assert isinstance(given, dict)
        self.options = Options.read(given)
        self.before = before or loaders.DefaultModelLoader(
            replace(load_config, load_format=LoadFormat.AUTO, model_loader_extra_config={})
        )
        self.preloaded_weights_bytes = 0

    def download_model(self, model_config: ModelConfig) -> None:
        """Of what the daemon serves, nothing is downloaded here; of the rest, what its loader does."""
        self.before.download_model(model_config)

    def load_model(self, *, model_config: ModelConfig, device_config: DeviceConfig) -> torch.nn.Module:
        """A model in eval mode, post-processed. Raises what went wrong where ``fallback`` is false."""
        self.preloaded_weights_bytes = 0
        try:
            return self._served(model_config, device_config)
        except Exception as error:  # whatever it is, SGLang's own way is still open
            fall(error, self.options, log, uri_of(model_config))
        gc.collect()  # of what was built
        return self.before.load_model(model_config=model_config, device_config=device_config)

    def _served(self, model_config: ModelConfig, device_config: DeviceConfig) -> torch.nn.Module:
        device = torch.device(device_config.device)
        # Processes on other nodes have a daemon of their own.
        name = gpu_by_name(f"cuda:{device_config.gpu_id}").uuid if device.type == "cuda" else device.type
        _, told = _together(_node, lambda node: (node, name))
        here = [rank for rank, (node, _) in enumerate(told) if node == _node()]
        devices = [told[rank][1] for rank in here]

        def begin() -> tuple[Binding, Key]:
            if why := _not_taken(model_config, device):
                raise ModelMismatch(f"weightd does not take {uri_of(model_config)}: {why}")
            binding = Binding(
                uri_of(model_config), self.options, device=devices if device.type == "cuda" else name, log=log
            )
            return binding, key_of(binding.headers, model_config, self.load_config, processor_of(device))

        (binding, _), told = _together(begin, lambda begun: begun[1])
        keys, place = [told[rank] for rank in here], here.index(_group().rank_in_group)
        with binding, set_default_torch_dtype(model_config.dtype):
            if self.options.mode != "stream":
                try:
                    return self._bound(binding, model_config, device, keys, place)
                except Exception as error:
                    for each in (error, error.__cause__):
                        if each is not None:  # what was built is in its frames
                            traceback.clear_frames(each.__traceback__)
                    if not isinstance(error, Untraceable) or self.options.mode != "auto":
                        _make_room(binding, last=place == len(keys) - 1)
                        raise
                    log.info("weightd: %s is streamed: %s", binding.model, error)
                gc.collect()
            return self._streamed(binding, model_config, device)

    def _bound(
        self, binding: Binding, model_config: ModelConfig, device: torch.device, keys: Sequence[Key], place: int
    ) -> torch.nn.Module:
        times = [time.perf_counter()]
        bound: list[torch.nn.Module] = []

        def bind() -> torch.nn.Module:
            binding.begin(keys, place)
            model = build(model_config, self.load_config, device)
            times.append(time.perf_counter())
            attributes = Attributes(model)
            everything = bool(_writes_later())
            binding.bind(
                model, load_with(model, self.load_config, device), keys, place,
                writes=lambda module: everything or _writes(module),
            )  # fmt: skip
            bound.append(model)
            attributes.restore(model, getattr(model, "post_load_weights", None))
            times.append(time.perf_counter())
            return model

        try:
            model, _ = _together(bind)
        except Exception:
            if bound:
                binding.take_back(bound.pop())
            raise
        loaders.DefaultModelLoader.postprocess_weights(model, device)
        weights = weights_of(model)
        assert weights is not None
        if _resident is not None and weights.manifest.stage in _resident:
            self.preloaded_weights_bytes = weights.footprint
        log.info(
            "weightd: %s: %s; built in %.2f s, bound in %.2f s to stage %s by lease %s",
            binding.model, report(model), times[1] - times[0], times[2] - times[1], weights.manifest.stage,
            weights.lease,
        )  # fmt: skip
        return model.eval()

    def _streamed(self, binding: Binding, model_config: ModelConfig, device: torch.device) -> torch.nn.Module:
        started = time.perf_counter()

        def stream() -> torch.nn.Module:
            quantization = loaders._get_quantization_config(model_config, self.load_config)
            with device:
                model: torch.nn.Module = loaders._initialize_model(model_config, self.load_config, quantization)
            _sole(model)
            load_with(model, self.load_config, device)(binding.stream())
            return model

        model, _ = _together(stream)
        loaders.DefaultModelLoader.postprocess_weights(model, device)
        log.info(
            "weightd: %s: streamed through SGLang's own loader, all of it is this process's own; in %.2f s",
            binding.model, time.perf_counter() - started,
        )  # fmt: skip
        return model.eval()


# ---------------------------------------------------------------------- the engine's processes


def _group() -> Any:
    return get_parallel().tp_group


def _node() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _together(step: Callable[[], _T], tell: Callable[[_T], Any] = lambda given: None) -> tuple[_T, list[Any]]:
    """A step that all processes of a model's group take: what it gave here, and what each of them tells of it.

    What one of them raises, all raise, once all are there: none is left waiting in a collective call of a loader that
    the others do not use.
    """
    group = _group()
    given = failed = None
    try:
        given = step()
        told = tell(given)
    except Exception as error:
        failed, told = error, None
    if group.world_size == 1:
        if failed is not None:
            raise failed
        return given, [told]  # type: ignore[return-value]
    why = failed and f"{type(failed).__name__}: {failed}"
    answers = group.all_gather_object((told, why, next((kind for kind in _KINDS if isinstance(failed, kind)), None)))
    bad = [(rank, why, kind) for rank, (_, why, kind) in enumerate(answers) if why]
    if not bad:
        return given, [told for told, _, _ in answers]  # type: ignore[return-value]
    kinds = {kind for _, _, kind in bad}
    kind = NoRoom if NoRoom in kinds else Untraceable if kinds == {Untraceable} else ModelMismatch
    rank, why, _ = bad[0]
    if failed is None or (isinstance(failed, _KINDS) and not isinstance(failed, kind)) or kind is NoRoom:
        raise kind(f"process {rank} of {group.world_size}: {why}") from failed
    raise failed


def _make_room(binding: Binding, *, last: bool) -> None:
    """Before the engine loads by itself, all of its processes let go, and the ``last`` one on a node sees that the
    daemon does."""
    gc.collect()
    _together(lambda: None if last else binding.close())
    _together(lambda: binding.make_room() if last else None)


# ---------------------------------------------------------------------- what SGLang's configuration says


def uri_of(model_config: ModelConfig) -> str:
    """As the daemon names it: ``model_weights`` is what an object URI becomes, ``model_path`` is a folder then."""
    name = getattr(model_config, "model_weights", None) or model_config.model_path
    return checkpoint.uri(str(name), model_config.revision)


def _not_taken(model_config: ModelConfig, device: torch.device) -> str:
    """Why this is not for the daemon; empty where it is."""
    offload = get_exec().offload
    if device.type not in ("cpu", "cuda"):
        return f"it knows no device {device}"
    if get_model().weight_cache_mode != "off":
        return "SGLang's own weight cache is to hold it (--weight-cache-mode)"
    if getattr(model_config, "modelopt_quant", None):
        return "ModelOpt loads in its own way"
    if offload.cpu_offload_gb > 0 or offload.offload_group_size > 0 or offload.ple_offload_embedding:
        return "weights are to be moved to host memory (--cpu-offload-gb and its like)"
    return ""


def _writes_later() -> str:
    """What of this engine writes to weights after they are loaded, or takes them away; empty where nothing does."""
    if get_exec().features.enable_memory_saver:
        return "the memory saver"
    if get_exec().moe.enable_eplb or get_exec().moe.elastic_ep_backend is not None:
        return "balancing of experts"
    return ""


def _writes(module: torch.nn.Module) -> bool:
    """Whether post-processing on a GPU may write to a module's own parameters: yes, where it is not known."""
    method = getattr(module, "quant_method", None)
    return method is not None and type(method).__name__ not in _UNTOUCHED


def key_of(headers: str, model_config: ModelConfig, load_config: LoadConfig, processor: str) -> Key:
    """The key of this process's layout; ``processor`` is what it will run on, as ``processor_of`` names it."""
    parallel, experts = get_parallel(), get_exec().moe
    sizes = {name: _number(parallel, name) for name in (*_SIZES, *_RANKS)}
    config = {
        "model": model_config.hf_config.to_dict(),
        "architecture": get_model_architecture(model_config)[0].__name__,
        "quantization": model_config.quantization,
        "draft": [bool(model_config.is_draft_model), load_config.draft_model_idx],
        "experts": [experts.ep_num_redundant_experts, experts.init_expert_location,
                    experts.disable_shared_experts_fusion],
    }  # fmt: skip
    return Key(
        headers=headers,
        engine="sglang",
        version=f"{sglang.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        dtype=str(model_config.dtype),
        config=checkpoint.configuration_digest(config),
        rank=sizes["pp_rank"] * sizes["tp_size"] + sizes["tp_rank"],
        parallel=sizes,
        backends=[processor, f"experts {experts.moe_runner_backend}", f"exchange {experts.moe_a2a_backend}"],
    )


def _number(parallel: Any, name: str) -> int:
    try:
        return int(getattr(parallel, name) or 0)
    except RuntimeError:  # this engine has no such groups
        return 0


def processor_of(device: torch.device) -> str:
    """What a layout may hang on of a device."""
    return "cuda " + ".".join(map(str, torch.cuda.get_device_capability())) if device.type == "cuda" else device.type


# ---------------------------------------------------------------------- building and loading as SGLang does


def build(model_config: ModelConfig, load_config: LoadConfig, device: torch.device) -> torch.nn.Module:
    """The model, its parameters without memory. Raises ModelMismatch, Untraceable where it does not load by itself."""
    quantization = loaders._get_quantization_config(model_config, load_config)
    with device, meta_parameters():
        model: torch.nn.Module = loaders._initialize_model(model_config, load_config, quantization)
    _sole(model)
    return model


def _sole(model: torch.nn.Module) -> None:
    if getattr(model, "secondary_weights", ()) or getattr(model, "allow_patterns_overrides", None):
        raise ModelMismatch(f"{type(model).__name__} takes weights of other checkpoints or files as well")


def load_with(model: torch.nn.Module, load_config: LoadConfig, device: torch.device) -> Load:
    """SGLang's own loader of a model, without its post-processing."""

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        if load_config.draft_model_idx is not None:
            weights = loaders.DefaultModelLoader._filter_mtp_weights(weights, "", load_config.draft_model_idx)
        loaders.DefaultModelLoader.load_weights_only(model, weights, device)

    return load
