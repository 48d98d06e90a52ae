"""`python -m mistral_relay`: settings from the environment, one process, SIGTERM ends it after what runs is stored."""

from __future__ import annotations

import logging
import sys

import uvicorn

from mistral_relay.app import create_app
from mistral_relay.settings import Settings, SettingsError
from model_server.errors import StartupError


def main() -> None:
    """Start the relay; exits with 1 and one sentence when it cannot."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        settings = Settings.from_environ()
        app = create_app(settings)
    except (SettingsError, StartupError) as error:
        sys.exit(f"mistral_relay: {error}")
    uvicorn.run(app, host="0.0.0.0", port=settings.port, log_config=None, access_log=False)


main()
