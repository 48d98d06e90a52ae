"""KServe's V1 predict: its parameters, its bodies and its answers."""
