"""From sampled tokens to events: detokenization, the finish rule, log-probabilities, readers."""
