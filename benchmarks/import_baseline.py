"""The baseline of a start: import torch and Transformers' Mistral, and read the weights once.

`start` runs `python -m benchmarks.import_baseline MODEL_DIR` and takes the time to its exit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    import torch  # noqa: F401
    import transformers.models.mistral.modeling_mistral  # noqa: F401

    buffer = bytearray(16 << 20)
    for path in Path(sys.argv[1]).glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    os._exit(0)  # shutting the interpreter down is not part of a start
