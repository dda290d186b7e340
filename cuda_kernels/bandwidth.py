"""A kernel that reads memory and does nothing else: what any kernel bound by HBM is held against.

Every thread has eight loads of 16 bytes under way, neighbours side by side; it returns the
exclusive or of all that it read, so that a test can see that it read everything.
"""

from functools import cache

from cuda_kernels.ptx.language import cuda, global_address, i32, ld_global_nc_128, u32, u64

THREADS = 256
AT_A_TIME = 8  # loads of a thread
CHUNK = 16 * THREADS * AT_A_TIME  # bytes that a block has under way
SIGNATURE = "void(int16[::1], int16[::1], uint32[::1])"


@cache
def make_kernel():
    """Build the kernel ``read(k, v, folded)``.

    Launch with any number of blocks of ``THREADS`` threads; ``k`` and ``v`` are as long, whole
    numbers of ``CHUNK`` bytes, and ``folded`` has room for one number of each thread.
    """

    @cuda.jit(launch_bounds=THREADS)
    def read(k, v, folded):
        thread = u32(cuda.threadIdx.x)
        words = cuda.local.array((AT_A_TIME, 4), u32)
        mine = u32(0)
        chunks = i32(u32(k.shape[0]) // u32(CHUNK // 2))
        from_k, from_v = global_address(k, 0), global_address(v, 0)
        for chunk in range(i32(cuda.blockIdx.x), i32(2 * chunks), i32(cuda.gridDim.x)):
            start, place = from_k, i32(chunk)
            if chunk >= chunks:
                start, place = from_v, i32(chunk - chunks)
            at = u64(start + u64(place) * u64(CHUNK) + u64(thread * 16))
            for i in range(AT_A_TIME):
                ld_global_nc_128(words[i], u64(at + u64(16 * THREADS * i)))
            for i in range(AT_A_TIME):
                for w in range(4):
                    mine = u32(mine ^ words[i, w])
        folded[cuda.blockIdx.x * THREADS + cuda.threadIdx.x] = mine

    return read
