"""The chart, the manifests and the image."""
