"""The same weights and words as a checkpoint of `benchmarks/checkpoint.py`, in llama.cpp's file format."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from benchmarks.checkpoint import SPECIAL_TOKENS, weight_files

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter


def gguf_file(model_dir: Path) -> Path:
    """Return the GGUF file of a checkpoint, made beside it on the first call and kept."""
    path = model_dir.with_suffix(".gguf")
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        _write(model_dir, unfinished)
        os.replace(unfinished, path)
    return path


def _write(model_dir: Path, path: Path) -> None:
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
    from safetensors.torch import load_file

    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(path, "llama")  # llama.cpp's name for the architecture of Llama and Mistral
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, model_dir)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    matrix_dtype = GGMLQuantizationType[{"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[config["dtype"]]]
    for file in weight_files(model_dir):
        for name, tensor in load_file(file).items():
            dtype = GGMLQuantizationType.F32 if tensor.dim() == 1 else matrix_dtype
            if num_heads := {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2]):
                tensor = _interleaved(tensor, num_heads)
            gguf_name = names[name.removesuffix(".weight")] + ".weight"
            writer.add_tensor(gguf_name, quantize(tensor.float().numpy(), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: GGUFWriter, model_dir: Path) -> None:
    from gguf import TokenType

    vocab = Tokenizer.from_file(str(model_dir / "tokenizer.json")).get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("t5")  # a unigram model: it finds whole words, where llama.cpp's others merge pieces
    writer.add_token_list(tokens)
    writer.add_token_scores([-1.0] * len(tokens))
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL_TOKENS else TokenType.NORMAL for token in tokens])
    writer.add_unk_token_id(vocab["<unk>"])
    writer.add_bos_token_id(vocab["<s>"])
    writer.add_eos_token_id(vocab["</s>"])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _interleaved(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return a projection whose rotary pairs are neighbours, as llama.cpp reads them, and not half a head apart."""
    return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
