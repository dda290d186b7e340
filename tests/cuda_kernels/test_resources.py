"""The gate: every kernel configuration assembles for every architecture it claims, in registers."""

import pytest

from cuda_kernels.launch import why_not_assemble
from cuda_kernels.resources import CONFIGURATIONS, SHARED, resource_table


@pytest.mark.assembler
@pytest.mark.skipif(bool(why_not_assemble()), reason=str(why_not_assemble()))
@pytest.mark.timeout(1200)
def test_every_configuration_assembles_in_registers():
    rows = resource_table()
    assert len(rows) == sum(len(one.architectures) for one in CONFIGURATIONS) > 50
    for row in rows:
        assert row["faults"] == [], row
        if row["kernel"].startswith("decode_mma"):
            assert row["stack"] == row["spill_stores"] == row["spill_loads"] == 0, row
            assert row["shared_bytes"] <= SHARED[row["arch"]] - 1024  # what a block can have
        if row["kernel"].startswith("prefill_mma"):
            assert row["stack"] == row["spill_stores"] == row["spill_loads"] == 0, row
            assert row["registers"] <= 255
            # two blocks share the 228 KB of a multiprocessor; sm_80 has room for one
            assert row["shared_bytes"] <= 114 * 1024
