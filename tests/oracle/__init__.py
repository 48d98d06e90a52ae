"""Prompts against mistral-common, which runs in an environment of its own: `make oracle`."""
