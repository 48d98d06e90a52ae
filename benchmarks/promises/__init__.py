"""What the server promises under load and faults, each measured on a running server and compared with its bound.

`python -m benchmarks.promises` measures all but the soak, `--only NAME` one of them. None of it is part of the server.
"""
