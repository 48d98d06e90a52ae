"""Doubles and helpers that tests share; fixtures are in conftest.py."""
