"""Loading and launching, with the driver played: what it is given is what the kernel takes."""

import ctypes
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from cuda_kernels import detect, gemm, gemm_wgmma, launch, prefill_mma
from cuda_kernels.gpu import Gpu
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Launcher, why_not_assemble
from cuda_kernels.ptx import compiler
from cuda_kernels.ptx.language import BF16, TensorMap, cuda

driver = pytest.importorskip("cuda.bindings.driver", reason="numba-cuda is not installed")
RESULT = driver.CUresult
needs_assembler = pytest.mark.skipif(bool(why_not_assemble()), reason=str(why_not_assemble()))
CARD = Gpu(3, "Card", (9, 0), 132, 233_472)
MATRICES = "void(uint16[:,:], uint16[:,:], float32[:,::1])"


@pytest.fixture
def played(monkeypatch):
    """A driver that notes what it is asked."""
    asked = {}

    def play(name, *answer):
        def answered(*arguments):
            asked[name] = arguments
            return (RESULT.CUDA_SUCCESS, *answer)

        monkeypatch.setattr(driver, name, answered)

    play("cuLibraryLoadData", driver.CUlibrary(1))
    play("cuLibraryGetKernel", driver.CUkernel(0x1234))
    play("cuKernelSetAttribute")
    play("cuLaunchKernel")
    play("cuTensorMapEncodeTiled", driver.CUtensorMap())
    play("cuTensorMapReplaceAddress")
    built = launch.Build("entry", b"machine code", "")
    monkeypatch.setattr(launch, "build", lambda *what: asked.update(build=what) or built)
    launch.load.cache_clear()
    yield asked
    launch.load.cache_clear()


def test_load(played):
    kernel = gemm.make_kernel(BF16, 1)
    assert launch.load(kernel, MATRICES, 70_000, CARD) == 0x1234
    assert played["build"] == (kernel, MATRICES, "sm_90a")
    assert played["cuLibraryLoadData"][0] == b"machine code"
    assert played["cuLibraryGetKernel"][1] == b"entry"
    attribute, size, function, device = played["cuKernelSetAttribute"]
    assert attribute.name == "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
    assert (size, int(function), device) == (70_000, 0x1234, 3)


@pytest.mark.parametrize(
    ("function", "answer", "sentence"),
    [
        ("cuLibraryLoadData", (None,), r"gemm cannot be loaded \(CUDA_ERROR_INVALID_IMAGE\)"),
        ("cuKernelSetAttribute", (), "gemm needs 70000 bytes of shared memory .* more than this"),
    ],
)
def test_what_the_driver_refuses_is_a_sentence(played, monkeypatch, function, answer, sentence):
    refused = (RESULT.CUDA_ERROR_INVALID_IMAGE, *answer)
    monkeypatch.setattr(driver, function, lambda *_: refused)
    with pytest.raises(RuntimeError, match=sentence):
        launch.load(gemm.make_kernel(BF16, 1), MATRICES, 70_000, CARD)


def read(played):
    """What the launched kernel would find in its parameters."""
    *_, parameters, extra = played["cuLaunchKernel"]
    assert extra == 0
    return parameters


def test_a_launch_changes_stream_and_addresses_only(played):
    array = ((3, 5), (24, 4), 4)
    launcher = Launcher(7, (2, 3, 4), 128, 512, array, ctypes.c_float(1.5), array)
    for stream, given, addresses in (
        (0, (16, 32), (16, 32)), (9, (48, 64), (48, 64)), (9, (80,), (80, 64))
    ):  # fmt: skip
        launcher(stream, *given)
        function, *where = played["cuLaunchKernel"][:9]
        assert (int(function), where) == (7, [2, 3, 4, 128, 1, 1, 512, stream])
        pointers = (ctypes.c_void_p * 19).from_address(read(played))
        numbers = [ctypes.c_int64.from_address(pointers[i]).value for i in range(9)]
        assert numbers == [0, 0, 15, 4, addresses[0], 3, 5, 24, 4]
        assert ctypes.c_float.from_address(pointers[9]).value == 1.5
        assert ctypes.c_int64.from_address(pointers[14]).value == addresses[1]


def test_a_tensor_map_moves_with_its_array(played):
    map_ = TensorMap(np.zeros((128, 64), np.uint16), gemm_wgmma.A_BOX)
    launcher = Launcher(7, (1, 1, 1), 384, 0, map_, ctypes.c_int32(5))
    launcher(0, map_.address)
    assert "cuTensorMapReplaceAddress" not in played
    launcher(0, 4096)
    moved, address = played.pop("cuTensorMapReplaceAddress")
    first, second = (ctypes.c_void_p * 2).from_address(read(played))
    assert (moved.getPtr(), address) == (first, 4096)
    assert first % 64 == 0
    assert ctypes.c_int32.from_address(second).value == 5
    for known, pointer in ((4096, first), (map_.address, None), (4096, first)):
        launcher(0, known)
        assert "cuTensorMapReplaceAddress" not in played  # the driver is asked once an address
        (here,) = (ctypes.c_void_p * 1).from_address(read(played))
        assert (here == first) == (pointer is not None)


def test_tensor_maps_of_many_addresses_are_not_all_kept(played, monkeypatch):
    monkeypatch.setattr(launch, "MOST_PLACES", 3)
    map_ = TensorMap(np.zeros((128, 64), np.uint16), gemm_wgmma.A_BOX)
    launcher = Launcher(7, (1, 1, 1), 384, 0, map_)
    for address in (4096, 8192, 12288, 4096):  # the third does not find room beside the others
        played.pop("cuTensorMapReplaceAddress", None)
        launcher(0, address)
        moved, to = played["cuTensorMapReplaceAddress"]
        (here,) = (ctypes.c_void_p * 1).from_address(read(played))
        assert (moved.getPtr(), address) == (here, to)


def test_a_refused_launch_is_a_sentence(played, monkeypatch):
    launcher = Launcher(7, (1, 1, 1), 32, 0)
    monkeypatch.setattr(launcher, "_launch", lambda *_: (RESULT.CUDA_ERROR_INVALID_VALUE,))
    with pytest.raises(RuntimeError, match=r"the launch failed \(CUDA_ERROR_INVALID_VALUE\)"):
        launcher(0)


def sizes_in(cubin, tmp_path):
    """Bytes of each parameter, as the machine code itself lists them."""
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    listing = launch._run("cuobjdump", "-elf", tmp_path / "kernel.cubin")
    found = re.findall(r"Ordinal : 0x(\w+)\s+Offset  : 0x\w+\s+Size    : 0x(\w+)", listing)
    return [size for _, size in sorted((int(n, 16), int(size, 16)) for n, size in found)]


@pytest.mark.assembler
@needs_assembler
@pytest.mark.parametrize("which", ["arrays", "tensor maps"])
def test_parameters_are_as_large_as_the_kernel_wants_them(which, monkeypatch, tmp_path):
    monkeypatch.setattr(
        driver, "cuTensorMapEncodeTiled", lambda *_: (RESULT.CUDA_SUCCESS, driver.CUtensorMap())
    )
    c = ((128, 128), (512, 4), 4)
    if which == "arrays":
        made = launch.build(gemm.make_kernel(BF16, 1), MATRICES, "sm_90a")
        launcher = Launcher(7, (1, 1, 1), 128, 0, c, c, c)
    else:
        made = launch.build(gemm_wgmma.make_kernel(BF16, 1), gemm_wgmma.SIGNATURE, "sm_90a")
        map_ = TensorMap(np.zeros((128, 64), np.uint16), gemm_wgmma.A_BOX)
        launcher = Launcher(7, (1, 1, 1), 384, 0, map_, map_, c, ctypes.c_int32(64))
    sizes = [
        value._first.nbytes if isinstance(value, launch._Placed) else ctypes.sizeof(value)
        for value in launcher._values
    ]
    assert sizes == sizes_in(made.cubin, tmp_path)


@needs_assembler
def test_options_of_a_kernel_name_its_build():
    function = gemm.make_kernel(BF16, 1).py_func
    choices = ({}, {"fastmath": True}, {"launch_bounds": (32, 1)}, {"max_registers": 32},
               {"lineinfo": True}, {"opt": False})  # fmt: skip
    names = {launch.kept_as(cuda.jit(function, **some), MATRICES, "sm_80") for some in choices}
    assert len(names) == len(choices)
    assert None not in names


def test_a_kept_build_loads_no_compiler(tmp_path):
    script = """
import sys
from cuda_kernels import disk_cache, launch
from cuda_kernels.kernel import Kernel
kernel = Kernel("cuda_kernels.prefill_mma", (64, 64, 0, True, False))
content = b'{"entry": "mma", "log": ""}' + b"\\nmachine code"
disk_cache.write("cubins", launch.kept_as(kernel, None, "sm_90a"), content)
made = launch.build(kernel, None, "sm_90a")
print(made.entry, made.cubin, "numba" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env={**os.environ, "SKIP_SOFTMAX_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.strip() == "mma b'machine code' False"


def test_a_named_kernel_is_made_to_be_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("SKIP_SOFTMAX_CACHE_DIR", str(tmp_path))
    kernel, asked = Kernel("cuda_kernels.prefill_mma", (64, 64, 0, True, False)), []
    built = launch.Build("mma", b"machine code", "")
    monkeypatch.setattr(launch, "_compile", lambda *what: asked.append(what) or built)
    for _ in range(2):
        assert launch.build(kernel, None, "sm_90a") == built
    made = prefill_mma.make_kernel(*kernel.arguments)
    assert asked == [(made, prefill_mma.SIGNATURE, "sm_90a")]
    others = (
        Kernel("cuda_kernels.prefill_mma", (64, 64, 0, False, False)),
        Kernel("cuda_kernels.prefill_wgmma", kernel.arguments),
    )
    names = {launch.kept_as(one, None, "sm_90a") for one in (kernel, *others)}
    names.add(launch.kept_as(kernel, None, "sm_80"))
    assert len(names) == 4
    assert None not in names


@pytest.mark.assembler
@needs_assembler
def test_liveness_is_what_numba_finds(monkeypatch, tmp_path):
    from numba.cuda.core import analysis

    monkeypatch.setenv("SKIP_SOFTMAX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "_last", ())
    theirs, ours, seen = analysis.compute_live_map, compiler.live_at_entry, []

    def both(*arguments):
        found = ours(*arguments)
        assert found == theirs(*arguments)
        seen.append(found)
        return found

    monkeypatch.setattr(compiler, "live_at_entry", both)
    launch.build(gemm.make_kernel(BF16, 1), MATRICES, "sm_90a")
    assert any(len(live) > 20 and any(live.values()) for live in seen)
    assert analysis.compute_live_map is theirs


@pytest.mark.assembler
@needs_assembler
def test_numba_lowers_a_kernel_once_for_all_architectures(monkeypatch, tmp_path):
    monkeypatch.setenv("SKIP_SOFTMAX_CACHE_DIR", str(tmp_path))
    kernel, alone = gemm.make_kernel(BF16, 1), {}
    for arch in ("sm_80", "sm_120a"):
        monkeypatch.setattr(launch, "_last", ())
        alone[arch] = launch._compile(kernel, MATRICES, arch).cubin
    monkeypatch.setattr(compiler, "quicker_liveness", None)  # it would be called again
    monkeypatch.setattr(launch, "_last", launch._last)
    for arch, cubin in alone.items():
        assert sass(launch._compile(kernel, MATRICES, arch).cubin, tmp_path) == sass(
            cubin, tmp_path
        )


def sass(cubin, tmp_path):
    """Instructions of machine code: the kernel's own name counts what Numba made before."""
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    listing = launch._run("nvdisasm", "--print-code", tmp_path / "kernel.cubin")
    found = re.findall(r"/\*[0-9a-f]{4}\*/\s+(.*?;)", listing)
    assert len(found) > 100
    return found


@pytest.mark.gpu
def test_a_kept_build_runs_on_the_gpu(monkeypatch, tmp_path):
    if detect().kind != "gpu":
        pytest.skip(detect().reason or "the CUDA simulator is no GPU")
    cupy = pytest.importorskip("cupy")
    from on_gpu import launch as launch_once

    monkeypatch.setenv("SKIP_SOFTMAX_CACHE_DIR", str(tmp_path))
    a = cupy.full((64, 64), 0x3F80, cupy.uint16)  # 1.0 in bfloat16
    kernel = gemm.make_kernel(BF16, 1)
    for kept in (False, True):
        launch.load.cache_clear()
        if kept:
            monkeypatch.setattr(launch, "_compile", lambda *_: pytest.fail("it was kept"))
        c = cupy.zeros((64, 64), cupy.float32)
        launch_once(kernel, MATRICES, (1,), gemm.THREADS, gemm.SHARED_BYTES, a, a, c)
        assert (c == 64).all()
