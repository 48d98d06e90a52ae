"""The page at `/playground`."""
