"""PTX instructions as Python functions: assembly text for the GPU, a model for the CPU.

Kernels import from :mod:`cuda_kernels.ptx.language`; the families below it are the reference.

==============  ================================================
``matrix``      mma.sync, ldmatrix, stmatrix: who holds what
``copies``      cp.async and its groups
``memory``      addresses, 128-bit loads and stores
``barriers``    named barriers that wait and vote, fences
``warp``        shuffles and votes
``arithmetic``  ex2, packed conversions, bit casts
==============  ================================================

and Hopper's:

==============  ================================================
``wgmma``       products by four warps, from shared memory
``tma``         copies of whole boxes, begun by one thread
``mbarrier``    barriers that count threads and bytes
``registers``   registers that change hands
==============  ================================================

A new instruction is one decorated function: see :mod:`cuda_kernels.ptx.instruction`.
"""
