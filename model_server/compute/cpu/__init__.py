"""Tuning that only a CPU needs."""
