"""Prompts of an exact number of tokens, drawn from a model's own tokenizer by a seed."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer


def exact_prompts(tokenizer: Tokenizer, num_tokens: int, count: int, seed: int, *, num_shared: int = 0) -> list[str]:
    """Return `count` prompts of `num_tokens` tokens each, what the tokenizer puts in front included.

    The first `num_shared` tokens are the same in all; beyond them they share nothing but by chance, so that no server
    gains by remembering one.
    """
    words = [
        word
        for token in sorted(tokenizer.get_vocab())
        if (word := token.removeprefix("▁")) != token
        and word.isalpha()
        and len(tokenizer.encode(word, add_special_tokens=False)) == 1
    ]
    if not words:
        raise ValueError("This tokenizer marks no words with '▁'; prompts of an exact length need one that does.")
    num_special = len(tokenizer.encode(""))
    draw = random.Random(seed)
    shared = draw.choices(words, k=max(0, num_shared - num_special))
    own = num_tokens - num_special - len(shared)
    prompts = [" ".join([*shared, *draw.choices(words, k=own)]) for _ in range(count)]
    for prompt in prompts:
        if (length := len(tokenizer.encode(prompt))) != num_tokens:
            raise ValueError(f"A prompt meant to have {num_tokens} tokens has {length} in this tokenizer.")
    return prompts


def prompts_for(model_dir: Path, num_tokens: int, count: int, seed: int = 0, *, num_shared: int = 0) -> list[str]:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    return exact_prompts(tokenizer, num_tokens=num_tokens, count=count, seed=seed, num_shared=num_shared)


def plain_prompts(num_words: int, count: int, seed: int) -> list[str]:
    """Return prompts of short words, about a token each, for a server whose tokenizer is not at hand."""
    words = (
        "the",
        "of",
        "and",
        "to",
        "in",
        "is",
        "that",
        "it",
        "was",
        "for",
        "on",
        "are",
        "with",
        "as",
        "at",
    )
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=num_words)) for _ in range(count)]
