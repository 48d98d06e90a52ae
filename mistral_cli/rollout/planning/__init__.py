"""Computes the next steps of a rollout from a status: preconditions, steps and their goals."""
