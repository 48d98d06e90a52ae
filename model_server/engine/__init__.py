"""Generates tokens for requests: the queue, the scheduler, the step loop and the fallback. Knows no wire format."""
