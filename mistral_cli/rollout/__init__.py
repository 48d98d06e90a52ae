"""`mistral rollout`: a new image behind an InferenceService, measured against the old one, promoted or reverted.

Computed, decided, acted: `status` reads objects into one phase, `plan` turns a status into steps, `run` takes them.
Only `run`, `reader`, `lock` and `measure` touch anything outside the process.
"""
