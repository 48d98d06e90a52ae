"""Settings: where a value comes from; a bad one stops the start with a sentence."""

import re
from pathlib import Path

import pytest
from kserve.model_server import parser

from model_server import settings as module
from model_server.errors import StartupError
from model_server.settings import Settings, flag_fields

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"


def parse(*argv: str, **environ: str) -> Settings:
    return Settings.parse(argv, environ, parser)


def refusal(*argv: str, **environ: str) -> str:
    with pytest.raises(StartupError) as caught:
        parse(*argv, **environ)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    return sentence


def test_defaults_are_the_documented_ones():
    settings = parse()
    assert (settings.max_model_len, settings.max_batch_size, settings.max_queue_size) == (4096, 32, 128)
    assert (settings.dtype, settings.drain_seconds, settings.max_request_bytes) == ("auto", 30.0, 1048576)
    assert (settings.model_name, settings.http_port) == ("mistral-7b", 8080)


def test_flag_beats_environment_and_environment_beats_default():
    assert parse(MISTRAL_MAX_BATCH_SIZE="8").max_batch_size == 8
    assert parse("--max_batch_size", "4", MISTRAL_MAX_BATCH_SIZE="8").max_batch_size == 4


def test_every_flag_can_come_from_the_environment():
    samples = {"dtype": "float32", "cors_origins": "*", "log_format": "json"}
    samples |= {"playground": "false", "prefix_caching": "false", "fix_chat_template": "false"}
    for name in flag_fields():
        if name not in ("model_revision", "max_requests_per_key"):  # each belongs to another flag
            assert name in parse(**{f"MISTRAL_{name.upper()}": samples.get(name, "9")}).given


def test_a_limit_per_key_comes_with_a_key_file():
    assert parse(MISTRAL_MAX_REQUESTS_PER_KEY="9", MISTRAL_API_KEY_FILE="keys").max_requests_per_key == 9
    with pytest.raises(StartupError, match="belongs to --api_key_file"):
        parse(MISTRAL_MAX_REQUESTS_PER_KEY="9")


def test_empty_variable_counts_as_unset():
    assert parse(MISTRAL_MAX_BATCH_SIZE="", INFERENCE_SERVICE_NAME="", PORT="").given == frozenset()


def test_model_name_comes_from_the_flag_or_else_the_inference_service():
    assert parse("--model_name", "a", INFERENCE_SERVICE_NAME="b").model_name == "a"
    assert parse(INFERENCE_SERVICE_NAME="b").model_name == "b"


def test_port_comes_from_the_flag_or_else_from_knative():
    assert parse("--http_port", "9000", PORT="9001").http_port == 9000
    assert parse(PORT="9001").http_port == 9001


def test_mounted_model_is_the_default_directory_if_it_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOUNTED_MODEL", tmp_path)
    assert parse().model_dir == tmp_path
    assert parse("--model_dir", "/elsewhere").model_dir == Path("/elsewhere")


def test_modelcar_provides_the_model_later(tmp_path, monkeypatch):
    """KServe sets MODEL_INIT_MODE=async for oci:// models: the mount may be linked after the server has started."""
    mount = tmp_path / "models"
    monkeypatch.setattr(module, "MOUNTED_MODEL", mount)

    late = parse(MODEL_INIT_MODE="async")
    assert (late.model_dir, late.model_dir_appears_late) == (mount, True)
    assert parse("--model_dir", str(mount), MODEL_INIT_MODE="async").model_dir_appears_late
    assert not parse("--model_dir", "/elsewhere", MODEL_INIT_MODE="async").model_dir_appears_late
    assert parse("--model_id", "a/b", MODEL_INIT_MODE="async").model_dir is None
    assert parse().model_dir is None


def test_origins_are_separated_by_commas():
    origins = parse("--cors_origins", "https://a.example, http://localhost:3000").cors_origins
    assert origins == ("https://a.example", "http://localhost:3000")


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--dtype", "int8", "float16"),
        ("--max_model_len", "1", "from 2"),
        ("--max_model_len", "4k", "whole number"),
        ("--max_batch_size", "0", "from 1"),
        ("--max_batch_size", "1.5", "whole number"),
        ("--max_prefill_tokens", "-1", "from 0"),
        ("--max_queue_size", "-1", "from 0"),
        ("--max_request_bytes", "9" * 400, "from 1"),
        ("--drain_seconds", "nan", "from 0"),
        ("--stall_seconds", "inf", "to 86400"),
        ("--playground", "maybe", "true or false"),
        ("--log_format", "xml", "json"),
        ("--cors_origins", "example.org", "https://"),
        ("--http_port", "eighty", "int"),
        ("--http_port", "70000", "to 65535"),
        ("--model_name", "a/b", "letters"),
        ("--workers", "2", "must be 1"),
        ("--enable_docs_url", "perhaps", "true or false"),
        ("--event-loop", "trio", "choose from"),
    ],
)
def test_bad_flag_is_named_with_its_value_and_what_is_allowed(flag, value, allowed):
    sentence = refusal(flag, value)
    assert flag in sentence
    assert value in sentence
    assert allowed in sentence


def test_bad_variable_is_named_with_its_value():
    assert "MISTRAL_DRAIN_SECONDS: must be seconds from 0" in refusal(MISTRAL_DRAIN_SECONDS="soon")
    assert "PORT: must be a whole number" in refusal(PORT="tcp://10.0.0.1:80")


def test_unknown_flag_is_refused_with_the_nearest():
    assert refusal("--max_batchsize", "3").endswith("did you mean --max_batch_size?")
    assert "--max_batch is not a flag" in refusal("--max_batch", "3")
    assert "stray is not a flag" in refusal("stray")


def test_unknown_variable_is_refused_with_the_nearest():
    assert refusal(MISTRAL_MAX_BACH_SIZE="3").endswith("did you mean MISTRAL_MAX_BATCH_SIZE?")
    assert "MISTRAL_dtype is not a setting" in refusal(MISTRAL_dtype="float16")


def test_service_links_of_kubernetes_are_ignored():
    links = {
        "MISTRAL_7B_PREDICTOR_SERVICE_HOST": "10.0.0.1",
        "MISTRAL_7B_PREDICTOR_SERVICE_PORT": "80",
        "MISTRAL_7B_PREDICTOR_SERVICE_PORT_HTTP": "80",
        "MISTRAL_7B_PREDICTOR_PORT": "tcp://10.0.0.1:80",
        "MISTRAL_7B_PREDICTOR_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert parse(**links).given == frozenset()


def test_api_key_of_the_command_line_is_ignored():
    assert parse(MISTRAL_API_KEY="secret").given == frozenset()


def test_revision_without_id_is_refused():
    assert "--model_id" in refusal("--model_revision", "main")


def test_grpc_is_off_and_refused():
    assert parse().kserve.enable_grpc is False
    assert "--enable_grpc" in refusal("--enable_grpc", "true")


def test_parsing_does_not_change_the_parser_of_kserve():
    parse("--model_name", "a")
    assert parser.get_default("model_name") == "model"
    assert parser.get_default("enable_grpc") is True


@pytest.mark.parametrize("flag", ["--ssl_certfile", "--ssl_keyfile", "--log_config_file"])
def test_missing_file_is_refused_before_anything_is_loaded(flag):
    assert f"{flag}: there is no file /nowhere" in refusal(flag, "/nowhere")


def test_docs_name_every_flag_with_its_default():
    ours = DOCS.read_text().partition("## KServe's own flags")[0]
    documented = dict(re.findall(r"^\| `--(\w+)` \| `?([^|`]*)", ours, flags=re.MULTILINE))
    expected = {name: _as_documented(field.default) for name, field in flag_fields().items()}
    assert {name: text.strip() for name, text in documented.items()} == expected | {"model_dir": "/mnt/models"}


def _as_documented(default: object) -> str:
    if isinstance(default, float):
        return f"{default:g}"
    return "none" if default in (None, ()) else str(default).replace("True", "true")
