"""What exists only to be fast on a CPU, tested against `kernels.reference`. Only `kernels/__init__.py` imports it."""
