"""Thread counts on a CPU: the batch and the fallback share the cores.

The fallback computes with one thread. The batch computes with all threads, and with one fewer while the fallback runs:
a step waits for its slowest thread. More OpenMP threads than cores slow every step down, even while the fallback is
idle.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from model_server.compute.runner import Runner

T = TypeVar("T")


class ThreadCounts:
    """Sets the numbers of OpenMP threads of the batch thread and the fallback thread."""

    def __init__(self) -> None:
        self._total = torch.get_num_threads()
        self._current = 0
        self._fallback_is_set = threading.Event()

    def enter_fallback(self) -> None:
        """Set the fallback's number of threads; call it first in the fallback thread."""
        _set_num_threads(1)
        self._fallback_is_set.set()

    def enter_batch(self) -> None:
        """Wait for `enter_fallback`; call it first in the batch thread.

        MKL has one number of threads for the whole process, so the batch must set its number last.
        """
        self._fallback_is_set.wait()

    def before_step(self, fallback_is_running: bool) -> None:
        """Set the batch's number of threads; call it in the batch thread before each step."""
        self._use(max(1, self._total - 1) if fallback_is_running else self._total)

    def compile_tasks(self, runner: Runner) -> Iterator[Callable[[], None]]:
        """Yield tasks for the batch thread; each compiles one matmul for one number of threads.

        oneDNN compiles a kernel at the first call with each number of rows and threads, in a few milliseconds.
        """
        for num_threads in sorted({self._total, max(1, self._total - 1)}, reverse=True):
            for compile_matmul in runner.compilations():
                yield functools.partial(self._compile, num_threads, compile_matmul)

    def _compile(self, num_threads: int, compile_matmul: Callable[[], None]) -> None:
        self._use(num_threads)
        compile_matmul()

    def _use(self, num_threads: int) -> None:
        if num_threads != self._current:
            self._current = num_threads
            _set_num_threads(num_threads)


def _set_num_threads(num_threads: int) -> None:
    """Set the calling thread's number of OpenMP threads.

    PyTorch initialises the number of each thread lazily from the global number, which would overwrite an earlier
    setting. `get_num_threads` forces the initialisation (`lazy_init_num_threads`, ATen/Parallel.h).
    """
    torch.get_num_threads()
    torch.set_num_threads(num_threads)


def run_in_short_lived_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends afterwards, and return its result.

    OpenMP keeps a team of threads for every thread that has computed, until that thread ends. If the teams have more
    threads than there are cores, OpenMP puts waiting threads to sleep at every barrier. A decode step took 1.3 times as
    long when the main thread had loaded the model.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        return pool.submit(work).result()
