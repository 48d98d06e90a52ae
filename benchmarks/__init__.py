"""Benchmarks of the server: throughput, start-up, and a decode step beside the hardware's limits.

`make bench` runs them all; docs/benchmarks.md says how to read the figures. None of it is part of the server.
"""
