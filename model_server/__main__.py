"""`python -m model_server`: settings, model, routes, server. The only place that composes."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

from model_server.api.http.auth import ApiKeys
from model_server.compute.cpu import environment, malloc
from model_server.errors import StartupError
from model_server.loading.prefetch import prefetch_weights
from model_server.settings import Settings
from model_server.telemetry import logs, startup, termination, traces

log = logging.getLogger("model_server")

environment.set_defaults(os.environ)


def main() -> int:
    """Serve until a signal ends the process; return the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # While loading there is nothing to drain, and a container's first process has no default signal action.
        signal.signal(number, lambda sig, frame: os._exit(128 + sig))
    try:
        serve(sys.argv[1:], os.environ)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        termination.write(str(error))
        return 1
    return 0


def serve(argv: Sequence[str], environ: Mapping[str, str]) -> None:
    """Load and serve; return once drained.

    Raises:
        StartupError: the settings, the model or the port do not allow it.
    """
    # What imports and loading allocate is permanent: collecting garbage in it took a fifth of the import time.
    gc.disable()
    malloc.use_one_arena()
    settings = _settings(argv, environ)
    if settings.model_dir is not None:
        prefetch_weights(settings.model_dir)
    if reason := termination.pop_reason():
        log.warning("the last process died: %s", reason)
    _check_port(settings.http_port)

    keys = ApiKeys(settings.api_key_file) if settings.api_key_file else None

    # Imported only now: torch takes seconds to import, and a wrong flag should be reported at once.
    from model_server.api import openapi, playground
    from model_server.api.http.middleware import wrap
    from model_server.api.openai.endpoints import openai_router
    from model_server.api.routes import create_app, public_paths
    from model_server.api.tokenize import tokenize_router
    from model_server.api.truss import truss_router
    from model_server.model import MistralModel
    from model_server.server import Server

    startup.phase_ended("imports")
    model = MistralModel(settings)
    model.load()
    gc.freeze()
    gc.enable()
    app = create_app(model, docs=settings.kserve.enable_docs_url)
    app.include_router(openai_router(model))
    app.include_router(truss_router(model))
    app.include_router(tokenize_router(model))
    if settings.playground:
        app.router.routes.append(playground.route())
    openapi.describe(app, model.name, free=public_paths(model.name), keyed=keys is not None)
    tracer = traces.start(environ, model.name)
    wrap(
        app,
        max_request_bytes=settings.max_request_bytes,
        client_stall_s=settings.client_stall_seconds,
        keys=keys,
        max_requests_per_key=settings.max_requests_per_key,
        free=public_paths(model.name),
        pages={playground.PATH: playground.response(401)} if settings.playground else {},
        cors_origins=settings.cors_origins,
        tracer=tracer,
    )
    try:
        Server(model, app, settings).run()
    finally:
        model.stop()
        if tracer is not None:
            tracer.stop()


def _settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    # KServe parses the command line when it is imported, and would exit with its own message if a flag is wrong.
    real_argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        import kserve.logging
        import kserve.model_server
    finally:
        sys.argv = real_argv
    settings = Settings.parse(argv, environ, kserve.model_server.parser)
    if settings.kserve.configure_logging:
        config = logs.configuration(kserve.logging.KSERVE_LOG_CONFIG, settings.log_format)
        kserve.logging.configure_logging(settings.kserve.log_config_file or config)
    if "MISTRAL_API_KEY" in environ and settings.api_key_file is None:
        log.warning("MISTRAL_API_KEY is for the command line; the server requires a key only with --api_key_file.")
    return settings


def _check_port(port: int) -> None:
    """Check the port before the model is loaded, which takes minutes."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            raise StartupError(
                f"Port {port} cannot be opened ({error.strerror}): choose another with --http_port."
            ) from None


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`: unloading torch takes seconds, and a thread that hangs would block the exit.
    os._exit(exit_code)
