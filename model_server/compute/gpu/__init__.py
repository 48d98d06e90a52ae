"""What only an accelerator needs: CUDA graphs, streams, asynchronous copies, the worst step."""
