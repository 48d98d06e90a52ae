"""`mistral preflight`."""
