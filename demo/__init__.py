"""Makes the small demo model that `make run` serves when no weights are given."""
