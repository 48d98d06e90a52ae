"""Checks: functions of the release and of the answers to findings. Nothing here sends a request."""
