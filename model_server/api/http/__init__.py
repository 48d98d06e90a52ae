"""HTTP itself: connections, middleware, API keys, streams, the trace context."""
