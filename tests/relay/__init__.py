"""The relay for asynchronous predict."""
