"""Kernels and their evaluation; installed as `mustafar.kernel` by kernel_wrapper/setup.py."""
