"""The arithmetic of a step: forward, attention, sampling, CUDA graphs."""
