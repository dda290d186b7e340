"""Everything that a kernel imports: ``cuda``, the scalar types and every instruction.

Kernels, the emulator and the timeline import with no GPU, with no numba-cuda (macOS), and under
``NUMBA_ENABLE_CUDASIM=1``; only launching needs more.  Scalar types cast, with wrap-around, when
called: ``u32(x)``.
"""

from cuda_kernels.ptx.arithmetic import anew, bits_float, ex2, float_bits, pack, rcp
from cuda_kernels.ptx.barriers import (
    bar_arrive,
    bar_red_and,
    bar_red_or,
    bar_red_popc,
    bar_sync,
    fence_block,
    fence_gpu,
    mark_tile,
)
from cuda_kernels.ptx.compiler import COMPILES, cuda
from cuda_kernels.ptx.compiler import float16 as f16
from cuda_kernels.ptx.compiler import float32 as f32
from cuda_kernels.ptx.compiler import float64 as f64
from cuda_kernels.ptx.compiler import int32 as i32
from cuda_kernels.ptx.compiler import int64 as i64
from cuda_kernels.ptx.compiler import uint8 as u8
from cuda_kernels.ptx.compiler import uint16 as u16
from cuda_kernels.ptx.compiler import uint32 as u32
from cuda_kernels.ptx.compiler import uint64 as u64
from cuda_kernels.ptx.copies import (
    cp_async_16,
    cp_async_16_zfill,
    cp_async_16_zfill_if,
    cp_async_commit,
    cp_async_wait,
)
from cuda_kernels.ptx.extrema import fmax
from cuda_kernels.ptx.fragment import cpu_body, fragment
from cuda_kernels.ptx.halves import BF16, F16
from cuda_kernels.ptx.matrix import (
    ldmatrix_x2,
    ldmatrix_x2_trans,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mma_m16n8k16,
    stmatrix_x4,
)
from cuda_kernels.ptx.mbarrier import (
    fence_mbarrier_init,
    fence_proxy_async,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_try_wait,
    mbarrier_wait,
)
from cuda_kernels.ptx.memory import (
    global_address,
    ld_global_128,
    ld_global_nc_128,
    ld_shared_4f,
    ld_shared_32,
    ld_shared_128,
    shared_address,
    st_global_32,
    st_global_128,
    st_shared_4f,
    st_shared_32,
    st_shared_128,
    st_shared_relaxed_32,
)
from cuda_kernels.ptx.registers import setmaxnreg_dec, setmaxnreg_inc
from cuda_kernels.ptx.tensor_map import TensorMap
from cuda_kernels.ptx.tma import (
    elect_one,
    swizzle,
    tma_commit,
    tma_load_2d,
    tma_load_3d,
    tma_load_4d,
    tma_load_5d,
    tma_prefetch,
    tma_store_2d,
    tma_store_4d,
    tma_wait_read,
)
from cuda_kernels.ptx.warp import (
    ballot,
    shfl_bfly_f32,
    shfl_bfly_u32,
    shfl_idx_u32,
    sync_warp,
    vote_all,
    vote_any,
)
from cuda_kernels.ptx.wgmma import (
    K_MAJOR,
    MN_MAJOR,
    k_major,
    mn_major,
    wgmma_commit,
    wgmma_fence,
    wgmma_rs,
    wgmma_ss,
    wgmma_wait,
)

__all__ = [
    "BF16",
    "COMPILES",
    "F16",
    "K_MAJOR",
    "MN_MAJOR",
    "TensorMap",
    "anew",
    "ballot",
    "bar_arrive",
    "bar_red_and",
    "bar_red_or",
    "bar_red_popc",
    "bar_sync",
    "bits_float",
    "cp_async_16",
    "cp_async_16_zfill",
    "cp_async_16_zfill_if",
    "cp_async_commit",
    "cp_async_wait",
    "cpu_body",
    "cuda",
    "elect_one",
    "ex2",
    "f16",
    "f32",
    "f64",
    "fence_block",
    "fence_gpu",
    "fence_mbarrier_init",
    "fence_proxy_async",
    "float_bits",
    "fmax",
    "fragment",
    "global_address",
    "i32",
    "i64",
    "k_major",
    "ld_global_128",
    "ld_global_nc_128",
    "ld_shared_4f",
    "ld_shared_32",
    "ld_shared_128",
    "ldmatrix_x2",
    "ldmatrix_x2_trans",
    "ldmatrix_x4",
    "ldmatrix_x4_trans",
    "mark_tile",
    "mbarrier_arrive",
    "mbarrier_arrive_expect_tx",
    "mbarrier_init",
    "mbarrier_try_wait",
    "mbarrier_wait",
    "mma_m16n8k16",
    "mn_major",
    "pack",
    "rcp",
    "setmaxnreg_dec",
    "setmaxnreg_inc",
    "shared_address",
    "shfl_bfly_f32",
    "shfl_bfly_u32",
    "shfl_idx_u32",
    "st_global_32",
    "st_global_128",
    "st_shared_4f",
    "st_shared_32",
    "st_shared_128",
    "st_shared_relaxed_32",
    "stmatrix_x4",
    "swizzle",
    "sync_warp",
    "tma_commit",
    "tma_load_2d",
    "tma_load_3d",
    "tma_load_4d",
    "tma_load_5d",
    "tma_prefetch",
    "tma_store_2d",
    "tma_store_4d",
    "tma_wait_read",
    "u8",
    "u16",
    "u32",
    "u64",
    "vote_all",
    "vote_any",
    "wgmma_commit",
    "wgmma_fence",
    "wgmma_rs",
    "wgmma_ss",
    "wgmma_wait",
]
