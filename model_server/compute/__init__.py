"""The computation of a step: forward, attention, KV cache, sampling and CUDA graphs."""
