"""The checks of `mistral preflight`."""
