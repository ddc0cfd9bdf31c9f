"""The Transformers shim: models over the daemon's memory are what from_pretrained makes, or are refused."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Daemon, until
from weightd.ipc import ModelMismatch, RequestRefused

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from tests.ipc.engines.conftest import Lend, leases_of  # noqa: E402
from tests.ipc.engines.models import (  # noqa: E402
    NORM,
    RESNET,
    SMALL,
    T5,
    TOKENS,
    drop,
    llama,
    logits,
    put,
    rewritten,
    same,
    saved,
)  # fmt: skip
from weightd.ipc.engines.transformers import load  # noqa: E402


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


def test_a_few_tensors_of_another_dtype_are_copied_where_that_is_asked_for(lend: Lend, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m", dtype=torch.bfloat16, tie_word_embeddings=True)
    norms = [name for name in load_file(folder / "model.safetensors") if "norm" in name]
    assert len(norms) == 5

    def widen(tensors: dict[str, Any]) -> None:
        for name in norms:
            tensors[name] = tensors[name].float() + 1e-4

    weights = lend(rewritten(folder, widen))
    with pytest.raises(ModelMismatch, match="cast=True") as refused:
        load(weights)
    assert len(refused.value.details["dtype"]) == len(norms)
    assert all(any(repr(name) in found for found in refused.value.details["dtype"]) for name in norms)
    model = same(weights, folder, own=tuple(norms), cast=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_what_transformers_keeps_in_float32_is_copied_where_that_is_asked_for(lend: Lend, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "T5ForConditionalGeneration", dtype=torch.float16, **T5)
    weights = lend(folder)
    own = tuple(name for name in weights if name.endswith("DenseReluDense.wo.weight"))
    assert same(weights, folder, own, cast=True).dtype == torch.float16


def test_only_floats_are_cast(lend: Lend, tmp_path: Path) -> None:
    weights = lend(rewritten(llama(tmp_path / "m"), put(NORM, torch.ones(64, dtype=torch.int8))))
    with pytest.raises(ModelMismatch, match=r"norm\.weight' has torch\.int8"):
        load(weights, cast=True)


@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b"\xff\xfe{", b"", b'{"num_beams": "many", "cache_implementation": 3}']
)
def test_a_broken_generation_config_is_named_with_what_to_do(daemon: Daemon, tmp_path: Path, content: bytes) -> None:
    folder = llama(tmp_path / "m")
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(ModelMismatch, match=r"cannot read its generation_config\.json.*mend it") as refused:
        load(folder)
    assert str(folder) in str(refused.value)
    until(lambda: leases_of(daemon, folder) == [], "the lease of a model that was refused ends")


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


def test_options_are_attachs_and_say_nothing_of_what_is_attached(daemon: Daemon, lend: Lend, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    model = load(folder, socket=daemon.runtime_dir, timeout=60, tensors={"exclude": ["unknown.*"]})
    stage = leases_of(daemon, folder)[0]["stage"]
    assert torch.equal(logits(load(stage=stage)), logits(model))
    with pytest.raises(TypeError, match="attached already: strict"):
        load(lend(folder), strict=True)
    with pytest.raises(RequestRefused, match="either a model or a stage"):
        load()


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, weightd.ipc, weightd.ipc.engines; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
