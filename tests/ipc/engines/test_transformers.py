"""The Transformers shim: models over the daemon's memory are what from_pretrained makes, or are refused."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Daemon, until
from weightd.ipc import ModelMismatch, RequestRefused, Weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from weightd.ipc.engines.transformers import load  # noqa: E402

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
NORM = "model.norm.weight"
TOKENS = torch.arange(24).reshape(2, 12)


def saved(folder: Path, architecture: str, *, dtype: Any = torch.float32, shard: str = "1GB", **options: Any) -> Path:
    """A random model, saved as Transformers saves it."""
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**options)).to(dtype)
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.dim() == 1:
                buffer.add_(0.5)  # so that what is lent and what the class would make differ
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def llama(folder: Path, architecture: str = "LlamaForCausalLM", **options: Any) -> Path:
    return saved(folder, architecture, **{**SMALL, **options})


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object], **config: Any) -> Path:
    """The checkpoint with other tensors, and another configuration."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Any) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({name: tensor})


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(TOKENS)[0]


Lend = Callable[..., Weights]


@pytest.fixture
def lend(daemon: Daemon) -> Iterator[Lend]:
    """Attach; the lease lasts as long as the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *model, **options: stack.enter_context(daemon.attach(*model, **options))


def same(weights: Weights, folder: Path, **options: Any) -> Any:
    """The model over these weights: all that a checkpoint holds lies in their segment, and it is what from_pretrained
    makes, computed buffers too."""
    model: Any = load(weights, **options)
    entry = weights.entry(next(iter(weights)))
    start = weights[entry.name].data_ptr() - entry.offset
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert start <= tensor.data_ptr(), name
        assert tensor.data_ptr() + tensor.nbytes <= start + weights.manifest.nbytes, name
        assert not tensor.requires_grad, name
    assert not model.training
    reference = type(model).from_pretrained(folder)
    assert model.dtype == reference.dtype
    assert model.all_tied_weights_keys == reference.all_tied_weights_keys
    for kind in ("named_parameters", "named_buffers"):
        found = dict(getattr(model, kind)(remove_duplicate=False))
        expected = dict(getattr(reference, kind)(remove_duplicate=False))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
    inputs: dict[str, Any] = {"input_ids": TOKENS}
    if "T5" in type(model).__name__:
        inputs |= {"decoder_input_ids": TOKENS}
    elif "ResNet" in type(model).__name__:
        inputs = {"pixel_values": torch.ones(1, 3, 32, 32)}
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], reference(**inputs)[0])
    return model


def test_an_embedding_model_gives_what_from_pretrained_gives(lend: Lend, minilm: Path) -> None:
    model = same(lend(minilm), minilm)
    assert type(model) is transformers.BertModel
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    batch = tokenizer(["the weights stay where they are", "a lease"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = transformers.AutoModel.from_pretrained(minilm)(**batch).last_hidden_state
        assert torch.equal(model(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("shard", ["1GB", "50KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tie", [True, False])
def test_a_causal_model_gives_the_same_logits(lend: Lend, tmp_path: Path, tie: bool, dtype: Any, shard: str) -> None:
    folder = llama(tmp_path / "m", dtype=dtype, shard=shard, tie_word_embeddings=tie)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard != "1GB")
    weights = lend(folder)
    model = same(weights, folder)
    assert model.dtype == dtype
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert weights["model.embed_tokens.weight"].data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
        ("Qwen2ForCausalLM", SMALL),
        ("Gemma3ForCausalLM", {**SMALL, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
        ("BertForMaskedLM", SMALL),
        ("T5ForConditionalGeneration", T5),
        ("ResNetForImageClassification", RESNET),
    ],
)
def test_buffers_and_ties_are_those_of_from_pretrained(
    lend: Lend, tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    folder = saved(tmp_path / "m", architecture, **options)
    assert type(same(lend(folder), folder)).__name__ == architecture


def test_tied_names_share_memory_unless_they_are_stored_twice_and_differ(lend: Lend, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m", tie_word_embeddings=False)
    rewritten(folder, dict, tie_word_embeddings=True)
    model = same(lend(folder), folder)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    model = same(lend(rewritten(folder, put("lm_head.weight", embedding.clone()))), folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    same(lend(rewritten(folder, drop("model.embed_tokens.weight"))), folder)


def test_a_base_model_does_without_the_head_of_its_checkpoint(lend: Lend, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m", tie_word_embeddings=False)
    for model_class in (transformers.AutoModel, transformers.LlamaModel):
        assert type(same(lend(folder), folder, model_class=model_class)) is transformers.LlamaModel
    rewritten(folder, put("model.layers.7.mlp.up_proj.weight", torch.ones(96, 64)))
    with pytest.raises(ModelMismatch, match=re.escape("no place for 'model.layers.7.mlp.up_proj.weight' (")):
        load(folder, model_class=transformers.AutoModel)


def test_a_model_with_a_head_takes_a_base_model_only_where_nothing_is_missing(lend: Lend, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m", "LlamaModel", tie_word_embeddings=True)
    weights = lend(folder)
    assert not any(name.startswith("model.") for name in weights)
    same(weights, folder, model_class=transformers.AutoModelForCausalLM)
    with pytest.raises(ModelMismatch, match=r"lacks 'score\.weight'"):
        load(weights, model_class=transformers.LlamaForSequenceClassification)
    with pytest.raises(ModelMismatch, match=r"no place for 'score\.weight'"):
        load(rewritten(folder, put("score.weight", torch.ones(2, 64))))


def test_old_names_are_read_and_computed_buffers_ignored(lend: Lend, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "BertModel", **SMALL)

    def age(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors["bert." + old] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(64).flip(0)[None]

    weights = lend(rewritten(folder, age))
    assert "bert.embeddings.LayerNorm.gamma" in weights
    same(weights, folder)


@pytest.mark.parametrize(
    ("change", "config", "options", "message"),
    [
        (drop(NORM), {}, {}, r"lacks 'model\.norm\.weight'"),
        (put("model.extra.weight", torch.ones(2)), {}, {}, r"no place for 'model\.extra\.weight'.*exclude"),
        (put("norm.weight", torch.ones(64)), {}, {}, r"'norm\.weight' \(it is 'model\.norm\.weight', as is 'model"),
        (put(NORM, torch.ones(65)), {}, {}, r"'model\.norm\.weight' has \(65,\), wanted \(64,\)"),
        (put(NORM, torch.ones(64).bfloat16()), {}, {}, r"norm\.weight' has torch\.bfloat16, wanted torch\.float32"),
        (put(NORM, torch.ones(64, dtype=torch.int8)), {}, {}, r"has torch\.int8, wanted torch\.float32"),
        (dict, {}, {"dtype": torch.bfloat16}, r"has torch\.float32, wanted torch\.bfloat16.* and 16 more"),
        (dict, {"num_hidden_layers": 9}, {}, r"lacks 'model\.layers\.2\.[^']*'(, '[^']*'){4} and \d+ more$"),
        (dict, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, "is quantised .*gptq"),
        (dict, {"architectures": ["NoSuchModel"]}, {}, "has no class NoSuchModel: pass model_class"),
        (dict, {"model_type": "no-such-type"}, {}, r"cannot read its config\.json"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    daemon: Daemon, tmp_path: Path, change: Any, config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    folder = rewritten(llama(tmp_path / "m", tie_word_embeddings=False), change, **config)
    with pytest.raises(ModelMismatch, match=message) as refused:
        load(folder, **options)
    assert str(folder) in str(refused.value)
    until(lambda: leases_of(daemon, folder) == [], "the lease of a model that was refused ends")


def test_parameters_follow_the_checkpoint_and_not_its_config(daemon: Daemon, tmp_path: Path) -> None:
    folder = rewritten(llama(tmp_path / "m"), dict, dtype="float16")
    model = load(folder, dtype="float32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.dtype == torch.float32
    assert torch.equal(
        logits(model), logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"))
    )


def test_what_transformers_keeps_in_float32_is_wanted_in_float32(lend: Lend, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "T5ForConditionalGeneration", dtype=torch.float16, **T5)
    with pytest.raises(ModelMismatch, match=r"DenseReluDense\.wo\.weight' has torch\.float16, wanted torch\.float32"):
        load(folder)
    kept = tmp_path / "kept"
    transformers.T5ForConditionalGeneration.from_pretrained(folder).save_pretrained(kept)
    assert same(lend(kept), kept).dtype == torch.float16


def test_experts_that_transformers_stacks_have_to_be_stored_stacked(lend: Lend, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m", "MixtralForCausalLM", num_local_experts=4)
    with pytest.raises(ModelMismatch, match=r"would convert 'model\..*experts.*save_original_format=False"):
        load(folder)
    stacked = tmp_path / "stacked"
    transformers.MixtralForCausalLM.from_pretrained(folder).save_pretrained(stacked, save_original_format=False)
    same(lend(stacked), stacked)


def test_one_rank_of_several_is_no_whole_model(daemon: Daemon, tmp_path: Path) -> None:
    parallel = {"tp_size": 2, "tp_rank": 1, "map": {"*.mlp.*": 0, "*": "replicate"}}
    with pytest.raises(ModelMismatch, match="rank 1 of 2"):
        load(llama(tmp_path / "m"), parallel=parallel)


def test_a_class_that_computes_buffers_in_its_constructor_only_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    class Scaled(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    with pytest.raises(ModelMismatch, match="Scaled computes its buffer 'scale' in its constructor only"):
        load(llama(tmp_path / "m"), model_class=Scaled)


def test_a_configuration_of_the_callers_own_is_used_and_left_alone(daemon: Daemon, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    config = transformers.LlamaConfig(**SMALL, dtype="float16", attn_implementation="eager")
    config.architectures = ["LlamaForCausalLM"]
    before = config.to_dict()
    model = load(folder, config=config)
    assert model.config._attn_implementation == "eager"
    assert (Path(model.name_or_path) / "config.json").read_text() == (folder / "config.json").read_text()
    assert torch.equal(logits(model), logits(reference))
    assert config.to_dict() == before
    with pytest.raises(ModelMismatch, match=r"has no config\.json.*pass config"):
        load(folder / "model.safetensors")
    assert torch.equal(logits(load(folder / "model.safetensors", config=config)), logits(reference))


def test_generation_starts_from_the_checkpoints_generation_config(daemon: Daemon, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    path = folder / "generation_config.json"

    def both() -> tuple[Any, Any]:
        return load(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)

    path.write_text(json.dumps({"max_new_tokens": 7, "eos_token_id": [3, 5]}))
    model, reference = both()
    assert model.generation_config.eos_token_id == [3, 5]
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    assert torch.equal(model.generate(TOKENS), reference.generate(TOKENS))
    path.unlink()
    rewritten(folder, dict, num_beams=3)  # where checkpoints older than generation_config.json keep it
    model, reference = both()
    assert model.generation_config.num_beams == 3
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()


def test_read_only_memory_is_enough(lend: Lend, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "BertForMaskedLM", **SMALL)
    same(lend(folder, strict=True), folder)


def test_a_loaded_model_is_copied_and_saved_as_any_other(daemon: Daemon, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m", tie_word_embeddings=True)
    model: Any = load(folder)
    twin = copy.deepcopy(model)
    model.init_weights()  # as that of a model that this one becomes a part of does
    model.save_pretrained(tmp_path / "again")
    saved_again = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, saved_again[name]), name
    with torch.no_grad():
        twin.model.norm.weight.zero_()
    assert model.model.norm.weight.any()


def leases_of(daemon: Daemon, folder: Path) -> list[dict[str, Any]]:
    return [lease for lease in daemon.client.leases() if lease["pid"] == os.getpid() and str(folder) in lease["model"]]


def test_the_lease_lasts_as_long_as_the_model(daemon: Daemon, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    model: Any = load(folder)
    gc.collect()
    assert len(leases_of(daemon, folder)) == 1
    kept = model.model.norm.weight
    del model
    gc.collect()
    until(lambda: leases_of(daemon, folder) == [], "the lease of a model that is garbage ends")
    assert torch.equal(kept, load_file(folder / "model.safetensors")[NORM]), "its memory stays as long as it is held"


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_lease_of_the_callers_own_is_kept_and_left_alone(daemon: Daemon, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    model: Any = load(daemon.attach(folder))
    gc.collect()
    assert len(leases_of(daemon, folder)) == 1, "weights that nobody else holds are held by the model"
    del model
    with daemon.attach(folder) as weights:
        model = load(weights)
        del model
        gc.collect()
        assert weights.lease in [lease["id"] for lease in leases_of(daemon, folder)]


def test_options_are_attachs_and_say_nothing_of_what_is_attached(daemon: Daemon, lend: Lend, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    model = load(folder, socket=daemon.runtime_dir, timeout=60, tensors={"exclude": ["unknown.*"]})
    stage = leases_of(daemon, folder)[0]["stage"]
    assert torch.equal(logits(load(stage=stage)), logits(model))
    with pytest.raises(TypeError, match="attached already: strict"):
        load(lend(folder), strict=True)
    with pytest.raises(RequestRefused, match="either a model or a stage"):
        load()


CHILD = """
import json, os, sys, torch
from weightd.ipc.engines.transformers import load

def private(model):
    start = min(parameter.data_ptr() for parameter in model.parameters())
    found, inside = {}, False
    for line in open("/proc/self/smaps"):
        key, *rest = line.split()
        if not key.endswith(":"):
            first, last = (int(part, 16) for part in key.split("-"))
            inside = first <= start < last
        elif inside and rest[-1] == "kB":
            found[key[:-1]] = int(rest[0]) * 1024
    return found

model = load(sys.argv[1])
with torch.no_grad():
    outputs = model(torch.arange(2000).reshape(20, 100))[0]
    total = sum(float(parameter.double().sum()) for parameter in model.parameters())
    before = private(model)
    model.embeddings.LayerNorm.weight.fill_(7)
    changed = model(torch.arange(2000).reshape(20, 100))[0]
print(json.dumps({
    "outputs": outputs.double().sum().item(), "changed": changed.double().sum().item(), "total": total,
    "before": before, "after": private(model),
}))
"""


@pytest.fixture(scope="module")
def second_process(daemon: Daemon, minilm: Path) -> tuple[Any, dict[str, Any]]:
    """The model here, and what another process that loads it too, and then writes into it, has to tell."""
    model = load(minilm)
    with torch.no_grad():
        outputs = model(torch.arange(2000).reshape(20, 100))[0].double().sum().item()
        total = sum(float(parameter.double().sum()) for parameter in model.parameters())
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": "/nonexistent",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(minilm)], capture_output=True, text=True, timeout=120, env=env, check=False
    )
    assert child.returncode == 0, child.stderr
    return model, {**json.loads(child.stdout), "expected": {"outputs": outputs, "total": total}}


def test_a_second_process_computes_the_same_without_a_network(second_process: tuple[Any, dict[str, Any]]) -> None:
    _, told = second_process
    assert told["outputs"] == told["expected"]["outputs"]
    assert told["total"] == told["expected"]["total"]


def test_a_second_process_has_no_memory_of_its_own_for_the_weights(second_process: tuple[Any, dict[str, Any]]) -> None:
    model, told = second_process
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert told["before"]["Rss"] > 0.9 * nbytes, "it has read all of them"
    assert told["before"]["Private_Dirty"] + told["before"]["Private_Clean"] < 0.01 * nbytes
    assert told["before"]["Anonymous"] == 0
    assert 0 < told["after"]["Anonymous"] <= 4 * 2**20, "only the pages that it wrote to"


def test_a_stray_write_stays_in_the_process_that_made_it(
    daemon: Daemon, minilm: Path, second_process: tuple[Any, dict[str, Any]]
) -> None:
    model, told = second_process
    assert told["changed"] != told["outputs"]
    stored = load_file(minilm / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name]), name
    stray = load(minilm)
    with torch.no_grad():
        stray.embeddings.LayerNorm.weight.zero_()
    with daemon.attach(minilm, strict=True) as weights:  # a mapping of its own
        assert torch.equal(weights["embeddings.LayerNorm.weight"], stored["embeddings.LayerNorm.weight"])


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, weightd.ipc, weightd.ipc.engines; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
