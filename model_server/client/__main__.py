"""`python -m model_server.client`, the `mistral` command where it is not installed."""

from .app import main

main()
