"""The layer's machine code for every architecture, with no GPU: in registers, with its opcodes."""

import numpy as np
import pytest
from probes import PROBES

from cuda_kernels.launch import ARCHITECTURES, Resources, assemble, why_not_assemble
from cuda_kernels.ptx import language as ptx
from cuda_kernels.ptx.instruction import WrongUse, instruction
from cuda_kernels.ptx.language import cuda, f32, u32
from cuda_kernels.resources import Configuration, format_table, resource_table

MATRIX = "uint16[:,::1]"
ATTENTION = [
    Configuration(
        name=f"small_attention {head_dim}, {keys} keys",
        factory="small_attention:kernel_alone",
        arguments=(head_dim, keys, 4, ptx.BF16),
        signature=f"void({MATRIX}, {MATRIX}, {MATRIX}, {MATRIX}, float32)",
        opcodes=("HMMA", "LDSM", "LDGSTS", "MUFU.EX2", "SHFL", "STG.E.128", "LDS.128"),
        architectures=architectures,
    )
    for head_dim, keys, architectures in (
        (64, 128, ("sm_80", "sm_90a", "sm_100a", "sm_120a")),
        (128, 64, ("sm_86", "sm_89")),
    )
]
CODE = {
    "mma_m16n8k16 f16": ("HMMA.16816.F32",),
    "mma_m16n8k16 bf16": ("HMMA.16816.F32.BF16",),
    "ldmatrix": ("LDSM.16.M88.4", "LDSM.16.MT88.4", "LDSM.16.M88.2", "LDSM.16.MT88.2"),
    "cp.async": ("LDGSTS.E.BYPASS", "LDGDEPBAR", "DEPBAR"),
    "loads and stores": ("LDG.E.128", "STG.E.128", "LDS.128", "STS", "MEMBAR"),
    "ex2": ("MUFU.EX2",),
    "rcp": ("MUFU.RCP",),
    "fours": ("LDS.128", "STS.128"),
    "pack f16": ("F2FP",),
    "pack bf16": ("F2FP.BF16",),
    "bit casts": ("FMNMX",),
    "exchanges": ("SHFL.BFLY", "SHFL.IDX", "VOTE"),
    "barriers": ("BAR.RED.AND", "BAR.RED.OR", "BAR.RED.POPC", "BAR.ARV", "BAR.SYNC"),
}
needs_assembler = pytest.mark.skipif(bool(why_not_assemble()), reason=str(why_not_assemble()))


@pytest.mark.assembler
@needs_assembler
def test_small_attention_stays_in_registers(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIP_SOFTMAX_CACHE_DIR", str(tmp_path))
    rows = resource_table(ATTENTION)
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    for row in rows:
        assert row["faults"] == []
        assert row["stack"] == row["spill_stores"] == row["spill_loads"] == 0
        assert 100 < row["registers"] <= 255
    assert len(format_table(rows).splitlines()) == 7
    # Remembered: nothing is assembled the second time.
    monkeypatch.setattr("cuda_kernels.resources.assemble", None)
    assert resource_table(ATTENTION, processes=1) == rows
    assert resource_table(ATTENTION, processes=1, architectures=["sm_89"]) == rows[-1:]


@pytest.mark.assembler
@needs_assembler
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
@pytest.mark.parametrize("arch", ["sm_80", "sm_120a"])
def test_instructions_are_what_they_say(probe, arch):
    made = assemble(probe.kernel, probe.signature, arch)
    assert made.faults() == []
    for opcode in CODE[probe.name]:
        assert any(name.startswith(opcode) for name in made.opcodes), (opcode, made.opcodes)


@pytest.mark.assembler
@needs_assembler
def test_all_architectures_take_mma():
    for arch in ARCHITECTURES:
        made = assemble(PROBES[0].kernel, PROBES[0].signature, arch)
        assert made.count("HMMA") == 1
        assert made.stack == 0


@pytest.mark.assembler
@needs_assembler
def test_a_stack_frame_is_a_fault():
    @cuda.jit
    def indexed_at_run_time(out, n):
        tile = cuda.local.array(64, f32)
        for i in range(n):
            tile[i] = f32(i)
        out[0] = tile[n - 1]

    made = assemble(indexed_at_run_time, "void(float32[::1], int64)", "sm_80")
    assert "stack frame of 256 bytes" in made.faults()[0]


def resources(**changes):
    fields = {
        "kernel": "k", "arch": "sm_90a", "registers": 100, "stack": 0, "spill_stores": 0,
        "spill_loads": 0, "shared_bytes": 0, "opcodes": {"HGMMA.64x128x16": 4}, "messages": [],
    }  # fmt: skip
    return Resources(**(fields | changes))


def test_faults():
    configuration = Configuration("k", "m:f", (), "", max_registers=128, opcodes=("HGMMA",))
    assert configuration.faults(resources()) == []
    assert "129 registers" in configuration.faults(resources(registers=129))[0]
    assert configuration.faults(resources(opcodes={"HMMA.1": 4})) == ["no HGMMA"]
    assert "8 bytes out" in configuration.faults(resources(spill_stores=8))[0]
    serialised = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async ... serialized"
    assert configuration.faults(resources(messages=[serialised])) == [serialised]


def test_no_such_architecture():
    with pytest.raises(ValueError, match=r"arch must be one of .*, got 'sm_70'"):
        resource_table(architectures=["sm_70"])


# --- wrong use is caught when the kernel is compiled, each in one sentence

SIGNATURE = "void(float32[::1], uint32[::1], int64)"


@cuda.jit
def literal_wanted(x, r, n):
    ptx.cp_async_wait(n)


@cuda.jit
def format_unknown(x, r, n):
    r[0] = ptx.pack(x[0], x[1], 2)


@cuda.jit
def integer_for_float(x, r, n):
    x[0] = ptx.ex2(n)


@cuda.jit
def float_for_integer(x, r, n):
    r[0] = ptx.ballot(x[0])


@cuda.jit
def too_few(x, r, n):
    ptx.bar_sync(1)


@cuda.jit
def tile_of_wrong_type(x, r, n):
    tile = cuda.local.array(4, f32)
    ptx.ldmatrix_x4(tile, r[0])


@cuda.jit
def scalar_for_tile(x, r, n):
    ptx.ldmatrix_x4(r[0], r[0])


@cuda.jit
def wrong_index(x, r, n):
    r[0] = u32(ptx.global_address(x, (0, 0)))


@instruction("wgmma.fence.sync.aligned;", memory=True, target="sm_90a")
def hopper_only():
    """Only Hopper has it.  PTX ISA: wgmma.fence."""


@cuda.jit
def lacking(x, r, n):
    hopper_only()


WRONG = [
    (literal_wanted, "cp_async_wait: pending must be known when the kernel is compiled"),
    (format_unknown, r"pack: dtype must be F16 \(0\) or BF16 \(1\), got 2"),
    (integer_for_float, "ex2: x must be a float, got int64"),
    (float_for_integer, "ballot: predicate must be an integer, got float32"),
    (too_few, r"bar_sync takes 2 arguments \(name, count\), got 1"),
    (tile_of_wrong_type, "ldmatrix_x4: r must be a contiguous register tile of 4 uint32, got"),
    (scalar_for_tile, "ldmatrix_x4: r must be a contiguous register tile of 4 uint32, got uint32"),
    (wrong_index, r"global_address: the index must be 1 integer"),
    (lacking, "hopper_only needs sm_90a; this kernel is compiled for sm_80"),
]


@pytest.mark.assembler
@needs_assembler
@pytest.mark.parametrize(("kernel", "message"), WRONG, ids=lambda x: getattr(x, "__name__", ""))
def test_wrong_use_is_one_sentence(kernel, message):
    with pytest.raises(WrongUse, match=f"^{message}[^\n]*$"):
        assemble(kernel, SIGNATURE, "sm_80")


@pytest.mark.assembler
@needs_assembler
def test_an_instruction_of_one_architecture():
    assert assemble(lacking, SIGNATURE, "sm_90a").count("WARPGROUP") == 1
    with pytest.raises(WrongUse, match="sm_100a"):
        assemble(lacking, SIGNATURE, "sm_100a")


@instruction(lambda n: "add.f32 $0, $2, 0f3F800000; mov.b32 $1, $2;" if n else "", "=f,=f,f,n")
def pair(x, n):
    """Return x + 1 and x.  PTX ISA: add."""


@instruction(
    lambda n: " ".join(f"wgmma.fence.sync.aligned; // {n} $0" for _ in range(1)),
    lambda n: f"+{n}f,n",
    target="sm_90a",
)
def sized(tile, n):
    """Take a register tile whose size a literal chooses, as wgmma will."""


@pytest.mark.assembler
@needs_assembler
def test_forms_chosen_by_a_literal():
    @cuda.jit
    def kernel(x, r, n):
        tile = cuda.local.array((4, 4), f32)
        for j in range(4):
            for i in range(4):
                tile[j, i] = x[4 * j + i]
        sized(tile, 16)
        a, b = pair(tile[3, 3], 1)
        x[0], x[1] = a, b

    made = assemble(kernel, SIGNATURE, "sm_90a")
    assert made.faults() == []
    assert [operand.count for operand in sized.operands({"n": 8})] == [8, None]


def test_no_such_arch_name():
    with pytest.raises(ValueError, match="arch must look like sm_80 or sm_90a, got 'ampere'"):
        assemble(PROBES[0].kernel, PROBES[0].signature, "ampere")


def test_constraints_and_parameters_must_agree():
    with pytest.raises(ValueError, match="has 2 parameters, its constraints 1"):

        @instruction("add.f32 $0, $1, $2;", "=f,f")
        def add(x, y):
            """Wrong."""

    with pytest.raises(ValueError, match="no such constraint: '=q'"):

        @instruction("", "=q")
        def nothing():
            """Wrong."""

    assert np.float32(ptx.ex2(1.0)) == 2
