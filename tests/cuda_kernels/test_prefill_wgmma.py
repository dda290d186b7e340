"""What only the Hopper kernel has: shared copies of two vote groups, and a pipeline to protect."""

import contract
import numpy as np
import pytest
from cases import Case
from run_cases import run

from cuda_kernels import backends, prefill_wgmma
from cuda_kernels.blocks.grid import KEYS, ROWS
from cuda_kernels.blocks.prefill_wgmma import blocks
from cuda_kernels.emulator import emulate
from cuda_kernels.launch import _run, build, why_not_assemble
from cuda_kernels.prefill_wgmma import first_row_of
from cuda_kernels.ptx.language import cuda
from cuda_kernels.tiles import columns_seen
from sim.geometry import Grid

GRID = {"tile": (ROWS, KEYS), "d": 64, "dv": 64}
SHARED = [  # groups of a block that would end in different tiles, were blocks not moved
    Case("moved", lq=130, lk=190, threshold=0.3, **GRID),
    Case("moved, ascending", lq=140, lk=330, order="ascending", threshold=0.3, **GRID),
    Case("not moved", lq=66, lk=260, threshold=0.5, **GRID),
]


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_emulated_groups_that_share_copies(case):
    settings = {"emulate": True, "gap": True, "backend": "wgmma"}
    contract.check(case, case.tensors(), *run(case, case.threshold, **settings))


def first_rows(rows, lq, lk):
    """Kernel: the first row of every block."""
    for block in range(rows.shape[0]):
        rows[block] = first_row_of(block, lq, lk, True)


@pytest.mark.parametrize("lq", [1, 64, 65, 200, 512])
@pytest.mark.parametrize("more", [-300, -64, -1, 0, 1, 50, 64, 65, 127, 128, 200])
def test_groups_of_a_block_end_in_the_same_key_tile(lq, more):
    lk = max(lq + more, 1)
    grid = Grid((ROWS, KEYS), lq, lk, True)
    rows = np.zeros(blocks(grid.groups, True), np.int32)
    emulate(first_rows, 1, 1, rows, lq, lk, schedule="late")
    last_rows = {g: min(ROWS * (g + 1), lq) - 1 for g in range(grid.groups)}
    ends = {g: -(-int(grid.visible()[row]) // KEYS) for g, row in last_rows.items()}
    found = []
    for row in rows.tolist():
        groups = [g for g in (row // ROWS, row // ROWS + 1) if g in ends]
        assert len({ends[g] for g in groups}) <= 1
        found += groups
    assert found == sorted(ends)


def counts(found, columns, firsts, ends):
    """Kernel: how many of its keys a thread sees."""
    i = cuda.threadIdx.x
    found[i] = columns_seen(columns[i], 16, firsts[i], ends[i])


def test_keys_seen_are_counted_without_looking_at_them():
    rng = np.random.default_rng(0)
    columns = (2 * rng.integers(0, 4, 256) + 128 * rng.integers(0, 3, 256)).astype(np.int32)
    firsts, ends = (rng.integers(-200, 400, (2, 256))).astype(np.int32)
    found = np.zeros(256, np.float32)
    emulate(counts, 1, 256, found, columns, firsts, ends, schedule="late")
    keys = columns[:, None] + (8 * np.arange(16)[:, None] + np.arange(2)).reshape(-1)
    inside = (keys >= firsts[:, None]) & (keys < ends[:, None])
    assert np.array_equal(found, inside.sum(axis=1))
    assert found.max() > 0
    assert set(np.unique(found)) >= {0, 6, 32}


def test_only_hopper_and_only_if_asked():
    hopper = backends.Device("gpu", "", "NVIDIA H200", (9, 0))
    blackwell = backends.Device("gpu", "", "NVIDIA B200", (10, 0))
    assert backends.choose(None, hopper, fits_tensor_cores=True) == "mma"
    assert backends.choose("wgmma", hopper, fits_tensor_cores=True) == "wgmma"
    with pytest.raises(RuntimeError, match=r"the wgmma kernel cannot run on NVIDIA B200: .* 9\.0"):
        backends.choose("wgmma", blackwell, fits_tensor_cores=True)


@pytest.mark.assembler
@pytest.mark.skipif(bool(why_not_assemble()), reason=str(why_not_assemble()))
@pytest.mark.parametrize("skip", [False, True], ids=["dense", "skip"])
def test_exponentials_stand_between_the_products(skip, tmp_path):
    """The assembler could wait for P V before them, and nothing ran beside that product."""
    kernel = prefill_wgmma.make_kernel(128, 128, 1, skip, False)
    (tmp_path / "cubin").write_bytes(build(kernel, prefill_wgmma.SIGNATURE, "sm_90a").cubin)
    code = _run("nvdisasm", "--print-code", tmp_path / "cubin").splitlines()
    lines = [line for line in code if "MUFU.EX2" in line or "WARPGROUP.DEPBAR" in line]
    runs, run_ = [], 0
    for line in lines:
        if "MUFU" in line:
            run_ += 1
        else:
            runs.append(run_)
            run_ = 0
    assert max(runs) >= 45  # of 66, before the wait that follows them
