"""Loading: a tiny model, intact and then broken in every way; each fault is one sentence and no traceback."""

import json
import logging
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from model_server.errors import StartupError
from model_server.loading import checkpoint, weights
from model_server.settings import Settings
from model_server.telemetry.progress import Progress, in_units

FLOAT32 = Settings(dtype="float32", max_model_len=128)


@pytest.fixture(scope="module")
def intact_model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    MistralForCausalLM(config).save_pretrained(directory)
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(directory)
    return directory


@pytest.fixture
def model_dir(intact_model, tmp_path) -> Path:
    return Path(shutil.copytree(intact_model, tmp_path / "model"))


def refusal(directory: Path, settings: Settings = FLOAT32) -> str:
    with pytest.raises(StartupError) as caught:
        weights.load(directory, settings)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def edit_config(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(directory: Path, change) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shard(directory: Path) -> None:
    """Split the one file in two, with an index, as large models are."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_loaded_weights_are_those_of_the_file(model_dir):
    loaded = weights.load(model_dir, FLOAT32)
    saved = load_file(model_dir / "model.safetensors")
    assert torch.equal(loaded.model.lm_head.weight, saved["lm_head.weight"])
    assert loaded.num_parameters == sum(tensor.numel() for tensor in saved.values())
    assert loaded.weight_bytes == 4 * loaded.num_parameters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 16}], ids=str)
def test_loaded_model_computes_what_transformers_own_loading_does(intact_model, tmp_path, dtype, changes):
    config = MistralConfig.from_pretrained(intact_model)
    for name, value in changes.items():
        setattr(config, name, value)
    model_dir = Path(shutil.copytree(intact_model, tmp_path / "model"))
    MistralForCausalLM(config).save_pretrained(model_dir)
    ids = torch.arange(20)[None]

    ours = weights.load(model_dir, Settings(dtype=dtype, max_model_len=128)).model
    theirs = MistralForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))

    assert torch.allclose(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6 if dtype == "float32" else 0.02)
    assert ours.generation_config == theirs.generation_config


def test_weights_are_read_into_their_final_memory(model_dir):
    """Queries, keys and values side by side, each byte held once."""
    layer = weights.load(model_dir, FLOAT32).model.model.layers[0]
    assert layer.self_attn.k_proj.weight.data_ptr() > layer.self_attn.qkv.weight.data_ptr()
    assert layer.self_attn.q_proj.weight.untyped_storage().data_ptr() == (
        layer.self_attn.qkv.weight.untyped_storage().data_ptr()
    )


def test_broken_generation_config_is_refused(model_dir):
    (model_dir / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be read" in refusal(model_dir)


def test_loaded_model_is_for_inference_only(model_dir):
    model = weights.load(model_dir, FLOAT32).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_shards_are_loaded_like_one_file(model_dir, intact_model):
    shard(model_dir)
    loaded = weights.load(model_dir, FLOAT32)
    assert torch.equal(loaded.model.lm_head.weight, load_file(intact_model / "model.safetensors")["lm_head.weight"])


def test_second_copy_of_the_weights_is_not_read(model_dir):
    shutil.copy(model_dir / "model.safetensors", model_dir / "consolidated.safetensors")
    assert [file.name for file in checkpoint.weight_files(model_dir)] == ["model.safetensors"]


def test_every_resolved_value_is_logged_with_its_reason(model_dir):
    reasons = " / ".join(weights.load(model_dir, FLOAT32).reasons)
    for part in (
        "device cpu: ",
        "dtype float32: as configured",
        "max_model_len 128: ",
        "attention sdpa: ",
        "parameters",
    ):
        assert part in reasons


def test_progress_is_logged_with_bytes_percent_and_seconds(model_dir, caplog):
    caplog.set_level(logging.INFO)
    weights.load(model_dir, FLOAT32)
    assert "loading weights: " in caplog.text
    assert "(100%), 0 s" in caplog.text


def test_progress_is_logged_while_bytes_move(caplog):
    caplog.set_level(logging.INFO)
    asked = threading.Event()

    def done_bytes() -> int:
        asked.set()
        return 500

    with Progress("moving", 2000, done_bytes, interval_s=0.001):
        assert asked.wait(5)
    assert "moving: 500 bytes of 2.0 kB (25%), 0 s" in caplog.text


def test_default_length_is_reduced_to_the_models(model_dir):
    assert weights.load(model_dir, Settings(dtype="float32")).max_model_len == 512


def test_configured_length_beyond_the_model_is_refused(model_dir):
    settings = Settings(max_model_len=513, given=frozenset({"max_model_len"}))
    assert "--max_model_len must be at most 512" in refusal(model_dir, settings)


def test_missing_directory_is_refused(tmp_path):
    assert "is not there: check --model_dir" in refusal(tmp_path / "nowhere")


def test_directory_without_config_is_refused(model_dir):
    (model_dir / "config.json").unlink()
    assert "holds no config.json" in refusal(model_dir)


@pytest.mark.parametrize("text", ["{", "\xff", ""])
def test_broken_config_is_refused(model_dir, text):
    (model_dir / "config.json").write_text(text, encoding="latin-1")
    assert "is not valid JSON" in refusal(model_dir)


@pytest.mark.parametrize("changes", [{"num_attention_heads": "four"}, {"hidden_size": None}, {"vocab_size": []}])
def test_config_with_impossible_values_is_refused(model_dir, changes):
    edit_config(model_dir, **changes)
    assert str(model_dir) in refusal(model_dir)


@pytest.mark.parametrize(
    ("architectures", "found"),
    [
        (["BertModel"], "BertModel, which is not a causal language model"),
        (["LlamaForCausalLM"], "LlamaForCausalLM; this server serves MistralForCausalLM only"),
        (None, "unnamed architecture"),
    ],
)
def test_other_architectures_are_refused_by_name(model_dir, architectures, found):
    edit_config(model_dir, architectures=architectures)
    assert found in refusal(model_dir)


def test_quantized_weights_are_refused(model_dir):
    edit_config(model_dir, quantization_config={"quant_method": "gptq"})
    assert "quantized" in refusal(model_dir)


def test_weights_in_pickle_are_refused(model_dir):
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    assert "(pytorch_model.bin is not read)" in refusal(model_dir)


def test_missing_shard_is_refused_by_name(model_dir):
    shard(model_dir)
    (model_dir / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refusal(model_dir)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 1}'])
def test_broken_index_is_refused(model_dir, text):
    shard(model_dir)
    (model_dir / "model.safetensors.index.json").write_text(text)
    assert "is no index of shards" in refusal(model_dir)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, 50_000])
def test_file_cut_short_is_refused(model_dir, num_bytes):
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    assert "model.safetensors is broken or cut short" in refusal(model_dir)


def test_file_with_a_corrupt_header_is_refused(model_dir):
    file = model_dir / "model.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])
    assert "broken or cut short" in refusal(model_dir)


def test_missing_weight_is_refused_and_never_initialised(model_dir):
    edit_weights(model_dir, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lack model.layers.1.mlp.up_proj.weight" in refusal(model_dir)


def test_weight_of_another_shape_is_refused(model_dir):
    def shrink(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:16].clone()

    edit_weights(model_dir, shrink)
    assert "another shape for model.norm.weight, [16], than config.json says, [32]" in refusal(model_dir)


def test_missing_tokenizer_is_refused(model_dir):
    for file in model_dir.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refusal(model_dir).lower()


def test_tokenizer_with_more_tokens_than_the_model_is_refused(model_dir):
    edit_config(model_dir, vocab_size=200)
    assert "has 256 tokens, the model 200" in refusal(model_dir)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(model_dir, monkeypatch):
    monkeypatch.setattr(weights, "free_bytes", lambda device: 1000)
    assert "of memory on cpu and 1.0 kB are free" in refusal(model_dir)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_running_out_of_memory_while_reading_is_one_sentence(model_dir, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(weights, "read_all", fail)
    assert "give the container more" in refusal(model_dir)


def test_code_beside_the_weights_is_never_run(model_dir):
    (model_dir / "code.py").write_text("raise SystemExit('ran')\n")
    edit_config(model_dir, auto_map={"AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]})
    assert type(weights.load(model_dir, FLOAT32).model) is MistralForCausalLM


def test_sizes_are_written_in_readable_units():
    assert [in_units(n) for n in (0, 999, 1500, 14.48e9)] == ["0 bytes", "999 bytes", "1.5 kB", "14.5 GB"]
