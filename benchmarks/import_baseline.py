"""The baseline of a start: import torch and Transformers' Mistral, and read the weights once.

`start` runs `python -m benchmarks.import_baseline MODEL_DIR` and takes the time to its exit.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    began_s = time.perf_counter()
    import torch  # noqa: F401
    import transformers.models.mistral.modeling_mistral  # noqa: F401

    imported_s = time.perf_counter()
    buffer = bytearray(16 << 20)
    for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    print(json.dumps({"imports": imported_s - began_s, "read": time.perf_counter() - imported_s}), flush=True)
    os._exit(0)  # shutting the interpreter down is not part of a start


if __name__ == "__main__":
    main()
