"""Checkpoints of random weights in Mistral's real architecture, with a tokenizer: made here, not downloaded.

What the numbers need is the right shapes, bytes and files, not sense: the text that comes out is noise. Every
vocabulary entry is one word and no answer ends by itself: "64 tokens in, 64 out" is exact for every server.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch and Transformers cost seconds to import, and most callers find the checkpoint made
    import torch
    from tokenizers import Tokenizer
    from transformers import MistralConfig, MistralForCausalLM

CACHE_DIR = Path(".cache/benchmarks")

SHAPES: Mapping[str, Mapping[str, Any]] = {
    # Smallest first. `7b` is Mistral-7B-v0.1's own shape, and `2b` its first eight layers: 4 GB in 16 bits.
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
    "100m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 8000,
    },
    "2b": {
        "hidden_size": 4096,
        "num_hidden_layers": 8,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


def checkpoint(shape: str, dtype: str, cache_dir: Path = CACHE_DIR) -> Path:
    """Return the directory of a checkpoint of this shape and dtype: made at the first call, then kept."""
    directory = cache_dir / f"mistral-{shape}-{dtype}"
    if directory.exists():
        return directory.resolve()
    import torch

    cache_dir.mkdir(parents=True, exist_ok=True)
    # A run that is interrupted must not leave half a checkpoint under the final name.
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=cache_dir))
    try:
        # The real one comes in shards as well.
        random_mistral(SHAPES[shape], getattr(torch, dtype)).save_pretrained(unfinished, max_shard_size="2GB")
        _save_tokenizer(SHAPES[shape]["vocab_size"], unfinished)
        unfinished.chmod(0o755)
        os.replace(unfinished, directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return directory.resolve()


def mistral_config(shape: Mapping[str, Any]) -> MistralConfig:
    from transformers import MistralConfig

    return MistralConfig(**shape, max_position_embeddings=32768, sliding_window=None, bos_token_id=1, eos_token_id=None)


def random_mistral(shape: Mapping[str, Any], dtype: torch.dtype, device: str = "cpu") -> MistralForCausalLM:
    """Return a Mistral of random weights, made on the device itself."""
    import torch
    from transformers import GenerationConfig, MistralForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = MistralForCausalLM._from_config(mistral_config(shape), dtype=dtype)
    with torch.no_grad():
        # A logit of exactly 0 never wins the argmax over thousands of random ones: no answer has a special
        # token, hence none a token without text.
        model.lm_head.weight[: len(SPECIAL_TOKENS)] = 0
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=None, do_sample=False)
    return model.eval()


def weight_files(model_dir: Path) -> list[Path]:
    """Return the files that hold the weights, in order."""
    return sorted(model_dir.glob("*.safetensors"))


def weight_bytes(model_dir: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(model_dir))


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer whose every token is a word, with Mistral's `▁` for a space and `<s>` in front."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Metaspace as MetaspaceDecoder
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing

    num_words = vocab_size - len(SPECIAL_TOKENS)
    vocab = [*SPECIAL_TOKENS, *("▁" + word for word in itertools.islice(_words(), num_words))]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.decoder = MetaspaceDecoder()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _save_tokenizer(vocab_size: int, directory: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(vocab_size), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def _words() -> itertools.chain[str]:
    """Yield pronounceable words without end, always the same: of two syllables, then of three, and so on."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    return itertools.chain.from_iterable(
        map("".join, itertools.product(syllables, repeat=length)) for length in itertools.count(2)
    )
