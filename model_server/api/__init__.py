"""HTTP in, bytes out: routes, request bodies, middleware. Never torch, never the engine."""
