"""The KV cache: its interface, a contiguous and a dense layout, and how much memory it gets."""
