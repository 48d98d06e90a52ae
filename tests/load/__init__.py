"""The server under load, with its bounds (docs/load.md): opt-in, `make load`, on a machine that does nothing else."""
