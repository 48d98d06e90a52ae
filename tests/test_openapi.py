"""The document at `/openapi.json`: true to the code, to docs/api.md, and to what a server answers to hundreds of cases."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from model_server import openapi
from model_server.errors import BadRequest, ServeError
from model_server.parameter_table import ALIASES, TABLE
from model_server.parameters import ModelLimits
from model_server.predict import parse
from model_server.routes import create_app, open_paths

from .conftest import ServerProcess
from .fakes import FakeText
from .malformed import MALFORMED

API_DOC = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
LIMITS = ModelLimits(max_model_len=4096, vocab_size=300, eos_token_ids=(2,))
