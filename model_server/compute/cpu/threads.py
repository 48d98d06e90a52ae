"""Thread counts on a CPU: the batch and the fallback share the cores.

The fallback computes with one thread. The batch computes with all, less one while the fallback runs: a step waits for
its slowest thread. More OpenMP threads than cores would slow every step down, even while the fallback is idle.
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
    """Sets the number of threads that the batch's and the fallback's threads compute with."""

    def __init__(self) -> None:
        self._total = torch.get_num_threads()
        self._current = 0
        self._fallback_is_set = threading.Event()

    def enter_fallback(self) -> None:
        """Call first in the fallback's thread."""
        _set_num_threads(1)
        self._fallback_is_set.set()

    def enter_batch(self) -> None:
        """Call first in the batch's thread: MKL has one number for the process, and the batch's has to be the last."""
        self._fallback_is_set.wait()

    def before_step(self, fallback_is_running: bool) -> None:
        """Call in the batch's thread before each step."""
        self._use(max(1, self._total - 1) if fallback_is_running else self._total)

    def compile_tasks(self, runner: Runner) -> Iterator[Callable[[], None]]:
        """Yield tasks for the batch's thread, each of which compiles one matmul for one of its thread counts.

        oneDNN compiles a kernel for each number of rows and threads, at the first call in a few milliseconds.
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

    PyTorch initialises a thread's number lazily from the global one, which would overwrite a number set before.
    `get_num_threads` forces the initialisation first (`lazy_init_num_threads`, ATen/Parallel.h).
    """
    torch.get_num_threads()
    torch.set_num_threads(num_threads)


def run_in_short_lived_thread(work: Callable[[], T]) -> T:
    """Return the result of `work`, computed in a thread that ends with it.

    OpenMP keeps a team of threads for every thread that has computed, until that thread ends. With more team threads
    than cores it puts waiting threads to sleep at every barrier. A decode step took 1.3 times as long when the main
    thread had loaded the model.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        return pool.submit(work).result()
