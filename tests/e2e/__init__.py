"""The chart on a real cluster: tests/e2e/README.md says how to run them."""
