"""The format of log lines: KServe's text, or one JSON object a line."""

from __future__ import annotations

import copy
import json
import logging
import time
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object: the standard fields, then those of `extra`."""

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
    """Return KServe's `dictConfig` with this server's logger added, all in the same format."""
    config = copy.deepcopy(kserve)
    config["loggers"]["kserve"]["level"] = "WARNING"  # its other lines are about routes that are not served
    config["loggers"]["model_server"] = {"handlers": ["kserve"], "level": "INFO", "propagate": False}
    # No access log: every request has a line in the request log, and the rest is probes. Writing a line makes the event
    # loop wait half a millisecond for the interpreter's lock.
    config["loggers"]["uvicorn.access"]["handlers"] = []
    if log_format == "json":
        config["formatters"] = {name: {"()": JsonFormatter} for name in config["formatters"]}
    return config
