"""The server's settings: one frozen `Settings`, built once from the command line and the environment.

Owns the flags, their defaults and their bounds. A bad value stops the start with one sentence that names the key, the
value and what is allowed. Values that depend on the model are resolved in `loading.weights`.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from model_server.errors import StartupError
from model_server.flag_types import boolean, filesystem_path, integer, nonempty, one_of, origin_list, seconds

PREFIX = "MISTRAL_"
CLIENT_VARIABLES = frozenset({"MISTRAL_API_KEY", "MISTRAL_URL"})
"""Settings of the `mistral` command, which a shell may export as well."""
SERVICE_LINK = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
"""Variables that Kubernetes injects for every Service of the namespace; a Service `mistral-7b` has this prefix too."""

MOUNTED_MODEL = Path("/mnt/models")
"""Where KServe's storage initializer puts the model."""


def flag(convert: Callable[[str], Any], default: Any, help: str) -> Any:
    """Declare a flag: a `Settings` field with its converter and its help."""
    return field(default=default, metadata={"convert": convert, "help": help})


@dataclass(frozen=True)
class Settings:
    """All settings; they do not change after the start."""

    model_dir: Path | None = flag(  # noqa: RUF009 - a dataclass field, as `field` itself
        filesystem_path,
        None,
        "directory with the model's Hugging Face files; default: /mnt/models when it exists",
    )
    model_id: str | None = flag(
        nonempty,
        None,
        "Hugging Face id, used when there is no model directory; HF_TOKEN is the token, HF_HOME the cache",
    )
    model_revision: str | None = flag(nonempty, None, "branch, tag or commit of --model_id")
    dtype: str = flag(
        one_of("auto", "float16", "bfloat16", "float32"),
        "auto",
        "number format of the weights; auto is float16 on CUDA, and on a CPU bfloat16 where it is native, else float32",
    )
    max_model_len: int = flag(
        integer(2, 1_048_576),
        4096,
        "maximum length of prompt and completion together, in tokens; the default is lowered to the model's limit",
    )
    fix_chat_template: bool = flag(
        boolean,
        True,
        "write prompts in Mistral 7B v0.3's own format if the checkpoint's chat template is known to be wrong",
    )
    max_batch_size: int = flag(integer(1, 1024), 32, "sequences that decode in one step")
    max_queue_size: int = flag(integer(0, 1_000_000), 128, "requests that may wait; the next one gets 429")
    max_prefill_tokens: int = flag(
        integer(0, 65_536),
        0,
        "maximum number of prompt tokens in a step; 0: 128 on a CPU, 512 on a GPU, 2048 on Hopper and later GPUs",
    )
    prefix_caching: bool = flag(boolean, True, "reuse the KV cache of earlier prompts that begin with the same tokens")
    max_request_bytes: int = flag(integer(1, 2**31), 2**20, "largest request body in bytes; a larger one gets 413")
    api_key_file: Path | None = flag(  # noqa: RUF009
        filesystem_path,
        None,
        "file with one API key a line, bare or as `name: key`, read again when it changes; without it no key is needed",
    )
    max_requests_per_key: int = flag(
        integer(0, 1_000_000),
        0,
        "requests that the keys of one name may have at once; the next one gets 429; 0: no limit",
    )
    drain_seconds: float = flag(seconds(0), 30.0, "seconds that running requests may continue after SIGTERM")
    request_timeout_seconds: float = flag(seconds(0.001), 600.0, "seconds that one request may take, queueing included")
    stall_seconds: float = flag(
        seconds(0.001), 120.0, "seconds that one step may take before the engine counts as dead"
    )
    watchdog_seconds: int = flag(
        integer(0, 86_400), 50, "seconds that the event loop may block before the process exits; 0: no limit"
    )
    client_stall_seconds: float = flag(
        seconds(0.001), 30.0, "seconds that a client may stop reading, or stop sending a request"
    )
    cors_origins: tuple[str, ...] = flag(
        origin_list, (), "origins whose pages may call the server, separated by commas; * allows all"
    )
    playground: bool = flag(boolean, True, "serve the playground at /playground")
    log_format: str = flag(one_of("text", "json"), "text", "text: KServe's format; json: one object a line")

    model_name: str = "mistral-7b"
    """The name in the routes: --model_name, else INFERENCE_SERVICE_NAME, else mistral-7b."""
    http_port: int = 8080
    """--http_port, else PORT (Knative injects it), else 8080."""
    given: frozenset[str] = frozenset()
    """The fields that were set: where a default would be adapted to the model, these are refused."""
    model_dir_appears_late: bool = False
    """The model directory is linked by a modelcar (`oci://`), perhaps after this process has started."""
    kserve: argparse.Namespace = field(default_factory=argparse.Namespace)
    """The values of KServe's own flags."""

    @classmethod
    def parse(cls, argv: Sequence[str], environ: Mapping[str, str], kserve_parser: argparse.ArgumentParser) -> Settings:
        """Read the flags, and the environment for settings without a flag.

        Raises:
            StartupError: a flag or variable is unknown, or its value is not allowed.
        """
        namespace = vars(_read_flags(argv, kserve_parser))
        flags = {name: namespace.pop(name) for name in list(namespace) if name in flag_fields()}
        chosen = {**_read_environment(environ), **flags}
        if "model_revision" in chosen and "model_id" not in chosen:
            raise StartupError("--model_revision belongs to --model_id, which is not set.")
        if chosen.get("max_requests_per_key") and "api_key_file" not in chosen:
            raise StartupError("--max_requests_per_key belongs to --api_key_file, which is not set.")
        given = frozenset(chosen)
        # KServe sets it where a sidecar provides the model: the link may be made after this process has started.
        async_mount = environ.get("MODEL_INIT_MODE") == "async"
        if "model_dir" not in given and (MOUNTED_MODEL.is_dir() or (async_mount and "model_id" not in given)):
            chosen["model_dir"] = MOUNTED_MODEL
        kserve = argparse.Namespace(**namespace)
        _check_kserve(kserve)
        return cls(
            **chosen,
            model_name=_model_name(kserve, environ),
            http_port=_http_port(kserve, environ),
            given=given,
            model_dir_appears_late=async_mount and chosen.get("model_dir") == MOUNTED_MODEL,
            kserve=kserve,
        )


def flag_fields() -> dict[str, Field[Any]]:
    """Return the fields that are flags, in the order of the documentation."""
    return {f.name: f for f in fields(Settings) if "convert" in f.metadata}


class _Parser(argparse.ArgumentParser):
    """Raises `StartupError` instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        # KServe converts booleans with a lambda, and argparse would show that name.
        message = message.replace("invalid <lambda> value:", "must be true or false, not")
        raise StartupError(f"{message.removeprefix('argument ').rstrip('.')}.")


def _read_flags(argv: Sequence[str], kserve_parser: argparse.ArgumentParser) -> argparse.Namespace:
    parent = copy.deepcopy(kserve_parser)  # a child parser would share its actions and change their defaults
    parent.set_defaults(model_name=None, http_port=None, enable_grpc=False)
    parser = _Parser(prog="python -m model_server", parents=[parent], allow_abbrev=False)
    ours = parser.add_argument_group("model server", f"each also by environment variable {PREFIX}<FLAG>")
    for name, f in flag_fields().items():
        ours.add_argument(f"--{name}", type=f.metadata["convert"], default=argparse.SUPPRESS, help=f.metadata["help"])
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise StartupError(f"{unknown[0]} is not a flag of this server{_nearest(unknown[0], known)}")
    return namespace


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the converted values of the `MISTRAL_` variables; an empty variable counts as unset."""
    chosen = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable in CLIENT_VARIABLES or SERVICE_LINK.fullmatch(variable):
            continue
        name = variable.removeprefix(PREFIX).lower()
        flag = flag_fields().get(name)
        if flag is None or variable != variable.upper():
            known = [PREFIX + name.upper() for name in flag_fields()]
            raise StartupError(f"{variable} is not a setting of this server{_nearest(variable, known)}")
        if text:
            try:
                chosen[name] = flag.metadata["convert"](text)
            except argparse.ArgumentTypeError as error:
                raise StartupError(f"{variable}: {error}.") from None
    return chosen


def _nearest(word: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(word.split("=")[0], known, n=1)
    return f"; did you mean {matches[0]}?" if matches else "; --help lists them all."


def _check_kserve(kserve: argparse.Namespace) -> None:
    """Refuse KServe's flags that this server does not support."""
    if kserve.workers != 1:
        raise StartupError(f"--workers must be 1, not {kserve.workers}: one process serves one model; use replicas.")
    if kserve.enable_grpc:
        raise StartupError("--enable_grpc must be false: this server speaks HTTP only.")
    for name in ("ssl_certfile", "ssl_keyfile", "log_config_file"):
        file = getattr(kserve, name)
        if file is not None and not Path(file).is_file():
            raise StartupError(f"--{name}: there is no file {file}.")
    if kserve.access_log_format is not None:
        raise StartupError("--access_log_format is not supported: use --log_config_file or --log_format.")


def _model_name(kserve: argparse.Namespace, environ: Mapping[str, str]) -> str:
    for key, name in (
        ("--model_name", kserve.model_name),
        ("INFERENCE_SERVICE_NAME", environ.get("INFERENCE_SERVICE_NAME") or None),
    ):
        if name is None:
            continue
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}", name):
            raise StartupError(f"{key}: must be letters, digits, '.', '_' and '-', not {name!r}.")
        return name
    return Settings.model_name


def _http_port(kserve: argparse.Namespace, environ: Mapping[str, str]) -> int:
    for key, port in (("--http_port", kserve.http_port), ("PORT", environ.get("PORT") or None)):
        if port is None:
            continue
        try:
            return integer(1, 65_535)(str(port))
        except argparse.ArgumentTypeError as error:
            raise StartupError(f"{key}: {error}.") from None
    return Settings.http_port
