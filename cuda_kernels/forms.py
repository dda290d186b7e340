"""The arrays that a plan was made for, and a quick check that those of a call are like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_kernels.arrays import library_of

ALIGNED = 16  # bytes: kernels copy in chunks of as many

Form = tuple[Any, ...]  # shape, strides, dtype and device, of one array after the other


class Forms:
    """What stays the same from call to call: shapes, strides, dtypes and devices of arrays.

    Parameters
    ----------
    named : dict of str to array
        ``q``, ``k``, ``v`` and ``out``, which start at a multiple of 16 bytes, and others; all of
        one library.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v, out, lens = np.zeros((5, 2, 4))
    >>> forms = Forms({"q": q, "k": k, "v": v, "out": out, "lens": lens})
    >>> forms.addresses(q, v, k, out, lens)[1] == v.ctypes.data
    True
    >>> forms.addresses(q, k[:1], v, out, lens)
    Traceback (most recent call last):
        ...
    ValueError: k must be as planned, [2, 4] with strides [32, 8], float64 on cpu; got [1, 4] with \
strides [32, 8], float64 on cpu
    """

    def __init__(self, named: dict[str, Any]) -> None:
        self._names = tuple(named)
        self._library = library_of(named["q"])
        self._read = _READERS[self._library]
        self._planned, _ = self._read(*named.values())

    def addresses(self, *given: Any) -> list[int]:
        """Check arrays, in the order of the plan's, and return where they start.

        Raises
        ------
        ValueError
            If an array is not like the plan's, or starts where it must not.
        """
        try:
            form, at = self._read(*given)
        except AttributeError:
            self._refuse_library(given)
            raise
        if form != self._planned:
            self._refuse(form)
        if (at[0] | at[1] | at[2] | at[3]) % ALIGNED:
            self._refuse_addresses(at)
        return at

    def _refuse_library(self, given: tuple[Any, ...]) -> None:
        for name, x in zip(self._names, given, strict=True):
            if (library := library_of(x)) != self._library:
                raise ValueError(f"{name} must be as planned, of {self._library}; got {library}")

    def _refuse(self, form: Form) -> None:
        for i, name in enumerate(self._names):
            planned, got = (x[4 * i : 4 * i + 4] for x in (self._planned, form))
            if got != planned:
                raise ValueError(f"{name} must be as planned, {_words(planned)}; got {_words(got)}")

    def _refuse_addresses(self, addresses: list[int]) -> None:
        for name, address in zip(self._names, addresses, strict=True):
            if address % ALIGNED:
                raise ValueError(
                    f"{name} must start at a multiple of {ALIGNED} bytes, got 0x{address:x}"
                )


# Each of these reads costs a call up to a tenth of a microsecond, and a loop over the arrays, or a
# tuple for each, as much again: they are written out, each in the quickest way that a library has.


def _of_torch(q: Any, k: Any, v: Any, out: Any, *others: Any) -> tuple[Form, list[int]]:
    form: Form = (
        q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device,
        v.shape, v.stride(), v.dtype, v.device, out.shape, out.stride(), out.dtype, out.device,
    )  # fmt: skip
    at = [q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()]
    for x in others:
        form += (x.shape, x.stride(), x.dtype, x.device)
        at.append(x.data_ptr())
    return form, at


def _of_cupy(q: Any, k: Any, v: Any, out: Any, *others: Any) -> tuple[Form, list[int]]:
    q_at, k_at, v_at, out_at = q.data, k.data, v.data, out.data
    form: Form = (
        q.shape, q.strides, q.dtype, q_at.device_id, k.shape, k.strides, k.dtype, k_at.device_id,
        v.shape, v.strides, v.dtype, v_at.device_id,
        out.shape, out.strides, out.dtype, out_at.device_id,
    )  # fmt: skip
    at = [q_at.ptr, k_at.ptr, v_at.ptr, out_at.ptr]
    for x in others:
        form += (x.shape, x.strides, x.dtype, x.data.device_id)
        at.append(x.data.ptr)
    return form, at


def _of_numpy(*given: Any) -> tuple[Form, list[int]]:
    form: Form = ()
    for x in given:
        form += (x.shape, x.strides, x.dtype, x.device)
    return form, [x.ctypes.data for x in given]


_READERS: dict[str, Callable[..., tuple[Form, list[int]]]]
_READERS = {"torch": _of_torch, "cupy": _of_cupy, "numpy": _of_numpy}


def _words(form: Form) -> str:
    shape, strides, dtype, device = form
    device = f"GPU {device}" if isinstance(device, int) else device
    return f"{list(shape)} with strides {list(strides)}, {dtype} on {device}"
