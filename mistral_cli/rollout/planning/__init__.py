"""What a rollout does next: preconditions, steps and their goals, computed from a status."""
