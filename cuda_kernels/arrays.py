"""Arrays in and out: NumPy, CuPy, PyTorch, and whatever else speaks DLPack.

The caller's library allocates what goes back, on the caller's device and stream.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

DTYPES = ("float16", "bfloat16", "float32")


def library_of(array: Any) -> str:
    """Name the library an array belongs to: ``numpy``, ``cupy`` or ``torch``.

    Raises
    ------
    TypeError
        If it belongs to none of them.

    Examples
    --------
    >>> library_of(np.zeros(1))
    'numpy'
    """
    root = type(array).__module__.partition(".")[0]
    if root not in ("numpy", "cupy", "torch"):
        raise TypeError(f"arrays must be of NumPy, CuPy or PyTorch, got {type(array).__qualname__}")
    return root


def adopt(array: Any) -> Any:
    """Give an array of a known library as it is, and any other DLPack array as CuPy or NumPy."""
    root = type(array).__module__.partition(".")[0]
    if root in ("numpy", "cupy", "torch") or not hasattr(array, "__dlpack__"):
        return array
    on_cpu = array.__dlpack_device__()[0] == 1
    if on_cpu:
        return np.from_dlpack(array)
    import cupy

    return cupy.from_dlpack(array)


def dtype_name(array: Any) -> str:
    """Name the dtype as every library spells it, such as ``float16``."""
    return str(array.dtype).removeprefix("torch.")


def device_of(array: Any) -> str:
    """Name the device an array lives on: ``cpu``, or ``cuda:`` and its number."""
    library = library_of(array)
    if library == "torch":
        return str(array.device)
    return "cpu" if library == "numpy" else f"cuda:{array.device.id}"


def layout(array: Any) -> tuple[tuple[int, ...], int]:
    """Strides in bytes and the address of the first element."""
    library = library_of(array)
    if library == "torch":
        return tuple(s * array.element_size() for s in array.stride()), array.data_ptr()
    pointer = array.ctypes.data if library == "numpy" else array.data.ptr
    return tuple(array.strides), pointer


def form(array: Any) -> tuple[Any, ...] | None:
    """Shape, strides, dtype and device of an array on a GPU, quickly; None for any other array.

    Strides are in elements or in bytes, as its library counts them.  A tensor of PyTorch that wants
    a gradient has no form.
    """
    if hasattr(array, "data_ptr"):
        if array.is_cuda and not (array.requires_grad and wants_gradient(array)):
            return array.shape, array.stride(), array.dtype, array.device
    elif type(array).__module__.partition(".")[0] == "cupy":
        return array.shape, array.strides, array.dtype, array.data.device_id
    return None


def bare(array: Any) -> Any:
    """Give Numba a CPU tensor of PyTorch as the NumPy array that shares its memory."""
    on_cpu_torch = library_of(array) == "torch" and not array.is_cuda
    return array.numpy() if on_cpu_torch else array


def wants_gradient(array: Any) -> bool:
    """Whether PyTorch would record what happens to this array."""
    if library_of(array) != "torch" or not array.requires_grad:
        return False
    import torch

    return torch.is_grad_enabled()


def as_float32(array: Any) -> Any:
    """Give a contiguous float32 copy or the array itself, in its own library."""
    if library_of(array) == "torch":
        import torch

        return array.detach().to(torch.float32).contiguous()
    module = _module(array)
    return module.ascontiguousarray(array, dtype=module.float32)


def as_bits(array: Any) -> Any:
    """Give a view of 16-bit floats as int16, in its own library: bfloat16 has no other name."""
    if library_of(array) == "torch":
        import torch

        return array.detach().view(torch.int16)
    return array.view("int16")


def full(like: Any, shape: tuple[int, ...], value: float, dtype: str = "float32") -> Any:
    """Allocate an array in the library and on the device of another."""
    if library_of(like) == "torch":
        import torch

        return torch.full(shape, value, dtype=getattr(torch, dtype), device=like.device)
    return _module(like).full(shape, value, dtype=dtype)


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Allocate an array in the library and on the device of another, of any content."""
    if library_of(like) == "torch":
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    return _module(like).empty(shape, dtype=dtype)


def empty_like(like: Any, shape: tuple[int, ...]) -> Any:
    """Allocate an array in the library, dtype and device of another."""
    if library_of(like) == "torch":
        return like.new_empty(shape)
    return _module(like).empty(shape, dtype=like.dtype)


def cast(array: Any, like: Any) -> Any:
    """Give the array in the dtype of another."""
    if library_of(array) == "torch":
        return array.to(like.dtype)
    return array.astype(like.dtype, copy=False)


def from_numpy(array: np.ndarray, like: Any) -> Any:
    """Move a NumPy array to the library and device of another."""
    if library_of(like) == "torch":
        import torch

        return torch.from_numpy(array).to(like.device)
    return _module(like).asarray(array)


def to_numpy(array: Any) -> np.ndarray:
    """Copy an array to the host."""
    library = library_of(array)
    if library == "torch":
        return array.detach().cpu().numpy()
    return array if library == "numpy" else array.get()


def current_stream(array: Any) -> int:
    """Handle of the CUDA stream that the array's library is using; 0 is the default stream."""
    return stream_of(array)()


def stream_of(array: Any) -> Callable[[], int]:
    """Give what tells :func:`current_stream` of arrays on the same device, quickly."""
    library = library_of(array)
    if library == "torch":
        import torch

        # What PyTorch's own generated code calls: the public way makes an object of each stream.
        return partial(torch._C._cuda_getCurrentRawStream, array.get_device())
    if library == "cupy":
        import cupy

        # With a number it need not ask the driver which GPU is the current one.
        current, device = cupy.cuda.get_current_stream, array.data.device_id
        return lambda: current(device).ptr
    return int


def _module(array: Any) -> Any:
    if library_of(array) == "numpy":
        return np
    import cupy

    return cupy
