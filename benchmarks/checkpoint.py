"""Checkpoints of random weights in Mistral's architecture, with a tokenizer: made here, not downloaded.

The shapes, bytes and files are real; the generated text is noise. Every vocabulary entry is one word and no token ends
an answer, so that 64 requested tokens are 64 tokens on every server.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

if TYPE_CHECKING:  # torch and Transformers take seconds to import, and most runs find the checkpoint made
    import torch
    from transformers import MistralForCausalLM

CACHE_DIR = Path(".cache/benchmarks")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
_SIZES = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
SHAPES: Mapping[str, dict[str, int]] = {
    "tiny": dict(zip(_SIZES, (64, 2, 128, 4, 2, 256), strict=True)),
    "100m": dict(zip(_SIZES, (768, 12, 2048, 12, 4, 8000), strict=True)),
    "2b": dict(zip(_SIZES, (4096, 8, 14336, 32, 8, 32000), strict=True)),  # the first eight layers of 7b: 4 GB
    "7b": dict(zip(_SIZES, (4096, 32, 14336, 32, 8, 32000), strict=True)),  # Mistral-7B-v0.1
}


def checkpoint(shape: str, dtype: str, cache_dir: Path = CACHE_DIR, device: str = "cpu") -> Path:
    """Return the directory of a checkpoint of this shape and dtype, made on the device on the first call and kept."""
    directory = cache_dir / f"mistral-{shape}-{dtype}"
    if not directory.exists():
        import torch
        from transformers import PreTrainedTokenizerFast

        words = word_tokenizer(SHAPES[shape]["vocab_size"])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:  # an interrupted run leaves no half of a checkpoint
            unfinished = Path(scratch, "checkpoint")
            random_mistral(shape, getattr(torch, dtype), device).save_pretrained(unfinished, max_shard_size="2GB")
            tokenizer.save_pretrained(unfinished)
            os.replace(unfinished, directory)
    return directory.resolve()


def random_mistral(shape: str, dtype: torch.dtype, device: str = "cpu") -> MistralForCausalLM:
    """Return a Mistral with random weights, made on the device itself."""
    import torch
    from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

    config = MistralConfig(
        **SHAPES[shape], max_position_embeddings=32768, sliding_window=None, bos_token_id=1, eos_token_id=None
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = MistralForCausalLM._from_config(config, dtype=dtype)
    with torch.no_grad():
        # A logit of 0 is never the maximum of thousands of random ones: special tokens, which have no text, never win.
        model.lm_head.weight[: len(SPECIAL_TOKENS)] = 0
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=None, do_sample=False)
    return model.eval()


def weight_files(model_dir: Path) -> list[Path]:
    return sorted(model_dir.glob("*.safetensors"))


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer whose every token is a word, with Mistral's `▁` for a space and `<s>` in front."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = itertools.chain.from_iterable(itertools.product(syllables, repeat=length) for length in itertools.count(2))
    num_words = vocab_size - len(SPECIAL_TOKENS)
    vocab = [*SPECIAL_TOKENS, *("▁" + "".join(word) for word in itertools.islice(words, num_words))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def prompts_for(model_dir: Path, num_tokens: int, count: int) -> list[str]:
    """Return random prompts of exactly `num_tokens` tokens: no server gains from a prefix cache.

    Raises:
        ValueError: the tokenizer of `model_dir` does not have one token for a word, marked with `▁`.
    """
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    marked = sorted(token[1:] for token in tokenizer.get_vocab() if token.startswith("▁") and token[1:].isalpha())
    words = [word for word in marked if len(tokenizer.encode(word, add_special_tokens=False)) == 1]
    draw = random.Random(0)
    num_words = num_tokens - len(tokenizer.encode(""))
    prompts = [" ".join(draw.choices(words or [""], k=num_words)) for _ in range(count)]
    if {len(tokenizer.encode(prompt)) for prompt in prompts} != {num_tokens}:
        raise ValueError(f"Prompts of exactly {num_tokens} tokens cannot be made with the tokenizer in {model_dir}.")
    return prompts


if __name__ == "__main__":
    checkpoint(sys.argv[1], sys.argv[2], device=sys.argv[3])
