"""Triton kernels. Import a module of this folder only where Triton is installed."""
