"""Test doubles and helpers that tests share; fixtures are in conftest.py."""
