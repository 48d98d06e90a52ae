"""Tuning for accelerators: CUDA graphs, flash attention, streams, asynchronous copies and the worst step's memory."""
