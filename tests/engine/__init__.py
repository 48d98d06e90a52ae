"""The engine: admission, the step loop, faults, the oracle."""
