"""The computation of a step: KV cache, kernels, sampling, copies."""
