"""What an accelerator waits for between two decode steps: this server with a clock for a device.

    python -m benchmarks.clock_device                      32 streams, steps of 24 ms (an A10G) and of 6 (an H100)

A step is ready a fixed time after it was launched and computes nothing; its tokens come from logits drawn once. All
else is real: HTTP, the engine, sampling, text. Steps are launched after the last one's tokens were read and told, as on
a CPU, and before, as on an accelerator, in turn. It shows the host's part alone, and needs a second core for clients.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import uvloop
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import MistralForCausalLM

from benchmarks import report
from benchmarks.contenders import OURS, SERVERS
from benchmarks.figures import Figure, ratios, spread, summary
from benchmarks.models import checkpoint
from benchmarks.process import START_LIMIT_S, Program, free_port, stop_children_on_sigterm
from benchmarks.prompts import prompts_for
from benchmarks.streams import stream_in_closed_loop
from model_server.compute.kv_cache.base import KVCache, TokenRange
from model_server.compute.runner import Runner

AFTER, AHEAD = "after the last was read", "before"
LOOKS = {Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.numpy, Tensor.cpu}


class Pending(torch.Tensor):
    """A tensor that is waited for by whoever looks into it; what is computed from it has to be waited for as well."""

    ready_s: float

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ready_s = max(each.ready_s for each in tree_leaves((args, kwargs)) if isinstance(each, Pending))
        with torch._C.DisableTorchFunctionSubclass():
            if func in LOOKS:
                time.sleep(max(0.0, ready_s - time.perf_counter()))
                return func(*args, **(kwargs or {}))
            return tree_map_only(Tensor, lambda found: pending(found, ready_s), func(*args, **(kwargs or {})))


def pending(tensor: Tensor, ready_s: float) -> Pending:
    later = tensor.as_subclass(Pending)
    later.ready_s = ready_s
    return later


class ClockRunner(Runner):
    """A runner whose steps take a fixed time, one after the other.

    `waits_s` has how long each decode step was waited for by its device: not at all if it was launched in time.
    """

    def __init__(self, model: MistralForCausalLM, kv_cache: KVCache, *, step_s: float, ahead: bool) -> None:
        super().__init__(model, kv_cache)
        self.is_async = ahead
        self.waits_s: list[float] = []
        self._step_s = step_s
        self._ready_s: float | None = None
        self._logits = torch.randn((64, model.config.vocab_size), generator=torch.Generator().manual_seed(0))

    def forward(
        self,
        decode: Sequence[TokenRange],
        prefill: Sequence[TokenRange],
        wanted: Sequence[int],
        tokens: Tensor | None = None,
    ) -> Tensor:
        self.kv_cache.step(decode, prefill)  # what a launch needs is made
        now_s = time.perf_counter()
        if self._ready_s is not None and decode and not prefill:
            self.waits_s.append(max(0.0, now_s - self._ready_s))
        self._ready_s = max(now_s, self._ready_s or 0) + self._step_s
        return pending(self._logits[: len(wanted)], self._ready_s)

    def compilations(self) -> list[Callable[[], None]]:
        return []


def serve(model_dir: str, port: str, step_s: float, ahead: bool) -> None:
    """Be the server; at its end print how long the device waited."""
    import model_server.model
    from model_server.__main__ import serve as serve_model

    torch.set_num_threads(1)  # sampling is the device's work: a second thread for it would have to be woken
    runners: list[ClockRunner] = []

    def make(*args: Any) -> ClockRunner:
        runners.append(ClockRunner(*args, step_s=step_s, ahead=ahead))
        return runners[0]

    model_server.model.Runner = make  # type: ignore[assignment, misc]
    serve_model(["--model_dir", model_dir, "--http_port", port, "--model_name", "bench"], os.environ)
    print(json.dumps({"waits_s": runners[0].waits_s}), flush=True)


def measure(model_dir: Path, *, step_s: float, ahead: bool, clients: int, seconds: float) -> Figure:
    """Return what the clients got, and the median of the device's waits."""
    port = free_port()
    target = SERVERS[OURS].target(model_dir, port, 64)
    prompts = prompts_for(model_dir, 64, count=1024)
    command = [sys.executable, "-m", "benchmarks.clock_device", "--serve", str(model_dir), str(port)]
    with Program([*command, str(step_s), AHEAD if ahead else AFTER]) as server:
        server.wait_until_ready(port, SERVERS[OURS].ready_path, START_LIMIT_S)
        load = functools.partial(stream_in_closed_loop, target, prompts, clients=clients, limit_s=60)
        run = uvloop.run(load(min_seconds=seconds))
        os.kill(server.pid, signal.SIGTERM)
        server.wait_for_exit(60)
        waits_s = json.loads(server.log().splitlines()[-1])["waits_s"]
    return {**summary(run), "device_waits_s": spread(waits_s)["median"]}


def compare(model_dir: Path, *, steps_ms: Sequence[float], clients: int, repeats: int, seconds: float) -> list[Figure]:
    figures: list[Figure] = []
    for step_ms in steps_ms:
        measured: dict[bool, list[Figure]] = {False: [], True: []}
        for repeat, ahead in itertools.product(range(repeats), measured):
            launched = AHEAD if ahead else AFTER
            report.progress.print(
                f"clock device: {step_ms:g} ms, launched {launched}, repeat {repeat + 1} of {repeats}"
            )
            measured[ahead].append(
                measure(model_dir, step_s=step_ms / 1000, ahead=ahead, clients=clients, seconds=seconds)
            )
        rates = {ahead: [f["output_tokens_per_s"] for f in of] for ahead, of in measured.items()}
        figures += [
            {
                "benchmark": "clock device",
                "step_ms": step_ms,
                "clients": clients,
                "launched": AHEAD if ahead else AFTER,
                "errors": sum(figure["errors"] for figure in of),
                "device_waits_s": spread(figure["device_waits_s"] for figure in of),
                "output_tokens_per_s": spread(rates[ahead]),
                "of_launched_after": ratios(rates[ahead], rates[False]),
            }
            for ahead, of in measured.items()
        ]
    return figures


def card(figures: Sequence[Figure]) -> None:
    report.table(
        "Between two decode steps: medians (least-most)",
        ["step ms", "clients", "launched", "device waits ms", "tokens/s", "x after", "errors"],
        [
            [
                f"{f['step_ms']:g}",
                str(f["clients"]),
                f["launched"],
                report.measured(f["device_waits_s"], scale=1000, digits=2),
                report.measured(f["output_tokens_per_s"]),
                report.measured(f["of_launched_after"], digits=2),
                str(f["errors"]),
            ]
            for f in figures
        ],
    )


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        model_dir, port, step_s, launched = sys.argv[2:]
        del sys.argv[1:]  # KServe reads the command line when it is imported
        serve(model_dir, port, float(step_s), launched == AHEAD)
        os._exit(0)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clock_device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--steps-ms", type=_numbers, default=(24.0, 6.0))
    add("--clients", type=int, default=32)
    add("--repeats", type=int, default=3)
    add("--seconds", type=float, default=3)
    options = parser.parse_args()
    stop_children_on_sigterm()
    report.announce(report.machine())
    figures = compare(
        checkpoint("100m", "bfloat16"),
        steps_ms=options.steps_ms,
        clients=options.clients,
        repeats=options.repeats,
        seconds=options.seconds,
    )
    card(figures)
    report.print_json_lines(figures)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    main()
