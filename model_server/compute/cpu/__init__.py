"""Tuning for CPUs: packed weights, thread counts, the allocator and environment variables."""
