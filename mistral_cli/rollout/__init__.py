"""`mistral rollout`: a new image behind an InferenceService, measured against the old one, promoted or reverted.

`state` computes a status from objects, `planning` turns a status into steps, `executor` executes them, and `verbs`
combines the three. Only `executor`, `reader`, `lock` and `gates.measure` touch anything outside the process.
"""
