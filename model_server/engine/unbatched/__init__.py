"""Requests that cannot be batched: which they are, and one `model.generate` call at a time."""
