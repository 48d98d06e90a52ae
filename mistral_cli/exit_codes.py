"""The failures of `mistral predict` and `mistral batch`, and their exit codes.

Failure
 ├─ Refused      1   the server refused the request
 ├─ Misused      2   the command line is wrong, as Typer's own errors are
 ├─ Incomplete   3   the answer is incomplete: the connection broke, or the server ended it with an error
 ├─ GaveUp       4   no answer began within --wait
 └─ Unreachable  5   a retry cannot help: no such host, a bad certificate, no such InferenceService

130 is Ctrl-C, as in every shell.
"""

from __future__ import annotations


class Failure(Exception):
    """`str(failure)` is the sentence for stderr."""

    exit_code: int


class Refused(Failure):
    exit_code = 1


class Misused(Failure):
    exit_code = 2


class Incomplete(Failure):
    exit_code = 3


class GaveUp(Failure):
    exit_code = 4


class Unreachable(Failure):
    exit_code = 5
