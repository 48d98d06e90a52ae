"""The release that `mistral preflight` reads."""
