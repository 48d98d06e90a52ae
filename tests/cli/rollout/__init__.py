"""`mistral rollout`."""
