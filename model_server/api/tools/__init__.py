"""Tools: what a request may say about them, and what an answer says of their calls."""
