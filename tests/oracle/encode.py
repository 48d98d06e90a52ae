"""Runs in mistral-common's own environment: conversations in, what its Mistral v3 tokenizer makes of them out.

    .venv-oracle/bin/python tests/oracle/encode.py < conversations.jsonl
    .venv-oracle/bin/python tests/oracle/encode.py --parts < tests/oracle/conversations.jsonl > tests/oracle/parts.jsonl
    .venv-oracle/bin/python tests/oracle/encode.py --pieces

Reads {"messages", "tools"} in OpenAI's form, one a line. Writes for each the token ids, or the text of an error. With
`--parts` it writes [control token or null, text or null] for each part. With `--pieces` it reads nothing and writes
the vocabulary: [piece, score, kind] of each id.
"""

import argparse
import itertools
import json
import sys
from typing import Any

from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor

MODEL = MistralTokenizer._data_path() / "mistral_instruct_tokenizer_240323.model.v3"


def encoded(tokenizer: MistralTokenizer, conversation: dict[str, Any]) -> list[int] | str:
    try:
        request = ChatCompletionRequest.from_openai(**{"model": "any"} | conversation)
        return tokenizer.encode_chat_completion(request).tokens
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def pieces(model: SentencePieceProcessor) -> list[tuple[str, float, str]]:
    kinds = {"control": model.is_control, "byte": model.is_byte, "unknown": model.is_unknown}
    return [
        (model.id_to_piece(i), model.get_score(i), next((kind for kind, holds in kinds.items() if holds(i)), "normal"))
        for i in range(model.get_piece_size())
    ]


def parts(model: SentencePieceProcessor, ids: list[int]) -> list[tuple[str | None, str | None]]:
    found: list[tuple[str | None, str | None]] = []
    for is_control, group in itertools.groupby(ids, key=model.is_control):
        same = list(group)
        if is_control:
            found += [(model.id_to_piece(i), None) for i in same]
        else:
            found.append((None, model.decode(same)))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--pieces", action="store_true")
    given = parser.parse_args()
    model = SentencePieceProcessor(model_file=str(MODEL))
    if given.pieces:
        print(json.dumps(pieces(model)))
        sys.exit()
    tokenizer = MistralTokenizer.from_file(str(MODEL), mode=ValidationMode.serving)
    for line in sys.stdin:
        ids = encoded(tokenizer, json.loads(line))
        print(json.dumps(parts(model, ids) if given.parts else ids, ensure_ascii=False), flush=True)
