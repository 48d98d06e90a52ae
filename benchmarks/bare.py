"""The naive floor: `model.generate` in a loop over prompts, in a process of its own, with nothing around it.

`python -m benchmarks.bare` prints one JSON object at the end; `serve` starts it and reads that.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import summary
from benchmarks.load import Answer, Run
from benchmarks.prompts import prompts_for
from benchmarks.stolen import Stolen

if TYPE_CHECKING:
    import torch


class _Clock:
    """A streamer, as `generate` calls them, that only notes when each token came."""

    def __init__(self) -> None:
        self._times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self._times_s.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def token_times_s(self) -> list[float]:
        return self._times_s[1:]  # the first call hands over the prompt


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("prompt_tokens", type=int)
    parser.add_argument("max_new_tokens", type=int)
    parser.add_argument("min_seconds", type=float)
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(options.model_dir, dtype="auto")
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model_dir)

    def generate(prompt: str) -> Answer:
        clock = _Clock()
        answer = Answer(asked_s=time.perf_counter())
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False, streamer=clock)
        answer.ended_s = time.perf_counter()
        answer.chunk_times_s = clock.token_times_s
        answer.prompt_tokens = inputs.input_ids.shape[1]
        answer.completion_tokens = tokens.shape[1] - answer.prompt_tokens
        answer.text = tokenizer.decode(tokens[0, answer.prompt_tokens :], skip_special_tokens=True)
        return answer

    prompts = prompts_for(options.model_dir, options.prompt_tokens, count=64)
    warm_up = generate(prompts[0])
    answers: list[Answer] = []
    stolen = Stolen()
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < options.min_seconds:
        answers.append(generate(prompts[len(answers) % len(prompts)]))
    run = Run(answers, began_s, ended_s=time.perf_counter(), cut=False, stolen=stolen.share())
    print(json.dumps({"figure": summary(run), "text": warm_up.text}))


if __name__ == "__main__":
    main()
