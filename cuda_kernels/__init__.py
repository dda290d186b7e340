"""Skip-softmax attention on a GPU, in Numba CUDA.

Importing it needs no GPU and loads no CUDA package.
"""

import cuda_kernels.disk_cache  # noqa: F401  # it notes when: no kernel is loaded before
from cuda_kernels.attention import skip_softmax_attention, skip_softmax_plan
from cuda_kernels.backends import BACKENDS, Device, detect
from cuda_kernels.decode import skip_softmax_decode, skip_softmax_decode_plan
from cuda_kernels.decode_plan import DecodePlan, DecodeReport
from cuda_kernels.plan import PrefillPlan
from cuda_kernels.report import SkipReport

__all__ = [
    "BACKENDS",
    "DecodePlan",
    "DecodeReport",
    "Device",
    "PrefillPlan",
    "SkipReport",
    "detect",
    "skip_softmax_attention",
    "skip_softmax_decode",
    "skip_softmax_decode_plan",
    "skip_softmax_plan",
]
