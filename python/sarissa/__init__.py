"""Sarissa's operators for PyTorch: see sarissa.ops."""
