"""Runs in mistral-common's own environment: conversations in, the tokens of its Mistral v3 tokenizer out.

    .venv-oracle/bin/python tests/oracle/encode.py < conversations.json
    .venv-oracle/bin/python tests/oracle/encode.py --pieces

Reads a list of {"messages", "tools"} in OpenAI's form; writes a list of token ids, or of an error's text. With
`--pieces` it writes the vocabulary: [piece, score, type] of each id.
"""

import argparse
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
        request = ChatCompletionRequest.from_openai(**conversation)
        return tokenizer.encode_chat_completion(request).tokens
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def pieces() -> list[tuple[str, float, str]]:
    model = SentencePieceProcessor(model_file=str(MODEL))
    kinds = {"control": model.is_control, "byte": model.is_byte, "unknown": model.is_unknown}
    return [
        (model.id_to_piece(i), model.get_score(i), next((kind for kind, holds in kinds.items() if holds(i)), "normal"))
        for i in range(model.get_piece_size())
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pieces", action="store_true")
    if parser.parse_args().pieces:
        json.dump(pieces(), sys.stdout)
    else:
        tokenizer = MistralTokenizer.from_file(str(MODEL), mode=ValidationMode.serving)
        json.dump([encoded(tokenizer, {"model": "any"} | given) for given in json.load(sys.stdin)], sys.stdout)
