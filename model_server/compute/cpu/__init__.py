"""Tuning that only a CPU needs: packed weights, threads, the allocator, torch's environment."""
