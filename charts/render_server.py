"""Write the server's flags into the chart and the docs; `model_server.settings` is their one declaration.

`python -m charts.render_server` writes the values in `server`, their schema, the server's own defaults, which the
template does not pass to the container, and the table in docs/settings.md. `--check` fails where they differ.
"""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from charts.render_readme import CHART
from model_server.settings import flag_fields

NOTICE = "Generated from model_server/settings.py by `python -m charts.render_server`."
SETTINGS_PAGE = Path(__file__).parent.parent / "docs" / "settings.md"

DEFAULTS: dict[str, Any] = {"drain_seconds": None, "request_timeout_seconds": 300, "log_format": "json"}
"""The defaults that the chart changes."""
PATTERNS = {
    "model_id": r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$",
    "model_revision": r"^[A-Za-z0-9][A-Za-z0-9._/-]*$",
}
"""What the chart demands of a text beyond the server."""
COMMENTS = {
    "model_dir": "Directory with the weights. null: /mnt/models, where KServe puts the weights of `storage.uri`.",
    "model_id": "Hugging Face id that the server itself downloads at every start. It needs an empty `storage.uri`.",
    "model_revision": "Branch, tag or commit of `modelId`.",
    "dtype": "Number format of the weights: auto (float16 on a GPU), float16, bfloat16, float32.",
    "max_model_len": (
        "Maximum length of prompt and completion together, in tokens. An A10G keeps about 45,000 tokens beside the "
        "float16 weights."
    ),
    "fix_chat_template": (
        "Write prompts in Mistral 7B v0.3's own format if the checkpoint's chat template is known to be wrong. "
        "false: always use the checkpoint's template."
    ),
    "max_batch_size": "Sequences that decode in one step. It is also the default of `scaling.target`.",
    "max_queue_size": (
        "Requests that may wait in one replica. The next one gets 429. Knative sends a replica at most "
        "maxBatchSize + maxQueueSize requests at a time (`containerConcurrency`) and holds the others in its "
        "activator until a replica has room."
    ),
    "prefix_caching": (
        "Reuse the KV cache of earlier prompts that begin with the same tokens. A caller can tell from the time to "
        "the first token whether an earlier prompt began in the same way. false: callers cannot learn this."
    ),
    "max_request_bytes": "Largest request body in bytes. A larger one gets 413.",
    "api_key_file": (
        "File with one API key a line, bare or as `name: key`. Set it only for a file that you mount yourself: "
        "`apiKeys` below sets it too."
    ),
    "max_requests_per_key": (
        "Requests that the API keys of one name may have in one replica at once. The next one gets 429. 0: no limit."
    ),
    "drain_seconds": (
        "Seconds that running requests may continue after SIGTERM. null: `requestTimeoutSeconds`, so that scaling "
        "down and rollouts cut no response. An idle server stops at once."
    ),
    "request_timeout_seconds": (
        "Seconds that one request may take in the server. Knative's `timeout` is this plus "
        "`scaling.coldStartSeconds`, so that the server ends a long request before Knative cuts it. 4096 tokens at "
        "25 tokens/s take 165 s."
    ),
    "stall_seconds": (
        "Seconds that one decode step may take. After that the engine counts as dead, and the kubelet restarts the "
        "container."
    ),
    "watchdog_seconds": "Seconds that the event loop may block before the process exits. 0: no limit.",
    "client_stall_seconds": "Seconds that a client may stop reading before the server disconnects it.",
    "cors_origins": "Origins whose pages may call the server. Empty: none.",
    "playground": "Serve the playground at /playground.",
    "log_format": "`json` for log collectors, `text` for people.",
}
"""What values.yaml says of a flag in place of its help."""


def camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.capitalize() for other in others)


def chart_default(name: str) -> Any:
    return DEFAULTS[name] if name in DEFAULTS else server_default(name)


def server_default(name: str) -> Any:
    value = flag_fields()[name].default
    if isinstance(value, tuple):
        return list(value)
    return int(value) if isinstance(value, float) else value


def default_text(name: str) -> str:
    """Return the server's own default as a variable would hold it; empty where it is unset."""
    value = server_default(name)
    if value in (None, []):
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def schema(name: str) -> dict[str, Any]:
    """Return the JSON schema of a flag's value in the chart, where seconds are whole numbers."""
    found: dict[str, Any] = dict(flag_fields()[name].metadata["convert"].schema)
    if found["type"] == "number":
        found |= {"type": "integer", "minimum": math.ceil(found["minimum"])}
    if name in PATTERNS:
        found["pattern"] = PATTERNS[name]
    if chart_default(name) is None:
        found["type"] = [found["type"], "null"]
    return found


def values_block() -> str:
    lines = ["server:", f"  # {NOTICE}"]
    for name, flag in flag_fields().items():
        default, kind = chart_default(name), schema(name)["type"]
        comment = COMMENTS.get(name) or f"{flag.metadata['help'][0].upper()}{flag.metadata['help'][1:]}."
        if default is None:
            comment = f"({'int' if kind[0] == 'integer' else kind[0]}) {comment}"
        wrapped = textwrap.wrap(f"-- {comment}", 115, break_on_hyphens=False, break_long_words=False)
        lines += [f"  # {line}" for line in wrapped]
        lines.append(f"  {camel_case(name)}: {default if isinstance(default, str) else json.dumps(default)}")
    return "\n".join(lines)


def settings_table() -> str:
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for name, flag in flag_fields().items():
        meaning, _, default = flag.metadata["help"].partition("; default: ")
        shown = re.sub(r"(/\S+)", r"`\1`", default) or _shown(flag.default)
        rows.append(f"| `--{name}` | {shown} | {meaning} |")
    return "\n".join(rows)


def _shown(default: Any) -> str:
    if default in (None, ()):
        return "none"
    return f"`{default}`" if isinstance(default, str) else json.dumps(default).removesuffix(".0")


def rendered() -> dict[Path, str]:
    """Return each file with its generated part as it should be."""
    values, json_schema = CHART / "values.yaml", CHART / "values.schema.json"
    whole = json.loads(json_schema.read_text())
    server = whole["properties"]["server"]
    server["required"] = [camel_case(name) for name in flag_fields() if chart_default(name) is not None]
    server["properties"] = {camel_case(name): schema(name) for name in flag_fields()}
    defaults = "\n".join(f"{camel_case(name)}={default_text(name)}" for name in flag_fields())
    begin, end = f"<!-- {NOTICE} -->", "<!-- end of the generated table -->"
    before, _, rest = SETTINGS_PAGE.read_text().partition(begin)
    return {
        values: re.sub(r"(?ms)^server:\n.*?(?=\n\n)", lambda _: values_block(), values.read_text(), count=1),
        json_schema: json.dumps(whole, indent=2, ensure_ascii=False) + "\n",
        CHART / "templates" / "_defaults.tpl": (
            f'{{{{/* {NOTICE} */}}}}\n{{{{- define "mistral.serverDefaults" -}}}}\n{defaults}\n{{{{- end }}}}\n'
        ),
        SETTINGS_PAGE: f"{before}{begin}\n{settings_table()}\n{end}{rest.partition(end)[2]}",
    }


def differing() -> list[Path]:
    return [path for path, text in rendered().items() if not path.exists() or path.read_text() != text]


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        if paths := differing():
            sys.exit(f"{', '.join(map(str, paths))}: run `python -m charts.render_server`.")
        return
    for path, text in rendered().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
