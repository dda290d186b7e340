"""The blocks that kernels run in: threads, shared memory, boxes that TMA copies.

A launch needs to know no more of a kernel whose machine code is there: so this loads no compiler.
"""
