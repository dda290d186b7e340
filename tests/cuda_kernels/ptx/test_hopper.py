"""Hopper's instructions: emulated, assembled for sm_90a, and on a Hopper GPU if there is one."""

import doctest

import numpy as np
import pytest
from hopper_probes import HOPPER_PROBES
from on_gpu import launch
from test_instructions import as_strided

from cuda_kernels import detect
from cuda_kernels.launch import assemble, encode, why_not_assemble
from cuda_kernels.ptx import language as ptx
from cuda_kernels.ptx import mbarrier, tensor_map, tma, wgmma
from cuda_kernels.ptx.instruction import WrongUse
from cuda_kernels.ptx.language import TensorMap, cuda, f32
from cuda_kernels.ptx.registers import setmaxnreg_inc

needs_assembler = pytest.mark.skipif(bool(why_not_assemble()), reason=str(why_not_assemble()))
by_name = pytest.mark.parametrize("probe", HOPPER_PROBES, ids=lambda probe: probe.name)


@by_name
@pytest.mark.parametrize("schedule", ["late", "both"])
def test_emulated(probe, schedule):
    pytest.importorskip("greenlet")
    from cuda_kernels.emulator import emulate

    inputs, output = probe.inputs(), probe.output()
    arguments = probe.arguments([*inputs, output])
    emulate(
        probe.kernel, 1, probe.threads, *arguments,
        shared_bytes=probe.shared_bytes, schedule=schedule,
    )  # fmt: skip
    probe.check(inputs, output)


@pytest.mark.gpu
@by_name
def test_on_the_gpu(probe):
    if detect().kind != "gpu":
        pytest.skip(detect().reason or "kernels are simulated")
    cupy = pytest.importorskip("cupy")
    from numba import cuda as numba_cuda

    if numba_cuda.get_current_device().compute_capability[0] != 9:
        pytest.skip("no Hopper GPU")
    inputs, output = probe.inputs(), probe.output()
    # The slices cut off the padding of rows, which as_strided leaves.
    moved = [as_strided(cupy, x)[tuple(map(slice, x.shape))] for x in (*inputs, output)]
    launch(
        probe.kernel, probe.signature, (1,), probe.threads, probe.shared_bytes,
        *probe.arguments(moved),
    )  # fmt: skip
    probe.check(inputs, cupy.asnumpy(moved[-1]))


@by_name
def test_probe_notices_a_wrong_result(probe):
    inputs = probe.inputs()
    wrong = probe.expected(*inputs).copy()
    wrong.flat[np.flatnonzero(wrong)[-1]] += 1
    with pytest.raises(AssertionError):
        probe.check(inputs, wrong)


@pytest.mark.assembler
@needs_assembler
@by_name
def test_machine_code(probe):
    made = assemble(probe.kernel, probe.signature, "sm_90a")
    assert made.faults() == []
    for opcode in probe.opcodes:
        assert any(name.startswith(opcode) for name in made.opcodes), (opcode, made.opcodes)


# --- what the hardware lacks, and wrong use

PLAIN = "void(float32[::1], uint64, int64)"


@cuda.jit
def with_mbarrier(x, d, n):
    ptx.mbarrier_wait(ptx.u32(n), 0)


@cuda.jit
def with_elect(x, d, n):
    x[0] = f32(ptx.elect_one())


@cuda.jit
def with_setmaxnreg(x, d, n):
    ptx.setmaxnreg_dec(40)


@cuda.jit
def with_wgmma(x, d, n):
    ptx.wgmma_fence()


@cuda.jit
def with_map(a, n):
    ptx.tma_load_2d(ptx.u32(n), a, ptx.u32(n), 0, 0)


@pytest.mark.assembler
@needs_assembler
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100a"])
def test_refused_where_the_hardware_lacks_it(arch):
    kernels = [with_setmaxnreg, with_wgmma]
    if arch != "sm_100a":
        kernels += [with_mbarrier, with_elect, with_map]
    for kernel in kernels:
        signature = "void(tensor_map, int64)" if kernel is with_map else PLAIN
        with pytest.raises(WrongUse, match=f"needs sm_90(a| or later); .* compiled for {arch}$"):
            assemble(kernel, signature, arch)


@pytest.mark.assembler
@needs_assembler
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_120a"])
def test_tensor_maps_are_read_where_they_are(arch):
    made = assemble(with_map, "void(tensor_map, int64)", arch)
    assert made.stack < 128  # no copy of the map
    assert made.count("UTMALDG") == 1


@cuda.jit
def wrong_count(x, d, n):
    ptx.setmaxnreg_inc(100)


@cuda.jit
def wrong_n(x, d, n):
    tile = cuda.local.array(4, f32)
    ptx.wgmma_ss(tile, d, d, 0, 260, 0, 0)


@cuda.jit
def wrong_major(x, d, n):
    tile = cuda.local.array(4, f32)
    ptx.wgmma_ss(tile, d, d, 0, 8, 0, 2)


@cuda.jit
def n_at_run_time(x, d, n):
    tile = cuda.local.array(4, f32)
    ptx.wgmma_ss(tile, d, d, 0, n, 0, 0)


@cuda.jit
def no_map(x, d, n):
    ptx.tma_load_2d(0, x, 0, 0, 0)


@pytest.mark.assembler
@needs_assembler
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (wrong_count, "setmaxnreg_inc: count must be a multiple of 8 from 24 to 256, got 100"),
        (wrong_n, "wgmma_ss: n must be a multiple of 8 from 8 to 256, got 260"),
        (wrong_major, r"wgmma_ss: b_major must be K_MAJOR \(0\) or MN_MAJOR \(1\), got 2"),
        (n_at_run_time, "wgmma_ss: n must be known when the kernel is compiled"),
        (no_map, "tma_load_2d: source must be a tensor map, got array"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_wrong_use_is_one_sentence(kernel, message):
    with pytest.raises(WrongUse, match=f"^{message}[^\n]*$"):
        assemble(kernel, PLAIN, "sm_90a")


# --- tensor maps


@pytest.mark.parametrize(
    ("array", "box", "message"),
    [
        (np.zeros(64, np.uint16), (64,), "2 to 5 axes"),
        (np.zeros((0, 64), np.uint16), (1, 64), "none empty"),
        (np.zeros((2, 64)), (1, 16), "1, 2 or 4 bytes, got 8"),
        (np.zeros((2, 64), np.uint16), (64,), "box must be 2 lengths of 1 to 256"),
        (np.zeros((2, 64), np.uint16), (257, 64), "box must be 2 lengths of 1 to 256"),
        (np.zeros((2, 64), np.uint16), (2, 32), "64 elements .128 bytes. along the last axis"),
        (np.zeros((2, 68), np.uint16)[:, ::2], (2, 64), "side by side along the last axis"),
        (np.zeros((2, 65), np.uint16), (2, 64), "multiples?, got address .* strides .130, 2."),
        (np.zeros((2, 72), np.uint16)[:, 1:], (2, 64), "begin at a multiple of 16 bytes"),
    ],
)
def test_arrays_that_tma_cannot_copy(array, box, message):
    with pytest.raises(ValueError, match=message):
        TensorMap(array, box)


@cuda.jit
def load_anywhere(source, row, column):
    memory = cuda.shared.array(0, ptx.u8, alignment=1024)
    barriers = cuda.shared.array(1, ptx.u64, alignment=8)
    barrier = ptx.shared_address(barriers, 0)
    ptx.mbarrier_init(barrier, 1)
    ptx.fence_mbarrier_init()
    ptx.mbarrier_arrive_expect_tx(barrier, 256)
    ptx.tma_load_2d(ptx.shared_address(memory, 0), source, barrier, row, column)
    ptx.mbarrier_wait(barrier, 0)


@cuda.jit
def store_anywhere(target, row, column):
    memory = cuda.shared.array(0, ptx.u8, alignment=1024)
    for i in range(256):
        memory[i] = 1
    ptx.fence_proxy_async()
    ptx.tma_store_2d(target, ptx.shared_address(memory, 0), row, column)
    ptx.tma_commit()
    ptx.tma_wait_read(0)


@pytest.mark.parametrize(
    ("kernel", "length", "column", "message"),
    [
        (load_anywhere, 100, 56, ""),
        (load_anywhere, 100, -8, ""),
        (load_anywhere, 100, 50, r"in load_anywhere: .* multiple of 8 .16 bytes., got 50"),
        (store_anywhere, 104, 56, ""),
        (store_anywhere, 104, 50, r"in store_anywhere: .* multiple of 8 .16 bytes., got 50"),
        (store_anywhere, 100, 56, r"in store_anywhere: .* multiple of 16 bytes, got 200"),
    ],
)
def test_what_stops_the_hardware_stops_the_emulator(kernel, length, column, message):
    pytest.importorskip("greenlet")
    from cuda_kernels.emulator import EmulationError, emulate

    array = np.zeros((3, 104), np.uint16)[:, :length]
    arguments = TensorMap(array, (2, 64)), 1, column
    if not message:
        emulate(kernel, 1, 1, *arguments, shared_bytes=256)
        return
    with pytest.raises(EmulationError, match=message):
        emulate(kernel, 1, 1, *arguments, shared_bytes=256)


def test_axes_of_length_one_may_have_any_stride():
    array = np.lib.stride_tricks.as_strided(np.zeros(64, np.uint16), (1, 64), (6, 2))
    assert TensorMap(array, (1, 64)).strides == (16, 2)


def test_the_driver_is_told_the_axes_from_the_innermost_out(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    told = []

    def take(*arguments):
        told.append(arguments)
        return driver.CUresult.CUDA_SUCCESS, driver.CUtensorMap()

    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", take)
    array = np.zeros((2, 3, 4, 72), np.uint16).transpose(1, 0, 2, 3)[..., :70]
    raw = encode(TensorMap(array, (1, 2, 3, 64)))
    assert raw.shape == (128,)
    assert raw.ctypes.data % 64 == 0
    kind, axes, address, *lists = told[0][:7]
    assert kind == driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16
    assert (axes, address) == (4, array.ctypes.data)
    lengths, strides, box, steps = ([int(x) for x in values] for values in lists)
    assert lengths == [70, 4, 2, 3]
    assert strides == [144, 3 * 4 * 144, 4 * 144]
    assert box == [64, 3, 2, 1]
    assert steps == [1, 1, 1, 1]
    monkeypatch.setattr(
        driver,
        "cuTensorMapEncodeTiled",
        lambda *_: (driver.CUresult.CUDA_ERROR_INVALID_VALUE, None),
    )
    with pytest.raises(RuntimeError, match=r"box=\(1, 2, 3, 64\).* cannot be encoded"):
        encode(TensorMap(array, (1, 2, 3, 64)))


def test_what_is_counted_without_an_emulator():
    with pytest.raises(RuntimeError, match="needs a thread"):
        ptx.mbarrier_arrive(0)
    with pytest.raises(ValueError, match="multiple of 8"):
        setmaxnreg_inc.assembly({"count": 20})
    with pytest.raises(ValueError, match="swizzle of 128 bytes"):
        wgmma._parts(2 << 62)
    for module in (mbarrier, tensor_map, tma, wgmma):
        assert doctest.testmod(module).failed == 0
