"""The barrier check on hand-made PTX: what must pass, and what must be caught."""

from __future__ import annotations

import pytest
from triton_support import needs_triton

pytestmark = needs_triton

HEAD = ".version 8.7\n.target sm_90a\n.visible .entry k(.param .u64 p)\n.reqntid 128\n{\n"
STORE = "st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};"
RELEASE = "@%p1 atom.global.gpu.acq_rel.add.u32 %r9, [%rd2], 1;"

SPIN = "{ .reg .pred c; wait: mbarrier.try_wait.shared.b64 c, [%r1], %r2; @!c bra.uni wait; }"


def offences(*lines):
    from tools.ptx import unguarded_releases

    return unguarded_releases(HEAD + "\n".join(lines) + "\nret;\n}\n.section .debug { .b8 1 }\n")


GUARDED = {
    "nothing stored": [RELEASE],
    "barrier between": [STORE, "bar.sync 0;", RELEASE],
    "new spelling": [STORE, "barrier.sync.aligned 0;", RELEASE],
    "barrier of all 128 threads": [STORE, "bar.sync 0, 128;", RELEASE],
    "store only to shared memory": ["st.shared.b32 [%r1], %r2;", RELEASE],
    "generic name of shared memory": ["st.shared::cta.b32 [%r1], %r2;", RELEASE],
    "relaxed atomic": [STORE, "atom.global.gpu.relaxed.add.u32 %r9, [%rd2], 1;"],
    "acquire only": [STORE, "atom.global.gpu.acquire.add.u32 %r9, [%rd2], 0;"],
    "mbarrier is not for the grid": [STORE, "mbarrier.arrive.release.cta.shared.b64 %r1, [%r2];"],
    "store on one branch, barrier after the join": [
        "@%p2 bra $L1;", STORE, "$L1:", "bar.sync 0;", RELEASE,
    ],
    "store on a path that leaves": ["@%p2 bra $L1;", STORE, "ret;", "$L1:", RELEASE],
    "barrier at the end of a loop": [
        "$L1:", RELEASE, STORE, "bar.sync 0;", "@%p2 bra $L1;", RELEASE,
    ],
    "comment and line directives": [
        "// st.global.b32 [%rd1], %r1;", ".loc 1 2 3", "/* st.global.b32\n [%rd1], %r1; */",
        RELEASE,
    ],
    "bulk store complete, then barrier": [
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}], [%r3];",
        "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;", "bar.sync 0;", RELEASE,
    ],
    "bulk load is not a store": [
        "@%p3 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%r1], [%rd1, {%r2, %r3}], [%r4];", RELEASE,
    ],
    "labels are local to braces": [
        SPIN, SPIN, RELEASE,
    ],
}  # fmt: skip

UNGUARDED = {
    "no barrier": [STORE, RELEASE],
    "barrier before the store": ["bar.sync 0;", STORE, RELEASE],
    "barrier of one warp": [STORE, "bar.warp.sync -1;", RELEASE],
    "barrier of half the block": [STORE, "bar.sync 1, 64;", RELEASE],
    "predicated barrier": [STORE, "@%p2 bar.sync 0;", RELEASE],
    "arrive without waiting": [STORE, "bar.arrive 0, 128;", RELEASE],
    "barrier on one branch only": [STORE, "@%p2 bra $L1;", "bar.sync 0;", "$L1:", RELEASE],
    "store on one branch": ["@%p2 bra $L1;", STORE, "$L1:", RELEASE],
    "predicated store": ["@%p2 " + STORE, RELEASE],
    "store of the previous round of a loop": ["$L1:", RELEASE, STORE, "@%p2 bra $L1;"],
    "two steps around a loop": [
        "$L1:", "@%p2 bra $L3;", "bra.uni $L2;", "$L3:", RELEASE, "$L2:", STORE, "@%p3 bra $L1;",
    ],
    "indirect branch": [
        "$T: .branchtargets $L1, $L2;", STORE, "brx.idx %r1, $T;", "$L1:", "bar.sync 0;", "$L2:",
        RELEASE,
    ],
    "release only": [STORE, "@%p1 atom.global.gpu.release.exch.b32 %r9, [%rd2], 1;"],
    "reduction": [STORE, "red.global.gpu.release.add.u32 [%rd2], 1;"],
    "releasing store": [STORE, "st.release.gpu.global.b32 [%rd2], 1;"],
    "generic store": ["st.b32 [%rd1], %r1;", RELEASE],
    "float reduction stores data": ["red.global.gpu.relaxed.add.f32 [%rd1], %f1;", RELEASE],
    "call": ["call.uni (%r1), helper, (%r2);", RELEASE],
    "bulk store whose source was read": [
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}], [%r3];",
        "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group.read 0;", "bar.sync 0;", RELEASE,
    ],
    "bulk store complete for one thread only": [
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}], [%r3];",
        "cp.async.bulk.commit_group;", "bar.sync 0;", "cp.async.bulk.wait_group 0;", RELEASE,
    ],
}  # fmt: skip


@pytest.mark.parametrize("lines", GUARDED.values(), ids=GUARDED)
def test_guarded(lines):
    assert offences(*lines) == []


@pytest.mark.parametrize("lines", UNGUARDED.values(), ids=UNGUARDED)
def test_unguarded_release_is_named(lines):
    (offence,) = offences(*lines)
    release = next(i for i, line in enumerate(lines) if "release" in line or "acq_rel" in line)
    newlines = HEAD.count("\n") + sum(1 + line.count("\n") for line in lines[:release])
    opcode = next(word for word in lines[release].split() if "." in word)
    assert offence.startswith(f"line {newlines + 1}: {opcode}")


def test_every_function_is_read():
    from tools.ptx import unguarded_releases

    helper = f".func helper(.param .b32 a)\n{{\n{STORE}\n{RELEASE}\nret;\n}}\n"
    assert len(unguarded_releases(helper + HEAD + "ret;\n}\n")) == 1


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        (".version 8.7", "expected a function"),
        (HEAD + "bra $L1;\n}", "expected a label \\$L1"),
        (HEAD + "ret;\n", "balanced braces"),
        (HEAD + "ret\n}", "cannot read 'ret'"),
    ],
)
def test_what_is_not_ptx_is_refused(ptx, message):
    from tools.ptx import unguarded_releases

    with pytest.raises(ValueError, match=message):
        unguarded_releases(ptx)


def test_matrix_instructions_are_counted():
    from tools.ptx import count_instructions

    wgmma = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1, %f2}, "
    counts = count_instructions(
        f"{wgmma}{{%r1, %r2}}, %rd1, 1, 1, 1, 0;\n{wgmma}%rd1, %rd2, 1, 1, 1, 0, 0;\n"
        f"{wgmma}%rd1, %rd2, 1, 1, 1, 0, 0;\n"
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};\n"
        "cp.async.cg.shared.global [%r1], [%rd1], 16;\n"
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r1], [%rd1, {%r2}], [%r3];\n"
        f"{RELEASE}\nred.global.gpu.release.add.u32 [%rd2], 1;\n"
        "atom.global.gpu.relaxed.add.u32 %r1, [%rd2], 1;"
    )
    assert counts == {
        "wgmma_reg": 1,
        "wgmma_smem": 2,
        "mma_sync": 1,
        "cp_async": 1,
        "tma_load": 1,
        "tma_store": 0,
        "releases": 2,
    }


WAIT = "griddepcontrol.wait;"
LOAD = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];"


@pytest.mark.parametrize(
    ("lines", "early"),
    [
        ([WAIT, LOAD, STORE, RELEASE], 0),
        (["prefetch.global.L2 [%rd1];", "ld.param.b64 %rd1, [p];", WAIT, LOAD], 0),
        (["st.shared.b32 [%r1], %r2;", "cp.async.wait_group 0;", WAIT], 0),
        ([LOAD, WAIT], 1),
        ([STORE, RELEASE, WAIT], 2),
        (["ld.b32 %r1, [%rd1];", WAIT], 1),
        (["cp.async.cg.shared.global [%r1], [%rd1], 0x10;", WAIT], 1),
        (["@%p1 griddepcontrol.wait;", LOAD], 1),
        (["@%p1 bra $L1;", WAIT, "$L1:", LOAD], 1),
        (["$L1:", WAIT, LOAD, "@%p1 bra $L1;"], 0),
        ([LOAD], 1),
    ],
)
def test_accesses_before_the_kernel_in_front_has_ended(lines, early):
    from tools.ptx import early_accesses

    found = early_accesses(HEAD + "\n".join(lines) + "\nret;\n}\n")
    assert len(found) == early
    assert all(line.startswith("line ") for line in found)
