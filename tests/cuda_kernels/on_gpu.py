"""Launch any kernel on a GPU once: for tests of kernels that no plan launches."""

import numpy as np

from cuda_kernels.gpu import current
from cuda_kernels.launch import Launcher, load
from cuda_kernels.ptx.language import TensorMap


def launch(kernel, signature, blocks, threads, shared_bytes, *arguments):
    """Launch on the default stream; arguments are CuPy arrays, NumPy scalars and tensor maps."""
    function = load(kernel, signature, shared_bytes, current())
    laid_out, addresses = [], []
    for argument in arguments:
        if isinstance(argument, TensorMap):
            laid_out.append(argument)
            addresses.append(argument.address)
        elif isinstance(argument, np.generic):
            laid_out.append(np.ctypeslib.as_ctypes(np.asarray(argument)))
        else:
            laid_out.append((argument.shape, argument.strides, argument.itemsize))
            addresses.append(argument.data.ptr)
    grid = (*blocks, 1, 1)[:3]
    Launcher(function, grid, threads, shared_bytes, *laid_out)(0, *addresses)
