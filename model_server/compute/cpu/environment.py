"""Environment variables that torch, oneDNN and libgomp read when they are loaded. Imports none of them."""

from __future__ import annotations

from collections.abc import MutableMapping

DEFAULTS = {
    # oneDNN keeps the code it compiles for each shape of a matmul, for 1,024 shapes by default: hundreds of megabytes.
    # Steps are padded to few shapes (`packed_linear.padded`).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "256",
    # Weights in pages of 2 MB: a page fault for each 4 KB took half of the loading time.
    "THP_MEM_ALLOC_ENABLE": "1",
    # Turns of the loop in which an OpenMP thread waits before it sleeps: about 0.4 ms, longer than the pause between
    # two operators. libgomp's default is 300,000, about 10 ms: longer than a scheduler's time slice, so that threads
    # which wait for one that has no core take the core that it needs (ADR 0009).
    "GOMP_SPINCOUNT": "10000",
}


ALLOC_CONF = "pinned_free_catch_all:True"
"""Freeing pinned memory records events. After an error of the GPU that fails, in a destructor, and would abort the
process before its requests have an answer."""


def set_defaults(environ: MutableMapping[str, str]) -> None:
    """Set what the operator has not set; call before torch is imported."""
    for name, value in DEFAULTS.items():
        environ.setdefault(name, value)
    if "PYTORCH_CUDA_ALLOC_CONF" not in environ:  # the older name of the same variable
        environ.setdefault("PYTORCH_ALLOC_CONF", ALLOC_CONF)
