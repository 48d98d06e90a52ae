"""The state of a release, computed from its objects. Nothing here sends a request."""
