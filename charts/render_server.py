"""Write the server's flags into the chart and the docs; `model_server.settings` is their one declaration.

`python -m charts.render_server` writes the values in `server`, their schema, the list that the template passes to the
container, and the table in docs/settings.md. `--check` fails where they differ.
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
    "model_dir": ("Directory with the weights. null: /mnt/models, where KServe puts what `storage.uri` names."),
    "model_id": ("Hugging Face id that the server itself downloads at every start; needs an empty `storage.uri`."),
    "model_revision": ("Branch, tag or commit of `modelId`."),
    "dtype": ("Number format of the weights: auto (float16 on a GPU), float16, bfloat16, float32."),
    "max_model_len": (
        "Prompt and answer together, in tokens. An A10G keeps about 45,000 tokens beside the float16 weights."
    ),
    "fix_chat_template": (
        "Write prompts in Mistral 7B v0.3's own format where the checkpoint's chat template is known to miss it. "
        "false: use the checkpoint's template whatever it is."
    ),
    "max_batch_size": (
        "Sequences decoded together. It is also the default of `scaling.target`: one more request and some of "
        "them wait."
    ),
    "max_queue_size": (
        "Requests that may wait in one replica; one more is answered 429. A replica is given at most "
        "maxBatchSize + maxQueueSize requests at a time (`containerConcurrency`), so everything Knative lets "
        "in has a place, and what has none waits in Knative's activator, which hands it to the first replica "
        "with room, a new one included."
    ),
    "prefix_caching": (
        "Read what prompts have in common once, and keep it until its memory is needed. Who may call can tell "
        "from the time to the first token whether a prompt began like an earlier one; false where callers "
        "must not learn that of each other."
    ),
    "max_request_bytes": ("Largest request body in bytes; more is answered 413."),
    "api_key_file": (
        "File with one API key a line, bare or as `name: key`, for keys that something else mounts; `apiKeys` below "
        "sets it by itself."
    ),
    "max_requests_per_key": (
        "Requests that the API keys of one name may have in one replica at once; one more is answered 429. 0: any "
        "number."
    ),
    "drain_seconds": (
        "Seconds that running requests may go on after SIGTERM. null: `requestTimeoutSeconds`, so that "
        "scaling down or a rollout cuts no answer. An idle server stops at once whatever this says."
    ),
    "request_timeout_seconds": (
        "Seconds one request may take in the server. The InferenceService's `timeout`, Knative's cut, is this "
        "plus `scaling.coldStartSeconds`, so that the server's own, clean ending comes first. 4096 tokens at "
        "25 tokens/s take 165 s."
    ),
    "stall_seconds": (
        "Seconds one decode step may take before the engine counts as dead and the kubelet restarts the container."
    ),
    "client_stall_seconds": ("Seconds a client may stop reading before it is given up."),
    "cors_origins": ("Origins whose pages may call the server; none by default."),
    "playground": ("Serve the page to try the model at /playground."),
    "log_format": ("`json` for log collectors, `text` for people."),
}
"""What values.yaml says of a flag in place of its help."""


def camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.capitalize() for other in others)


def chart_default(name: str) -> Any:
    value = DEFAULTS.get(name, flag_fields()[name].default)
    if isinstance(value, tuple):
        return list(value)
    return int(value) if isinstance(value, float) else value


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
    flags = "\n".join(map(camel_case, flag_fields()))
    begin, end = f"<!-- {NOTICE} -->", "<!-- end of the generated table -->"
    before, _, rest = SETTINGS_PAGE.read_text().partition(begin)
    return {
        values: re.sub(r"(?ms)^server:\n.*?(?=\n\n)", lambda _: values_block(), values.read_text(), count=1),
        json_schema: json.dumps(whole, indent=2, ensure_ascii=False) + "\n",
        CHART / "templates" / "_flags.tpl": (
            f'{{{{/* {NOTICE} */}}}}\n{{{{- define "mistral.serverFlags" -}}}}\n{flags}\n{{{{- end }}}}\n'
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
