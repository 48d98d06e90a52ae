"""Mistral v3's real tokenizer in the form of a tokenizer.json, built from the pieces in mistral-common's wheel."""

from __future__ import annotations

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

Pieces = Sequence[tuple[str, float, str]]
"""A SentencePiece vocabulary: the text, the score and the kind of each token."""


class Oracle:
    """mistral-common in a separate process with a separate environment."""

    def __init__(self) -> None:
        self.pieces: Pieces = json.loads(subprocess.run([PYTHON, ENCODE, "--pieces"], capture_output=True).stdout)
        self._process = subprocess.Popen([PYTHON, ENCODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def encode(self, conversation: dict[str, Any]) -> list[int] | str:
        """Return the tokens of a conversation in OpenAI's format, or the text of an error."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(conversation) + "\n")
        stdin.flush()
        found: list[int] | str = json.loads(stdout.readline())
        return found

    def close(self) -> None:
        self._process.communicate()


def hf_tokenizer(pieces: Pieces, form: Literal["prepend", "metaspace"]) -> PreTrainedTokenizerFast:
    """Return the tokenizer; `form` selects how it adds a space before a text. Checkpoints use both forms."""
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for piece, score, kind in pieces if kind == "normal"}
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in scores and right in scores]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if form == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [piece for piece, _, kind in pieces if kind in ("control", "unknown")]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template="not used"
    )
