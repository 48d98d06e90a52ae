"""Files to weights: the hub, the checkpoint, safetensors."""
