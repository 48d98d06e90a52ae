"""The KV cache: its interface, a contiguous and a dense layout, and its memory budget."""
