"""The decision grid of the prefill kernels."""

ROWS, KEYS = 64, 128
NO_WINDOW = 1 << 30  # as window: every key is in it
