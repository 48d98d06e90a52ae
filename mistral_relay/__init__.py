"""Asynchronous predict: accepts a request, calls the model when it can, and delivers the answer by webhook.

A small program of its own, without a GPU and without the model: a queue in SQLite on a volume, one replica.
"""
