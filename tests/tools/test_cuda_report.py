"""The report on compiled CUDA kernels, and what it says of one architecture each."""

import shutil
from dataclasses import replace

import pytest

from tools import cuda_report as report

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_disassembler = pytest.mark.skipif(report.disassembler() is None, reason="no cuobjdump")
ROW = "sm90/row_bf16.cu"

DECODE = "_ZN2mk4cuda13decode_kernelINS0_4Bf16ELi1EEEvNS0_6ParamsE"
ROW_KERNEL = "_ZN2mk4cuda4sm9010row_kernelILb1ELi128ELi2EEEvNS1_7RowMapsENS1_9RowParamsEi"
LOG = f"""\
ptxas info    : Compiling entry function '{DECODE}' for 'sm_80'
ptxas info    : Function properties for {DECODE}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 125 registers, used 1 barriers, 2896 bytes cmem[0], 56 bytes cmem[2]
ptxas info    : Compiling entry function '{ROW_KERNEL}' for 'sm_90a'
ptxas info    : Function properties for {ROW_KERNEL}
    24 bytes stack frame, 28 bytes spill stores, 88 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""


def test_reads_what_ptxas_prints():
    assert report.parse_ptxas(LOG) == {
        "decode_kernel<Bf16,1>": (125, 0, 0),
        "row_kernel<bf16,128,2>": (168, 88, 24),
    }
    with pytest.raises(ValueError, match="expected a kernel"):
        report.parse_ptxas("ptxas info    : 0 bytes gmem")


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("90a", 256, 128, 98816, 2),  # shared memory and registers
        ("80", 256, 128, 98816, 1),  # shared memory
        ("90a", 128, 120, 49664, 4),  # registers, given out in eights
        ("90a", 128, 129, 1024, 3),
        ("89", 256, 32, 1024, 6),  # threads
        ("89", 256, 32, 102400, 0),  # more than a block may have
    ],
)
def test_blocks_that_fit_on_an_sm(arch, threads, registers, shared, blocks):
    assert report.resident(report.DEVICES[arch], threads, registers, shared) == blocks


def test_faults_are_told():
    good = report.Row("rows_kernel<Bf16,0>", "80", 118, 0, 0, 128, 49664, 3, 512, 0, 0, 99)
    assert good.faults == []
    assert "spills 8 B" in replace(good, spill_bytes=8).faults[0]
    assert replace(good, stack_bytes=8).faults
    assert replace(good, blocks_per_sm=0).faults == ["no block fits on an SM"]
    assert replace(good, mma=0).faults == ["no HMMA"]
    assert replace(good, kernel="decode_kernel<Ieee,1>", mma=0).faults == []
    assert replace(good, kernel="row_kernel<bf16,64,1>", mma=0).faults == ["no HGMMA"]
    assert "no HMMA" in report.table([replace(good, mma=0)])
    decode = replace(good, kernel="decode_kernel<Bf16,1>", arch="90a", waits=1, early=0)
    assert decode.faults == replace(decode, arch="80", waits=0, early=9).faults == []
    assert replace(decode, waits=0).faults == ["no wait for the kernel in front"]
    assert replace(decode, early=2).faults[0].startswith("2 accesses before the wait")


def test_what_is_counted_in_the_machine_code():
    before = ["CCTL.E.PF2 [R2]", "LDC R1, c[0x0]", "LDS R0, [R3]", "ULDC.64 UR4"]
    after = ["ATOMG.E.ADD R4, [R2], R5", "LDG.E.128 R8, [R4]", "HMMA.16816.F32 R0", "HGMMA.64x8"]
    code = ["ACQBULK", *after]
    assert report.count_instructions("\n".join([*before, *code])) == (1, 1, 1, 0)
    assert report.count_instructions("\n".join([*before, *after])) == (1, 1, 0, 2)
    for early in ("LDG.E R0, [R2]", "@P0 ST.E [R2], R0", "REDG.E.ADD [R2]", "LDGSTS.E [R4], [R2]"):
        assert report.count_instructions("\n".join([early, *code]))[3] == 1


def test_wrong_architecture_is_told(monkeypatch):
    monkeypatch.setattr(report.shutil, "which", lambda *_, **__: "nvcc")
    with pytest.raises(ValueError, match=r"archs: expected some of 80, .*got"):
        report.report(["70"])
    monkeypatch.setattr(report.shutil, "which", lambda *_, **__: None)
    with pytest.raises(FileNotFoundError, match="nvcc"):
        report.report(["80"])


@needs_nvcc
def test_two_phase_kernels_neither_spill_nor_use_local_memory():
    rows = report.report(["80", "90a"], ["decode.cu", "rows.cu"])
    assert {row.kernel for row in rows} == {
        *(
            f"decode_kernel<{op},{tiles}>"
            for op in ("Bf16", "F16", "Tf32", "Ieee")
            for tiles in (1, 4)
        ),
        *(f"rows_kernel<{op},{large}>" for op in ("Bf16", "F16", "Tf32") for large in (0, 1)),
    }
    assert not [row for row in rows if row.faults], report.table(rows)


@needs_nvcc
@needs_disassembler
@pytest.mark.skipif(not (report.SOURCE / ROW).exists(), reason=f"no {ROW}")
def test_row_kernel_uses_the_tensor_cores_of_hopper():
    rows = report.report(["90a"], [ROW])
    assert rows
    for row in rows:
        assert row.wgmma, row
        assert not row.faults, report.table(rows)
