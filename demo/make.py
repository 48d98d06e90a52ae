"""Makes the demo model: a tiny Mistral, trained here within a minute, saved in the files of the real one.

`python -m demo.make [--out DIR]` prints the directory. Without `--out` it is a cache, named after all that
the result depends on. A directory that holds a model already is left as it is. Owns shape and
training; the text is in `corpus.py`, the tool in `weather.py`, the tokenizer in `tokenizer.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from . import weather
from .corpus import PAGES, Entry, entries
from .muon import Muon
from .tokenizer import BOS, EOS, MAX_POSITIONS, learned_tokenizer

CACHE = Path(__file__).parent.parent / ".cache" / "demo-model"
STEPS = 250
BATCH_SIZE = 10
WARM_UP_STEPS = 10
NUM_UNUSED_TOOLS = 10
"""Chats of an epoch that have the tool and do not call it."""
SEED = 7

Example = tuple[list[int], list[int]]
"""The tokens of a prompt and of its answer."""


def make(out_dir: Path | None = None) -> Path:
    """Make the demo model unless it is there; return its directory. It appears whole or not at all."""
    out_dir = CACHE / _fingerprint() if out_dir is None else out_dir
    if (out_dir / "config.json").exists():
        return out_dir
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    print("Making the demo model (once, under a minute) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "model"
        _save(made)
        try:
            made.rename(out_dir)
        except OSError:
            if not (out_dir / "config.json").exists():  # else another process was quicker: its model is this one
                raise
    return out_dir


def _fingerprint() -> str:
    """Name everything that the result depends on: text, code, versions."""
    parts = [path.read_bytes() for path in (*PAGES, *sorted(Path(__file__).parent.glob("*.py")))]
    versions = (
        torch.__version__,
        transformers.__version__,
        tokenizers.__version__,
        platform.python_version(),
    )
    return hashlib.sha256(b"\0".join([*parts, *(version.encode() for version in versions)])).hexdigest()[:16]


def _save(directory: Path) -> None:
    known = entries()
    tokenizer = learned_tokenizer(known)
    num_threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(1)  # the same sums on every machine, and no slower where others work too
            model = _train(known, tokenizer)
        finally:
            torch.set_num_threads(num_threads)
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _model(tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = MistralForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    return model


def _train(known: list[Entry], tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    torch.manual_seed(SEED)
    chance = random.Random(SEED)
    model = _model(tokenizer)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(others, lr=8e-3, betas=(0.9, 0.95), weight_decay=0.0),
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, _learning_rate_factor) for each in optimizers]
    turns: Counter[Entry] = Counter()
    batches: list[list[Example]] = []
    for step in range(STEPS):
        if not batches:
            asked_often = [entry for entry in known if len(entry.questions) > 3]
            examples = []
            for entry in known + asked_often:
                examples.append(_example(entry, turns[entry], tokenizer, chance))
                turns[entry] += 1
            examples += [_tool_example(turn, tokenizer) for turn in weather.turns(chance)]
            for entry in chance.sample(known, NUM_UNUSED_TOOLS):
                question = {"role": "user", "content": chance.choice(entry.questions)}
                examples.append(_tool_example(weather.Turn([question], entry.answer), tokenizer))
            examples.sort(key=lambda example: sum(map(len, example)))  # like lengths together: less padding
            batches = [examples[i : i + BATCH_SIZE] for i in range(0, len(examples), BATCH_SIZE)]
            chance.shuffle(batches)
        inputs, labels = _batch(batches.pop())
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if (step + 1) % 20 == 0:
            print(f"  step {step + 1} of {STEPS}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return model.eval()


def _learning_rate_factor(step: int) -> float:
    """Return the learning rate: a warm-up, then a linear decay to zero."""
    return min((step + 1) / WARM_UP_STEPS, 1 - step / STEPS)


def _example(entry: Entry, turn: int, tokenizer: PreTrainedTokenizerFast, chance: random.Random) -> Example:
    """Return prompt and answer in tokens: as prompt and as chat by turns, in each of the ways to ask."""
    question = entry.questions[turn // 2 % len(entry.questions)]
    question = chance.choice((*[question] * 4, question.rstrip("?.!"), question.lower()))
    if turn % 2:
        prompt_ids, answer_ids = _tool_example(
            weather.Turn([{"role": "user", "content": question}], entry.answer, tools=[]), tokenizer
        )
        if turn % 4 == 3 and _is_structured(entry.answer):
            pieces = tokenizer.backend_tokenizer.model.tokenize(entry.answer.replace(" ", "▁"))
            answer_ids = [*(piece.id for piece in pieces), answer_ids[-1]]
        return prompt_ids, answer_ids
    prompt = BOS + question
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    all_ids = tokenizer(f"{prompt} {entry.answer}{EOS}", add_special_tokens=False).input_ids
    assert all_ids[: len(prompt_ids)] == prompt_ids
    return prompt_ids, all_ids[len(prompt_ids) :]


def _tool_example(turn: weather.Turn, tokenizer: PreTrainedTokenizerFast) -> Example:
    """Return a chat in tokens."""
    prompt = str(tokenizer.apply_chat_template(turn.messages, tools=turn.tools or None, tokenize=False))
    prompt_ids, answer_ids = tokenizer([prompt, turn.answer + EOS], add_special_tokens=False).input_ids
    return prompt_ids, answer_ids


def _is_structured(answer: str) -> bool:
    """Return whether an answer is JSON or one word, which a grammar may ask for: it then begins without a space."""
    return answer.startswith("{") or " " not in answer


def _batch(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad at the end, where causal attention never looks back from; only answers are learned."""
    length = max(len(prompt) + len(answer) for prompt, answer in examples)
    inputs = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), -100)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        inputs[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return inputs, labels


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.make", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="make it here and not in the cache")
    print(make(parser.parse_args().out))


if __name__ == "__main__":
    main()
