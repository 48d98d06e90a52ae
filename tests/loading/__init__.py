"""Weights and the hub."""
