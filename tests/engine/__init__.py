"""The engine: admission, the step loop, faults, and answers compared with `generate`."""
