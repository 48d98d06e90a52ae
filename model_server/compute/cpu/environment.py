"""Environment variables that torch, oneDNN and libgomp read at load time. Imports none of these libraries."""

from __future__ import annotations

from collections.abc import MutableMapping

DEFAULTS = {
    # oneDNN caches the code that it compiles for each matmul shape. The default of 1,024 shapes takes hundreds of
    # megabytes; steps are padded to few shapes (`packed_linear.padded`).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "256",
    # Loads weights into pages of 2 MB: page faults of 4 KB took half of the loading time.
    "THP_MEM_ALLOC_ENABLE": "1",
    # How often an OpenMP thread polls before it sleeps. 10,000 polls take about 0.4 ms, longer than the time between
    # two operators. libgomp's default of 300,000 takes about 10 ms, longer than a time slice of the operating system.
    # With that default, waiting threads occupy the core of the thread that they wait for (ADR 0009).
    "GOMP_SPINCOUNT": "10000",
}


ALLOC_CONF = "pinned_free_catch_all:True"
"""Freeing pinned memory records CUDA events. After a GPU error, recording fails in a destructor. Without this option,
the failure would abort the process before its requests are answered."""


def set_defaults(environ: MutableMapping[str, str]) -> None:
    """Set the variables that the operator has not set; call it before torch is imported."""
    for name, value in DEFAULTS.items():
        environ.setdefault(name, value)
    if "PYTORCH_CUDA_ALLOC_CONF" not in environ:  # the older name of the same variable
        environ.setdefault("PYTORCH_ALLOC_CONF", ALLOC_CONF)
