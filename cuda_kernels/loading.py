"""A compiled kernel on this GPU: one build for arrays of any strides, with its shared memory."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any


@cache
def load(kernel: Any, signature: str, shared_bytes: int, device: int) -> Any:
    """Compile a kernel for one signature and let it have its dynamic shared memory.

    Parameters
    ----------
    kernel : ``@cuda.jit`` kernel
    signature : str
        Arrays in it have any strides: one build serves contiguous and strided ones.
    shared_bytes : int
        More than 48 KB must be asked for, kernel by kernel.
    device : int
        Number of the current GPU; a build belongs to one.

    Returns
    -------
    compiled kernel
        For :func:`launch`.

    Raises
    ------
    RuntimeError
        If this GPU has not that much shared memory.
    """
    from cuda.bindings import driver
    from numba.core import sigutils

    compiled = kernel.compile(sigutils.normalize_signature(signature)[0])
    function = compiled._codelibrary.get_cufunc()
    (status,) = driver.cuKernelSetAttribute(
        driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        shared_bytes,
        function.handle,
        function.device.id,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(
            f"{kernel.__name__} needs {shared_bytes} bytes of shared memory per block, more than "
            'this GPU has; pass backend="simt"'
        )
    return compiled


def launch(
    kernel: Any, compiled: Any, grid: tuple[int, ...], threads: int, stream: int,
    shared_bytes: int, *args: Any,
) -> None:  # fmt: skip
    """Launch the build that :func:`load` made, whatever the layout of the arrays.

    Numba's own launch would compile another build for contiguous arrays.

    Parameters
    ----------
    kernel, compiled
        Given to and got from :func:`load`.
    grid : tuple of int
    threads : int
        Of a block.
    stream : int
        Handle of a CUDA stream; 0 is the default stream.
    shared_bytes : int
    *args
        Arrays and NumPy scalars of exactly the signature's types.
    """
    from numba import cuda
    from numba.core.errors import NumbaPerformanceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaPerformanceWarning)  # of small grids
        how = kernel[grid, threads, cuda.external_stream(stream) if stream else 0, shared_bytes]
    compiled.launch(args, how.griddim, how.blockdim, how.stream, how.sharedmem)
