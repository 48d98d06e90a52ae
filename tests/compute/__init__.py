"""The arithmetic: KV cache, kernels, copies."""
