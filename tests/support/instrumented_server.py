"""The real server, started by its `__main__`, which also counts its asyncio tasks.

On SIGUSR1, it writes the number to the file that TASKS_FILE names. Other processes cannot count its tasks.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from model_server.__main__ import main


def count_tasks(signum: int, frame: FrameType | None) -> None:
    file = Path(os.environ["TASKS_FILE"])
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(str(len(asyncio.all_tasks())))
    os.replace(unfinished, file)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, count_tasks)
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
