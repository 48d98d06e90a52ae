"""Tests for GPUs: each test runs on `cuda` if there is a GPU, otherwise on the CPU with stand-ins."""
