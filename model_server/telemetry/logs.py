"""How log lines look: KServe's format for people, one JSON object a line for programs.

A pure function from KServe's configuration to ours; who logs what is decided where it happens.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: what every record has, then whatever was given as `extra`."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configuration(kserve: dict[str, Any], log_format: str) -> dict[str, Any]:
    """Return a `dictConfig` with our logger beside KServe's, all in the same format."""
    config = copy.deepcopy(kserve)
    config["loggers"]["kserve"]["level"] = "WARNING"  # the rest is about routes that we do not serve
    config["loggers"]["model_server"] = {"handlers": ["kserve"], "level": "INFO", "propagate": False}
    # No access lines: a request has one of its own (`journal.py`), a refusal too, and the rest is probes. They would be
    # written by the event loop, which then waits half a millisecond for the interpreter's lock.
    config["loggers"]["uvicorn.access"]["handlers"] = []
    if log_format == "json":
        config["formatters"] = {name: {"()": JsonFormatter} for name in config["formatters"]}
    return config
