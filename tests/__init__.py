"""The tests: one module for each of ours, and some that check the repository against itself."""
