"""The API: bodies, answers, middleware, keys."""
