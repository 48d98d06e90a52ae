"""Mistral 7B behind KServe's V1 predict: one process, one model."""

__version__ = "0.1.0"
