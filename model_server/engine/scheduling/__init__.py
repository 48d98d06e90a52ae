"""The queue and the scheduler: what is admitted, and which prompt tokens a step prefills."""
