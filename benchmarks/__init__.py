"""What the server is measured with: load, starts and limits, beside what a user would take instead.

`python -m benchmarks` runs all of it; `serve`, `start` and `limits` run alone as modules. Nothing here is
part of the server.
"""
