"""Collectors: ask the cluster, the registry, the model hub and the resolver, and change nothing."""
