"""OpenMP threads on a CPU: how many a thread computes with, and none left behind by loading."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def set_num_threads(num_threads: int) -> None:
    """Let the calling thread compute with so many threads.

    PyTorch initialises a thread's count lazily, from the last count that any thread set, and over a count that the
    thread itself set before. `get_num_threads` forces that initialisation first (ATen/Parallel.h).
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
