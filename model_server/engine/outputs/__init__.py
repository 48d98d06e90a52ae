"""Turns sampled tokens into events: detokenization, the finish rule, log-probabilities and readers."""
