"""Every kernel configuration for every architecture it claims: registers, stack, spills, shared.

:func:`resource_table` assembles them in parallel, with no GPU, and remembers the figures by the
kernel's source: the second time costs nothing.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from typing import Any

from cuda_kernels import disk_cache
from cuda_kernels.launch import ARCHITECTURES, Resources, assemble, why_not_assemble


@dataclass(frozen=True)
class Configuration:
    """A kernel as it is built for one choice of compile-time values.

    Attributes
    ----------
    name : str
        Shown in the table.
    factory : str
        ``module:function`` that returns the ``@cuda.jit`` kernel.
    arguments : tuple
        Of the factory.
    signature : str
        Types of the kernel's arguments.
    shared_bytes : int
        Dynamic shared memory of a block.
    max_registers : int
        The most registers a thread may take for the blocks per SM that the kernel counts on.
    opcodes : tuple of str
        Instructions without which it is not the kernel meant, such as ``HMMA``.
    in_registers : bool
        Whether a stack frame or a spill is a fault.
    architectures : tuple of str
    """

    name: str
    factory: str
    arguments: tuple[Any, ...]
    signature: str
    shared_bytes: int = 0
    max_registers: int = 255
    opcodes: tuple[str, ...] = ()
    in_registers: bool = True
    architectures: tuple[str, ...] = ARCHITECTURES

    def kernel(self) -> Any:
        """Build the kernel."""
        module, function = self.factory.split(":")
        return getattr(importlib.import_module(module), function)(*self.arguments)

    def faults(self, resources: Resources) -> list[str]:
        """List what keeps machine code from being what this configuration asks for."""
        found = resources.faults() if self.in_registers else []
        if resources.registers > self.max_registers:
            found.append(f"{resources.registers} registers, more than {self.max_registers}")
        found += [f"no {opcode}" for opcode in self.opcodes if not resources.count(opcode)]
        return found


SHARED = {
    "sm_80": 164 << 10,
    "sm_86": 100 << 10,
    "sm_89": 100 << 10,
    "sm_90a": 228 << 10,
    "sm_100a": 228 << 10,
    "sm_120a": 100 << 10,
}
"""Bytes of shared memory of a multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

_ROWS, _VALUES = "float32[:,:,:,::1]", "float32[:,:,::1]"


def _words(head_dim: int, v_head_dim: int, dtype: str, skip: bool, gap: bool) -> str:
    sizes = f"{head_dim}" if head_dim == v_head_dim else f"{head_dim}/{v_head_dim}"
    build = ("skip" if skip else "dense") + (", gaps" if gap else "")
    return f"head_dim {sizes}, {dtype}, {build}"


def _mma(
    head_dim: int, v_head_dim: int, dtype: str, skip: bool, gap: bool
) -> Iterator[Configuration]:
    from cuda_kernels.blocks.prefill_mma import shared_bytes
    from cuda_kernels.prefill_mma import SIGNATURE

    # head_dim 192 needs more shared memory than the others have; F16 and the build with gaps differ
    # from BF16 and the skip build in a few instructions, so one architecture must do for them
    claimed: tuple[str, ...] = ARCHITECTURES if head_dim <= 128 else ("sm_80", "sm_90a", "sm_100a")
    if gap or dtype == "f16":
        claimed = ("sm_90a",)
    yield Configuration(
        name=f"prefill_mma {_words(head_dim, v_head_dim, dtype, skip, gap)}",
        factory="cuda_kernels.prefill_mma:make_kernel",
        arguments=(head_dim, v_head_dim, ("f16", "bf16").index(dtype), skip, gap),
        signature=SIGNATURE,
        shared_bytes=shared_bytes(head_dim, v_head_dim),
        opcodes=("HMMA", "LDSM", "LDGSTS", "MUFU.EX2", "VOTE"),
        architectures=claimed,
    )


def _wgmma(
    head_dim: int, v_head_dim: int, dtype: str, skip: bool, gap: bool
) -> Iterator[Configuration]:
    from cuda_kernels.blocks.prefill_wgmma import shared_bytes
    from cuda_kernels.prefill_wgmma import SIGNATURE

    yield Configuration(
        name=f"prefill_wgmma {_words(head_dim, v_head_dim, dtype, skip, gap)}",
        factory="cuda_kernels.prefill_wgmma:make_kernel",
        arguments=(head_dim, v_head_dim, ("f16", "bf16").index(dtype), skip, gap),
        signature=SIGNATURE,
        shared_bytes=shared_bytes(head_dim, v_head_dim),
        max_registers=168,  # of 384 threads; then producers give theirs to consumers
        opcodes=("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "MUFU.EX2", "SYNCS"),
        architectures=("sm_90a",),
    )


def _decode(
    head_dim: int, keys: int, dtype: str, skip: bool, gap: bool, architectures: tuple[str, ...]
) -> Iterator[Configuration]:
    from cuda_kernels.blocks.decode_mma import choose_stages, shared_bytes
    from cuda_kernels.decode_mma import SIGNATURE

    by_stages: dict[int, list[str]] = defaultdict(list)
    for arch in architectures:
        by_stages[choose_stages(head_dim, keys, SHARED[arch])].append(arch)
    words = _words(head_dim, head_dim, dtype, skip, gap)
    for stages, alike in by_stages.items():
        yield Configuration(
            name=f"decode_mma {keys} keys, {stages} stage{'s' * (stages > 1)}, {words}",
            factory="cuda_kernels.decode_mma:make_kernel",
            arguments=(head_dim, keys, ("f16", "bf16").index(dtype), skip, gap, stages),
            signature=SIGNATURE,
            shared_bytes=shared_bytes(head_dim, keys, stages),
            opcodes=("HMMA", "LDSM", "LDGSTS", "MUFU.EX2") + ("VOTE",) * skip,
            architectures=tuple(alike),
        )


CONFIGURATIONS: tuple[Configuration, ...] = (
    *(
        configuration
        for sizes in ((64, 64), (128, 128), (192, 128))
        for dtype, skip, gap in (
            ("bf16", True, False),
            ("bf16", False, False),
            *((("bf16", True, True), ("f16", True, False)) if sizes[0] < 192 else ()),
        )
        for configuration in (*_mma(*sizes, dtype, skip, gap), *_wgmma(*sizes, dtype, skip, gap))
    ),
    # decode's default tile for every architecture; of the rest what differs
    *(
        configuration
        for build in (
            (128, 64, "bf16", True, False, ARCHITECTURES),
            (128, 128, "bf16", True, False, ("sm_90a", "sm_120a")),
            (128, 128, "bf16", True, True, ("sm_120a",)),
            (128, 128, "bf16", False, False, ("sm_90a",)),
            (128, 128, "f16", True, False, ("sm_90a",)),
            (64, 64, "bf16", True, False, ("sm_90a",)),
            (64, 128, "bf16", True, False, ("sm_90a",)),
        )
        for configuration in _decode(*build)
    ),
    Configuration(
        name="bandwidth: reads and nothing else",
        factory="cuda_kernels.bandwidth:make_kernel",
        arguments=(),
        signature="void(int16[::1], int16[::1], uint32[::1])",
        opcodes=("LDG",),
        architectures=("sm_90a",),
    ),
    *(
        Configuration(
            name=f"gemm 64×64×64, {dtype}, B [{layout}]",
            factory="cuda_kernels.gemm:make_kernel",
            arguments=(("f16", "bf16").index(dtype), b_is_n_by_k),
            signature="void(uint16[:,:], uint16[:,:], float32[:,::1])",
            shared_bytes=32768,
            max_registers=128,
            opcodes=("HMMA", "LDSM", "LDGSTS"),
        )
        for dtype, layout, b_is_n_by_k in (("f16", "N, K", 1), ("bf16", "K, N", 0))
    ),
    *(
        Configuration(
            name=f"gemm_wgmma 128×128×64, {dtype}, B [{layout}]",
            factory="cuda_kernels.gemm_wgmma:make_kernel",
            arguments=(("f16", "bf16").index(dtype), b_is_n_by_k),
            signature="void(tensor_map, tensor_map, float32[:,:], int32)",
            shared_bytes=131136,
            max_registers=168,
            opcodes=("HGMMA", "UTMALDG", "USETMAXREG"),
            architectures=("sm_90a",),
        )
        for dtype, layout, b_is_n_by_k in (("f16", "N, K", 1), ("bf16", "K, N", 0))
    ),
    Configuration(
        name="prefill_simt 64×128, head_dim 64",
        factory="cuda_kernels.prefill_simt:make_kernel",
        arguments=(64, 128, 64, 64),
        signature=f"void({_ROWS}, {_ROWS}, {_ROWS}, float32, float32[:,::1], boolean, int64, "
        f"{_ROWS}, {_VALUES}, {_VALUES}, uint8[:,:,:,::1], {_ROWS})",
        in_registers=False,  # its arrays are indexed at run time, as a first kernel's are
    ),
)
"""What ``skip-softmax kernels`` lists."""


def resource_table(
    configurations: Iterable[Configuration] = CONFIGURATIONS,
    *,
    architectures: Sequence[str] | None = None,
    processes: int | None = None,
) -> list[dict[str, Any]]:
    """Assemble kernels and list what they take.

    Parameters
    ----------
    configurations : iterable of Configuration
    architectures : sequence of str, optional
        Only these.
    processes : int, optional
        Compilers at a time; default one per CPU.

    Returns
    -------
    list of dict
        A row per configuration and architecture: ``kernel``, ``arch``, ``registers``, ``stack``,
        ``spill_stores``, ``spill_loads`` (bytes per thread), ``shared_bytes`` (of a block, static
        and dynamic) and ``faults`` (sentences; empty where the build is as it should be).

    Raises
    ------
    RuntimeError
        If nothing can be assembled here; says what is missing.
    ValueError
        If an architecture is one that no kernel claims.
    """
    chosen = list(configurations)
    claimed = {arch for configuration in chosen for arch in configuration.architectures}
    for arch in architectures or ():
        if arch not in claimed:
            raise ValueError(f"arch must be one of {', '.join(sorted(claimed))}, got {arch!r}")
    builds = [
        (configuration, arch)
        for configuration in chosen
        for arch in configuration.architectures
        if architectures is None or arch in architectures
    ]
    found = {build: _remembered(*build) for build in builds}
    groups: dict[Any, list[tuple[Configuration, str]]] = defaultdict(list)
    for build, resources in found.items():
        if resources is None:  # one process compiles a kernel for all architectures
            groups[build[0].factory, build[0].arguments, build[0].signature].append(build)
    missing = list(groups.values())
    if missing:
        reason = why_not_assemble()
        if reason is not None:
            raise RuntimeError(reason)
        workers = min(processes or os.cpu_count() or 1, len(missing))
        if workers == 1:
            made = [_assemble_all(group) for group in missing]
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                made = list(pool.map(_assemble_all, missing))
        for group, results in zip(missing, made, strict=True):
            found.update(zip(group, results, strict=True))
    return [
        {
            "kernel": configuration.name,
            "arch": arch,
            "registers": resources.registers,
            "stack": resources.stack,
            "spill_stores": resources.spill_stores,
            "spill_loads": resources.spill_loads,
            "shared_bytes": resources.shared_bytes + configuration.shared_bytes,
            "faults": configuration.faults(resources),
        }
        for (configuration, arch), resources in found.items()
        if resources is not None
    ]


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of :func:`resource_table` as text in columns.

    Examples
    --------
    >>> row = {"kernel": "k", "arch": "sm_80", "registers": 32, "stack": 0, "spill_stores": 0}
    >>> row |= {"spill_loads": 0, "shared_bytes": 0, "faults": []}
    >>> print(format_table([row]))
    kernel  arch   registers  stack  spill stores  spill loads  shared bytes
    k       sm_80         32      0             0            0             0
    """
    names = [
        *("kernel", "arch", "registers", "stack"),
        *("spill_stores", "spill_loads", "shared_bytes"),
    ]
    cells = [[name.replace("_", " ") for name in names]]
    cells += [[str(row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = []
    for line, row in zip(cells, [{}, *rows], strict=True):
        columns = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join([*columns, *row.get("faults", [])]).rstrip())
    return "\n".join(lines)


def _assemble_all(builds: Sequence[tuple[Configuration, str]]) -> list[Resources]:
    """Assemble one kernel for some architectures, and remember what came of it."""
    results = []
    kernel = builds[0][0].kernel()
    for configuration, arch in builds:
        made = asdict(assemble(kernel, configuration.signature, arch))
        resources = Resources(**{field.name: made[field.name] for field in fields(Resources)})
        if name := _name(configuration, arch):
            disk_cache.write("figures", name, json.dumps(asdict(resources)).encode())
        results.append(resources)
    return results


def _remembered(configuration: Configuration, arch: str) -> Resources | None:
    name = _name(configuration, arch)
    kept = name and disk_cache.read("figures", name)
    return Resources(**json.loads(kept)) if kept else None


def _name(configuration: Configuration, arch: str) -> str | None:
    module, function = configuration.factory.split(":")
    return disk_cache.entry_name(
        ("cuda_kernels.launch", module),
        function, configuration.arguments, configuration.signature, arch,
    )  # fmt: skip
