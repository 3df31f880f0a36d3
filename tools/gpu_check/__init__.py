"""What only a GPU can show: python -m tools.gpu_check."""
