"""Finds the requests that cannot be batched and generates them with one `model.generate` call at a time."""
