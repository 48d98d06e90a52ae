"""`mistral preflight`: says what a cluster lacks for a release, with the command that mends it. It changes nothing.

`render` and `release` read what would be installed; `reader`, `registry`, `hub` and `resolver` ask; every other module
is a function of those answers to findings, and never asks.
"""
