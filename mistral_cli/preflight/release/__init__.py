"""The release that would be installed: its manifests, and what they need."""
