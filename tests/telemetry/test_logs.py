"""Log lines: one JSON object each, with what was said beside the message."""

import json
import logging

from kserve.logging import KSERVE_LOG_CONFIG

from model_server.telemetry.logs import JsonFormatter, configuration


def test_line_is_one_json_object_with_its_extras():
    record = logging.makeLogRecord(
        {
            "name": "model_server.api.http.middleware",
            "levelname": "INFO",
            "msg": "%s\nended",
            "args": ("r1",),
            "tokens": 3,
        }
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["message"], told["level"], told["tokens"]) == ("r1\nended", "INFO", 3)
    assert told["time"].endswith("Z")


def test_traceback_is_a_field_of_the_line():
    try:
        raise ZeroDivisionError
    except ZeroDivisionError as error:
        record = logging.makeLogRecord({"exc_info": (type(error), error, error.__traceback__)})
    assert "ZeroDivisionError" in json.loads(JsonFormatter().format(record))["traceback"]


def test_every_line_is_json_when_json_is_asked_for():
    formatters = configuration(KSERVE_LOG_CONFIG, "json")["formatters"]
    assert {formatter["()"] for formatter in formatters.values()} == {JsonFormatter}


def test_text_is_the_format_of_kserve():
    config = configuration(KSERVE_LOG_CONFIG, "text")
    assert config["formatters"] == KSERVE_LOG_CONFIG["formatters"]
    assert "model_server" in config["loggers"]
    assert "model_server" not in KSERVE_LOG_CONFIG["loggers"]
