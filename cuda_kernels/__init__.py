"""Skip-softmax attention on a GPU, in Numba CUDA.

Importing it needs no GPU and loads no CUDA package.
"""

from cuda_kernels.attention import SkipReport, skip_softmax_attention
from cuda_kernels.backends import BACKENDS, Device, detect

__all__ = ["BACKENDS", "Device", "SkipReport", "detect", "skip_softmax_attention"]
