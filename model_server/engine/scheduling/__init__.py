"""The queue and the scheduler: choose the requests to admit and the prompt tokens to prefill."""
