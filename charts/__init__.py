"""The Helm chart, and what is rendered from it."""
