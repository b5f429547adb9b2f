"""Which calls are timed: suites, ids, and shapes as a user writes them."""

import pytest
from benchmark_support import CASE, GROUP

from maestro_kernels.benchmark.cases import CPU_FLOP_LIMIT, MODELS, SUITES, parse_shape, suite
from maestro_kernels.measure.cases import Layer


@pytest.mark.parametrize("name", SUITES)
def test_suites_have_no_duplicates_and_fit_a_cpu(name):
    cases = suite(name)
    assert len({case.id for case in cases}) == len({(c.id, c.bias) for c in cases})
    assert len(cases) == len(set(cases))
    assert all(case.cost("dense").flops <= CPU_FLOP_LIMIT for case in cases)
    assert {case.op for case in cases} == {"lod_linear", "lod_linear_grouped"}
    assert {case.mode for case in cases} == {"forward", "training"}


def test_full_suite_covers_the_contract_on_a_gpu():
    cases = suite("full", device_type="cuda")
    assert {1, 32768} <= {case.M for case in cases}
    ranks = {layer.rank for case in cases for layer in case.layers}
    assert {16, 127, 200, 1024, 1488} <= ranks
    models = {case.source.split()[0] for case in cases}
    assert {
        *("Llama-2-7B", "Llama-3-8B", "Qwen2.5-7B", "GPT-2"),
        *("ViT-B", "ViT-L", "MiniLM-L6", "ResNet-50"),
    } <= models


def test_suite_options():
    cases = suite("quick", dtypes=["bfloat16"], modes=["forward"])
    assert {(case.dtype, case.mode) for case in cases} == {("bfloat16", "forward")}
    with pytest.raises(ValueError, match=r"suite: name: expected one of .*, got 'huge'"):
        suite("huge")


def test_ids_come_from_the_values():
    assert CASE.id == "M5-N24-K16-R8-r7-float32-forward-bias"
    assert GROUP.id == "2x-M3-N24+8-K16-R8+4-r7+4-float32-forward-bias"
    case = MODELS["Llama-3-8B q/k/v"].case(1, 128, dtype="bfloat16")
    assert [(s.N, s.K, s.R) for s in case.layers] == [
        (4096, 4096, 128),
        (1024, 4096, 128),
        (1024, 4096, 128),
    ]


def test_shapes_are_parsed_and_refused():
    assert parse_shape("16,64,32,8").layers == (Layer(64, 32, 8, 8),)
    assert parse_shape("16, 64,32,8,0", dtype="bfloat16").layers == (Layer(64, 32, 8, 0),)
    for text in ("1,2,3", "1,2,3,4,5,6", "1,2,3,x", "1,2,3,-4"):
        with pytest.raises(ValueError, match=r"parse_shape: text: expected M,N,K,R\[,rank\], got"):
            parse_shape(text)
    with pytest.raises(ValueError, match=r"Layer: N, K, R, rank: expected .* got"):
        parse_shape("1,2,3,4,5")
    with pytest.raises(ValueError, match="Case: M, layers: expected M >= 1"):
        parse_shape("0,2,3,4")
