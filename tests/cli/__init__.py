"""The `mistral` command."""
