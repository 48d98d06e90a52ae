"""A wrong setting stops the start."""

from __future__ import annotations

import pytest

from mistral_relay.settings import Settings, SettingsError


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({}, "MISTRAL_RELAY_UPSTREAM_URL is missing"),
        ({"MISTRAL_RELAY_UPSTREAM_URL": "ftp://x"}, "must be an http or https URL"),
        ({"MISTRAL_RELAY_PORTS": "1"}, "MISTRAL_RELAY_PORTS is not a setting"),
        ({"MISTRAL_RELAY_UPSTREAM_URL": "http://x", "MISTRAL_RELAY_PORT": "0"}, "must be an integer from 1 to 65535"),
        ({"MISTRAL_RELAY_UPSTREAM_URL": "http://x", "MISTRAL_RELAY_WEBHOOK_HOSTS": "https://a"}, "is not a host name"),
        ({"MISTRAL_RELAY_UPSTREAM_URL": "http://x", "MISTRAL_RELAY_WEBHOOK_HOSTS": "a.b"}, "webhooks are signed"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_a_sentence(environ, part):
    with pytest.raises(SettingsError, match=part.replace(".", r"\.")):
        Settings.from_environ(environ)
