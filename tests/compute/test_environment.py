"""Environment variables that the server sets before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from model_server.compute.cpu import environment

IMPORT = "import model_server.__main__, torch"


@pytest.mark.skipif(sys.platform != "linux", reason="torch comes with libgomp on Linux only")
def test_openmp_threads_spin_no_longer_than_the_server_says() -> None:
    environ = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}  # libgomp prints its settings when it is loaded
    loaded = subprocess.run([sys.executable, "-c", IMPORT], env=environ, capture_output=True, text=True, check=True)

    assert f"GOMP_SPINCOUNT = '{environment.DEFAULTS['GOMP_SPINCOUNT']}'" in loaded.stderr


def test_a_value_that_the_operator_has_set_stays() -> None:
    environ = {"GOMP_SPINCOUNT": "7"}

    environment.set_defaults(environ)

    assert environ["GOMP_SPINCOUNT"] == "7"
