"""A benchmark run with small real processes: order, failure, suspension, clean-up, and the results file."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import __main__ as command
from benchmarks import report, roofline, serve, start, systems
from benchmarks.checkpoint import checkpoint, prompts_for
from benchmarks.gguf_file import gguf_file
from benchmarks.one_at_a_time import make_server
from benchmarks.process import Program, ProgramFailed
from benchmarks.serve import Plan, SuspendedSystem
from benchmarks.systems import OURS, System

V1 = "/v1/models/bench:predict"
SERVER = [sys.executable, "-m", "tests.support.counting_server", "{port}"]
SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
PLAN = Plan(systems=(OURS, "other", "broken"), clients=(1, 2), repeats=2, max_new_tokens=4, min_seconds=0, limit_s=20)
SYSTEMS = {
    OURS: System(tuple(SERVER), "/ready", V1),
    "other": System(tuple(SERVER), "/ready", V1),
    "broken": System((sys.executable, "-c", "exit('no weights here')"), "/ready", V1),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("tiny", "float32", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def small_systems(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, System]:
    monkeypatch.setattr(serve, "SYSTEMS", SYSTEMS)
    monkeypatch.setattr(systems, "START_LIMIT_S", 60)
    return SYSTEMS


@pytest.mark.usefixtures("small_systems")
def test_systems_are_measured_in_turn_and_a_failed_start_is_a_figure(tiny: Path, tmp_path: Path) -> None:
    figures = serve.compare_systems(tiny, PLAN)
    measured = {(f["system"], f["clients"]): f for f in figures if "repeats" in f}
    assert [*measured] == [(OURS, 1), (OURS, 2), ("other", 1), ("other", 2)]
    assert all(f["errors"] == 0 and f["requests"] >= f["clients"] * 2 for f in measured.values())
    assert [f["system"] for f in figures if "failed" in f] == ["broken"]
    assert [(f["to"], f["clients"]) for f in figures if "ratio" in f] == [("other", 1), ("other", 2)]

    path = report.write(
        {**report.machine(), "date": "2025-01-31", "cpu": "AMD EPYC(tm)", "cores": 2}, figures, tmp_path
    )
    assert path.name.startswith("2025-01-31-")
    assert len(json.loads(path.read_text())["figures"]) == len(figures)


def test_a_server_is_suspended_between_loads_and_keeps_its_process(tiny: Path) -> None:
    system = SuspendedSystem(SYSTEMS[OURS], tiny, PLAN)
    one, two = PLAN.points()
    try:
        system.measure(one)
        server = system._server
        assert server is not None
        os.waitid(os.P_PID, server.program.pid, os.WSTOPPED | os.WNOWAIT)
        assert system.measure(two)["errors"] == 0
        assert system._server is server
    finally:
        system.close()


def test_a_running_server_is_loaded_by_its_url(tiny: Path) -> None:
    [prompt] = prompts_for(tiny, num_tokens=8, count=1)
    with systems.serving(SYSTEMS[OURS], tiny, prompt, max_new_tokens=4) as server:
        figures = serve.load_server(server.target, tiny, PLAN)

    assert [(f["system"], f["clients"], f["errors"]) for f in figures] == [(server.target.url, n, 0) for n in (1, 2)]


def test_a_cold_start_is_timed_to_its_first_token(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "SYSTEMS", SYSTEMS)
    figure = start._start(tiny, OURS, {"cache": "cold"})

    assert 0 < figure["ready_s"] < figure["first_token_s"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["latency"], "'latency' is not one of serve, start, roofline."),
        (["serve", "--systems", "ours,trus"], "'trus' is not one of ours, transformers-cb, truss-1, vllm, llama-cpp."),
        (["--url", "http://host/v1/completions"], "--url needs --tokenizer."),
    ],
)
def test_misuse_is_one_sentence(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert sentence in capsys.readouterr().err


def test_a_program_ends_with_its_block_and_says_why_it_failed() -> None:
    with pytest.raises(RuntimeError, match="ours"), Program(SLEEPER) as program:
        raise RuntimeError("ours")
    assert not program.running
    with (
        pytest.raises(ProgramFailed, match=r"(?s)exited with 3.*no weights"),
        Program([sys.executable, "-c", "print('no weights'); exit(3)"]) as program,
    ):
        program.wait_until_ready(1, "/ready", limit_s=60)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_programs_do_not_outlive_a_killed_benchmark(signum: signal.Signals) -> None:
    code = (
        "from benchmarks.process import Program\n"
        "import sys, time\n"
        f"with Program({SLEEPER!r}) as program:\n"
        "    print(program.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        child = os.pidfd_open(int(benchmark.stdout.readline()))
        try:
            benchmark.send_signal(signum)
            benchmark.wait(timeout=60)
            assert select.select([child], [], [], 60)[0] == [child]  # readable: it has ended
        finally:
            os.close(child)


def test_the_machine_is_described_with_its_versions() -> None:
    described = report.machine()
    assert torch.__version__.startswith(described["torch"])  # PyPI's wheel adds the CUDA version: 2.13.0+cu130
    assert described.keys() >= {"cpu", "cores", "memory_gib", "transformers", "kserve", "commit", "date"}


def test_phases_are_read_from_the_servers_log() -> None:
    log = "2025-01-01 INFO start: imports 1.92 s (total 1.92 s)\nstart: first token 3 s (total 5.8 s)\nrestart: never\n"
    assert start.logged_phases(log) == {"imports": 1.92, "first token": 3.0}


def test_prompts_and_answers_have_exactly_the_requested_length(tiny: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    [prompt] = prompts_for(tiny, num_tokens=9, count=1)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=20)[0, 9:]
    assert inputs.input_ids.shape[1] == 9
    assert len(tokenizer.decode(tokens, skip_special_tokens=True).split()) == len(tokens) == 20


def test_a_gguf_file_has_the_checkpoints_words_and_weights(tiny: Path) -> None:
    file = GGUFReader(gguf_file(tiny))
    words = Tokenizer.from_file(str(tiny / "tokenizer.json")).get_vocab()
    tokens = file.fields["tokenizer.ggml.tokens"].contents()
    assert {token: number for number, token in enumerate(tokens)} == words

    weights = {tensor.name: torch.tensor(tensor.data) for tensor in file.tensors}
    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    assert len(weights) == len(model.state_dict())
    layer = model.model.layers[1]
    assert torch.equal(weights["blk.1.ffn_down.weight"], layer.mlp.down_proj.weight)
    # The two halves of a head's rotary pairs become neighbours.
    head, stored = layer.self_attn.k_proj.weight[:16], weights["blk.1.attn_k.weight"][:16]
    assert torch.equal(stored[::2], head[:8])
    assert torch.equal(stored[1::2], head[8:])


def test_a_system_that_is_not_installed_is_left_out_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(systems, "SYSTEMS", {**SYSTEMS, "vllm": System(("/nowhere/vllm", "serve"), "/health", V1)})
    assert systems.installed([OURS, "vllm"]) == [OURS]
    assert capsys.readouterr().err == "vllm is not measured: there is no program /nowhere/vllm.\n"


def test_the_memory_of_child_processes_is_counted() -> None:
    child = "import sys, time; block = b'1' * (200 << 20); print('ready', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with Program([sys.executable, "-c", parent]) as program:
        while "ready" not in program.log():
            assert program.running
        assert program.peak_memory_bytes() > 200 << 20


def test_the_server_of_one_request_at_a_time_streams_and_counts_all_tokens(tiny: Path) -> None:
    with make_server(str(tiny), 0) as server:
        Thread(target=server.handle_request).start()
        body = {"prompt": "baba bebe", "max_new_tokens": 6}
        response = httpx.post(f"http://127.0.0.1:{server.server_port}{V1}", json=body, timeout=60)

    *texts, last = [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line]
    assert len("".join(event["text"] for event in texts).split()) == 6
    assert last["completion_tokens"] == 6


def test_the_roofline_counts_the_bytes_that_a_step_must_read() -> None:
    bandwidth, decode, *_ = roofline.measure("tiny")
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
    weight_bytes = 2 * (2 * layer + 64 + 256 * 64)
    kv_bytes = 2 * 2 * 2 * 2 * 16 * (64 + 1)
    gb_per_s = max(bandwidth["read_gb_per_s"], bandwidth["copy_gb_per_s"])
    allowed = 1e9 * gb_per_s / (weight_bytes + kv_bytes)
    assert decode["of_bandwidth"] == pytest.approx(decode["tokens_per_s"]["median"] / allowed, rel=0.05)


def test_a_table_has_the_names_of_the_figures() -> None:
    rate = {"median": 41.21, "min": 34.0, "max": 42.0}
    figures = [
        {"benchmark": "serve", "system": "ours", "clients": 1, "output_tokens_per_s": rate},
        {"benchmark": "serve", "of": "ours", "to": "vllm", "clients": 1, "ratio": {"output_tokens_per_s": rate}},
        {"benchmark": "serve", "system": "vllm", "failed": "Exited with 1."},
    ]
    measured, ratios = report.tables(figures).split("serve, ratios")
    assert [cell.strip() for cell in measured.splitlines()[2].split("|")[1:-1]] == [
        "system",
        "clients",
        "output_tokens_per_s",
        "failed",
    ]
    assert "41.2 (34-42)" in measured
    assert "| ours | vllm | 1 " in ratios
