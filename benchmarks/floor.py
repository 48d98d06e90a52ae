"""The least a start can take: import torch and Transformers' Mistral, and read the weights once.

`start` runs `python -m benchmarks.floor MODEL_DIR` and takes the time to its exit; it prints its two parts. The bytes
go into one small buffer; with `--held` into memory that stays, as a server's weights do: new memory can cost more than
reading a cached file.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from pathlib import Path

BUFFER_BYTES = 16 << 20


def main() -> None:
    began_s = time.perf_counter()
    import torch  # noqa: F401
    import transformers.models.mistral.modeling_mistral  # noqa: F401

    imported_s = time.perf_counter()
    *held, model_dir = sys.argv[1:]
    buffer, kept = mmap.mmap(-1, BUFFER_BYTES), []
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                if held:
                    kept.append(buffer)
                    buffer = mmap.mmap(-1, BUFFER_BYTES)
    phases = {"imports": imported_s - began_s, "read": time.perf_counter() - imported_s}
    print(json.dumps(phases), flush=True)
    os._exit(0)  # taking the interpreter down is no part of a start


if __name__ == "__main__":
    main()
