"""The Transformers shim: a model whose parameters are the daemon's memory. Needs Transformers 5.

``load`` gives what ``from_pretrained`` of the same class gives, with parameters in the checkpoint's own dtype, or it
raises ModelMismatch: nothing is cast unasked, nothing is initialised at random, nothing is left out unsaid. The model
is built on torch's meta device, which allocates nothing, and each of its parameters is then replaced by the attached
tensor.

``from_pretrained(state_dict=...)`` is not used: it initialises at random what is missing, copies all of a tensor whose
dtype differs before anybody can object, and on a GPU first allocates as much memory again.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import time
import weakref
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter
except ImportError:
    raise ImportError(f"weightd needs Transformers 5, this is {transformers.__version__}") from None

from weightd.ipc.dtypes import DTYPES
from weightd.ipc.engines.computed import compute
from weightd.ipc.errors import ModelMismatch
from weightd.ipc.weights import Weights, attach

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

_SHOWN = 5
"""Tensors of each kind that a message names; all of them are in ``ModelMismatch.details``."""
_FLOATS = ("F16", "BF16", "F32", "F64")
"""Dtypes that a model can be built in, and cast between: of what has fewer bits the scale is stored elsewhere."""
_MOVED = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
"""Buffers that old checkpoints hold where models compute them now, elsewhere perhaps: end of such a buffer's name in
the model → pattern of names in the checkpoint, as in from_pretrained."""


def load(
    model: str | os.PathLike[str] | Weights | None = None,
    *,
    model_class: Any = None,
    config: PreTrainedConfig | None = None,
    dtype: torch.dtype | str | None = None,
    cast: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A Transformers model in eval mode, whose parameters and persistent buffers are attached, not copied.

    ``model`` is a URI or a path, which is attached with ``options`` (``attach``'s: ``stage``, ``device``, ``timeout``,
    ``socket``, ``tensors``, ``expect_digest``, ``strict``, ``private``) and leased until the model is garbage; or
    Weights that are attached already, whose lease stays the caller's to end, and which the model keeps from being
    garbage.

    ``model_class`` is a model class or an auto class; default: the class that the configuration's ``architectures``
    name, else AutoModel. A base model may be loaded from a checkpoint with a head and does without it.
    ``config`` replaces the checkpoint's config.json, to choose an attention implementation, say; it is not changed.
    Parameters have the dtype that most of the checkpoint has, whatever config.json says; ``dtype`` demands one. Tensors
    that are stored in another (float32 norms in a bfloat16 checkpoint) are refused, or with ``cast`` become this
    process's own copies in the model's dtype, as from_pretrained makes of all of them; the others stay lent.

    Raises ModelMismatch where a tensor is missing, left over, or of another dtype or shape, where Transformers would
    convert tensors rather than rename them (experts that it stacks, quantised weights), where a configuration file
    cannot be read; and what ``attach`` raises.

    >>> model = load("s3://models/llama-3-8b", model_class=transformers.AutoModelForCausalLM)
    >>> tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    """
    timeout = options.get("timeout")
    deadline = None if timeout is None else time.monotonic() + timeout
    if isinstance(model, Weights):
        if options:
            raise TypeError(f"the weights are attached already: {', '.join(options)} cannot be said any more")
        weights = model
    else:
        weights = attach(model, wait=bool(options.get("private")), **options)
    try:
        # The model is built, and refused, while the daemon may still be loading its bytes.
        built = _build(weights, model_class, config, _torch_dtype(dtype))
        plan = _match(built, weights, cast=cast)
        compute(built, plan.computed, torch.device(weights.device))
        weights.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0))
        _bind(built, weights, plan)
    except BaseException:
        if weights is not model:
            weights.close()
        raise
    # Not an attribute of the model: a lease can be neither pickled nor deep-copied, and models are.
    weakref.finalize(built, _end, weights, owned=weights is not model)
    loaded: PreTrainedModel = built.eval()
    return loaded


def _end(weights: Weights, *, owned: bool) -> None:
    if owned:
        weights.close()


# ---------------------------------------------------------------------- building


def _build(weights: Weights, model_class: Any, config: Any, dtype: torch.dtype | None) -> Any:
    """The model on the meta device: all that a checkpoint holds has a shape, a dtype, its ties, and no memory."""
    if weights.manifest.tp_size > 1:
        raise ModelMismatch(
            f"{weights.manifest.model}: this is rank {weights.manifest.tp_rank} of {weights.manifest.tp_size}, and "
            "Transformers models are loaded whole: attach without parallel"
        )
    config = _read_config(weights, model_class) if config is None else copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        if quantization := getattr(part, "quantization_config", None):
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
            raise ModelMismatch(
                f"{weights.manifest.model} is quantised ({method}), which Transformers repacks as it loads: "
                "load it with from_pretrained"
            )
    if weights.metadata is not None:
        config.name_or_path = str(weights.metadata)
    if model_class is None:
        model_class = _class_of(weights, config)
    dtype = dtype or _main_dtype(weights) or config.dtype or torch.float32
    with torch.device("meta"):
        if hasattr(model_class, "from_config"):
            model = model_class.from_config(config, dtype=dtype, trust_remote_code=False)
        else:
            # What from_config calls on the class that it finds: there is no public name for it.
            model = model_class._from_config(config, dtype=dtype)
    _read_generation_config(weights, model)
    return model


def _read_config(weights: Weights, model_class: Any) -> Any:
    folder = weights.metadata
    if folder is None or not (folder / "config.json").is_file():
        raise ModelMismatch(
            f"{weights.manifest.model} has no config.json"
            + (f" in {folder}, or it cannot be read from here" if folder else "")
            + ": pass config"
        )
    try:
        if kind := getattr(model_class, "config_class", None):
            # As from_pretrained: a class reads its own part of a composite model's configuration.
            return kind.from_pretrained(folder, local_files_only=True)
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a configuration class makes of a file that comes from outside
        raise ModelMismatch(
            f"{weights.manifest.model}: Transformers {transformers.__version__} cannot read its config.json: {error}"
        ) from error


def _class_of(weights: Weights, config: Any) -> Any:
    """The class that made the checkpoint, as the configuration tells."""
    names = config.architectures or []
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if names:
        raise ModelMismatch(
            f"{weights.manifest.model}: Transformers {transformers.__version__} has no class {', '.join(names)}: "
            "pass model_class"
        )
    return transformers.AutoModel


def _read_generation_config(weights: Weights, model: Any) -> None:
    """What ``generate()`` starts from, where from_pretrained finds it: older models keep it in config.json."""
    if weights.metadata is None or not model.can_generate():
        return
    for file, is_models in (("generation_config.json", None), ("config.json", True)):
        if (weights.metadata / file).is_file():
            # The flag keeps the model's own fields out of it, as from_pretrained does: there is no public way to.
            try:
                model.generation_config = transformers.GenerationConfig.from_pretrained(
                    weights.metadata, file, local_files_only=True, _from_model_config=is_models
                )
            except Exception as error:  # whatever the class makes of a file that comes from outside
                raise ModelMismatch(
                    f"{weights.manifest.model}: Transformers {transformers.__version__} cannot read its {file}, which "
                    f"generate() starts from: {error}: mend it in the checkpoint, or take it out to do without it, and "
                    "stage that again"
                ) from error
            return


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{dtype!r} is no dtype of torch")
    return found


def _main_dtype(weights: Weights) -> torch.dtype | None:
    """What most of the checkpoint is stored in, of the dtypes that a model can be built in."""
    sizes: Counter[str] = Counter()
    for entry in weights.manifest:
        if entry.dtype in _FLOATS:
            sizes[entry.dtype] += entry.nbytes
    return _stored_dtype(sizes.most_common(1)[0][0]) if sizes else None


def _stored_dtype(name: str) -> torch.dtype | None:
    kind = DTYPES[name].torch
    return getattr(torch, kind, None) if kind else None


# ---------------------------------------------------------------------- matching


@dataclass(frozen=True)
class _Plan:
    """What becomes of each tensor of the model's state dict."""

    sources: Mapping[str, str]
    """Name in the model → name in the checkpoint."""
    casts: Mapping[str, torch.dtype]
    """Names in the model of what is to be copied into another dtype."""
    computed: list[list[str]]
    """Names of what the checkpoint may lack, as the class computes it: one list for each tensor."""


def _match(model: Any, weights: Weights, *, cast: bool) -> _Plan:
    """Which stored tensor each tensor of the model is.

    Needs no more than the manifest, so that it says no before the bytes are there. Raises ModelMismatch.
    """
    problems: dict[str, list[str]] = {"converted": [], "missing": [], "extra": [], "shape": [], "dtype": []}
    sources = _match_names(model, weights, problems)
    wanted: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    ignored = _any_of(model._keys_to_ignore_on_load_missing or ())
    computed = []
    for names in _tied(wanted):
        if not any(name in sources for name in names):
            if ignored and all(ignored.search(name) for name in names):
                computed.append(names)
            else:
                problems["missing"].append(repr(names[0]))
    upcast = _upcast(model)
    casts: dict[str, torch.dtype] = {}
    for name, stored in sources.items():
        found, shape, dtype = weights.entry(stored), tuple(wanted[name].shape), wanted[name].dtype
        if upcast and dtype.is_floating_point and upcast.search(name):
            dtype = torch.float32
        if found.shape != shape:
            problems["shape"].append(f"{stored!r} has {found.shape}, wanted {shape}")
        if _stored_dtype(found.dtype) == dtype:
            continue
        if cast and found.dtype in _FLOATS and dtype.is_floating_point:
            casts[name] = dtype
        else:
            problems["dtype"].append(f"{stored!r} has {_stored_dtype(found.dtype) or found.dtype}, wanted {dtype}")
    if any(problems.values()):
        raise ModelMismatch(_message(model, weights, problems), details=problems)
    if casts:
        log.info("%s: copied into another dtype: %s", weights.manifest.model, ", ".join(casts))
    return _Plan(sources, casts, computed)


def _match_names(model: Any, weights: Weights, problems: Mapping[str, list[str]]) -> dict[str, str]:
    computed = {name for name, _ in model.named_non_persistent_buffers(remove_duplicate=False)}
    wanted = model.state_dict().keys()
    known = wanted | computed
    transforms = get_model_conversion_mapping(model)
    prefix = f"{model.base_model_prefix}."
    sources: dict[str, str] = {}
    left: dict[str, str] = {}
    has_heads = False
    for stored in weights:
        renamed = _renamed(stored, transforms)
        if renamed is None:
            problems["converted"].append(repr(stored))
            continue
        name = _placed(renamed, known, prefix)
        has_heads = has_heads or renamed == prefix + name
        if name in sources:
            problems["extra"].append(f"{stored!r} (it is {name!r}, as is {sources[name]!r})")
        elif name in wanted:
            sources[name] = stored
        elif name not in computed:
            left[name] = stored
    if ignored := _ignored(model, computed):
        left = {name: stored for name, stored in left.items() if not ignored.search(name)}
    if has_heads and model.base_model is model:
        # Beside the base model, which is what was asked for, a checkpoint of a model with a head has that head.
        heads = [stored for name, stored in left.items() if not name.startswith(prefix)]
        left = {name: stored for name, stored in left.items() if name.startswith(prefix)}
        if heads:
            log.info("%s: left out, as %s has none: %s", weights.manifest.model, type(model).__name__, ", ".join(heads))
    problems["extra"].extend(map(repr, left.values()))
    return sources


def _renamed(stored: str, transforms: Iterable[Any]) -> str | None:
    """A stored name as this release of Transformers spells it; None where it makes something else of the tensor."""
    name = stored
    for transform in transforms:
        if not isinstance(transform, WeightConverter):
            name = transform.rename_source_key(name)[0]
    converters = (transform for transform in transforms if isinstance(transform, WeightConverter))
    return None if any(converter.rename_source_key(name)[1] is not None for converter in converters) else name


def _placed(name: str, known: Container[str], prefix: str) -> str:
    """The name with the base model's prefix taken off or put on, where the model knows it so."""
    if name in known:
        return name
    if name.startswith(prefix) and name.removeprefix(prefix) in known:
        return name.removeprefix(prefix)
    return prefix + name if prefix + name in known else name


def _ignored(model: Any, computed: Iterable[str]) -> re.Pattern[str] | None:
    """What a checkpoint may hold without the model wanting it: as the class declares, and what has moved."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    patterns |= {pattern for end, pattern in _MOVED.items() if any(name.endswith(end) for name in computed)}
    return _any_of(patterns)


def _any_of(patterns: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(f"({pattern})" for pattern in patterns)
    return re.compile(joined) if joined else None


def _upcast(model: Any) -> re.Pattern[str] | None:
    """Parameters that from_pretrained makes float32 of, whatever the rest is: those of another dtype would be wrong."""
    patterns = model._get_dtype_plan(model.config.dtype)
    return _any_of(pattern.replace("*", ".*") for pattern in patterns)


def _tied(tensors: Mapping[str, torch.Tensor]) -> Iterable[list[str]]:
    """Names grouped by the tensor that they share: on the meta device the class has tied what it ties."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return names.values()


_KINDS = {
    "converted": (
        "Transformers would convert {}, which copies (save_pretrained(save_original_format=False) writes a checkpoint "
        "that needs no conversion)"
    ),
    "missing": "the checkpoint lacks {}",
    "extra": "the model has no place for {} (attach with tensors={{'exclude': [...]}} to do without them)",
    "shape": "shapes differ: {}",
    "dtype": "dtypes differ, and nothing is cast unasked (cast=True copies these floats, and lends the rest): {}",
}


def _message(model: Any, weights: Weights, problems: Mapping[str, list[str]]) -> str:
    parts = []
    for kind, found in problems.items():
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            parts.append(_KINDS[kind].format(", ".join(found[:_SHOWN]) + more))
    return f"{weights.manifest.model} does not fit {type(model).__name__}: {'; '.join(parts)}"


# ---------------------------------------------------------------------- binding


def _bind(model: Any, weights: Weights, plan: _Plan) -> None:
    """Put the stored tensors in the place of the model's, one parameter object for all the names that it ties."""
    wanted: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    for names in _tied(wanted):
        stored = {name: weights[plan.sources[name]] for name in names if name in plan.sources}
        if not stored:
            continue  # the class has computed it
        stored = {name: tensor.to(plan.casts.get(name, tensor.dtype)) for name, tensor in stored.items()}
        first, *others = stored.values()
        if all(torch.equal(first, other) for other in others):
            groups = [(names, first)]
        elif len(stored) == len(names):
            # The configuration ties what the checkpoint has as two. from_pretrained believes the checkpoint, so do we.
            groups = [([name], tensor) for name, tensor in stored.items()]
            for name in names:
                model.all_tied_weights_keys.pop(name, None)
        else:
            raise ModelMismatch(
                f"{weights.manifest.model} does not fit {type(model).__name__}, which ties {', '.join(names)}: "
                f"it holds {', '.join(stored)}, which differ"
            )
        for shared, tensor in groups:
            is_parameter = isinstance(wanted[shared[0]], torch.nn.Parameter)
            bound = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            for name in shared:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, bound)
    for name, left in (*model.named_parameters(), *model.named_buffers()):
        if left.is_meta:
            raise ModelMismatch(f"{type(model).__name__} keeps {name!r} out of its state dict: no checkpoint holds it")
