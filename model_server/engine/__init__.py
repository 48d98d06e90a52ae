"""Requests in, tokens out: the queue, the scheduler, the step loop, the fallback. Never the wire format."""
