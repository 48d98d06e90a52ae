"""Mistral v3's real tokenizer in the form of a tokenizer.json, built from the pieces in mistral-common's wheel."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-oracle" / "bin" / "python"
ENCODE = ROOT / "tests" / "oracle" / "encode.py"


def encode(conversations: Sequence[dict[str, Any]]) -> list[Any]:
    """Return mistral-common's tokens of each conversation, or the text of its error."""
    done = subprocess.run([PYTHON, ENCODE], input=json.dumps(conversations), capture_output=True, text=True, check=True)
    found: list[Any] = json.loads(done.stdout)
    return found


@functools.cache
def pieces() -> list[tuple[str, float, str]]:
    done = subprocess.run([PYTHON, ENCODE, "--pieces"], capture_output=True, text=True, check=True)
    return [(piece, score, kind) for piece, score, kind in json.loads(done.stdout)]


def tokenizer(form: Literal["prepend", "metaspace"], chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return the tokenizer; `form` is how it puts a space before a text, of which both are in checkpoints."""
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces())}
    score = {piece: score for piece, score, kind in pieces() if kind == "normal"}
    merges = [
        (left, right)
        for piece in sorted(score, key=lambda piece: -score[piece])
        for left, right in sorted(
            ((piece[:i], piece[i:]) for i in range(1, len(piece))), key=lambda pair: [vocab.get(p, 0) for p in pair]
        )
        if left in score and right in score
    ]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if form == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [piece for piece, _, kind in pieces() if kind in ("control", "unknown")]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template
    )
