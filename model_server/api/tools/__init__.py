"""Tools: the fields of requests, and the calls in answers."""
