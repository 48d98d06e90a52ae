"""Metrics, logs, start-up phases, load progress, the termination message."""
