"""`python -m mistral_cli`, the `mistral` command where it is not installed."""

from .app import main

main()
