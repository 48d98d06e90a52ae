"""The server, composed by its own `__main__`, that also tells how many asyncio tasks it has.

    python -m benchmarks.promises.watched FILE --model_dir ...      SIGUSR1 writes the number into FILE

Tasks cannot be counted from outside a process, and a count has no place in the server.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from model_server.__main__ import main


def watch(file: Path) -> None:
    def count(signum: int, frame: FrameType | None) -> None:
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(str(len(asyncio.all_tasks())))
        os.replace(unfinished, file)

    signal.signal(signal.SIGUSR1, count)


if __name__ == "__main__":
    watch(Path(sys.argv.pop(1)))
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
