"""`mistral batch`."""
