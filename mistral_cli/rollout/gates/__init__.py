"""What a new version must show before it gets more traffic: measured, then compared with limits."""
