"""The collectors of `mistral preflight`."""
