"""Rows of a benchmark that nobody ran, and small cases with ways to compute them."""

import dataclasses

from maestro_kernels.benchmark.rows import Row
from maestro_kernels.measure.cases import Case, Layer
from maestro_kernels.measure.providers import Provider, two_forward

CASE = Case("test", 5, (Layer(24, 16, 8, 7),), bias=True)
GROUP = Case("test", 3, (Layer(24, 16, 8, 7), Layer(8, 16, 4, 4)), bias=True)


def row(provider="ours", p50=100.0, spread=0.02, **changes):
    family = provider.split(",")[0] if provider.split(",")[0] != "two matmuls" else "two matmuls"
    base = Row(
        run="2026-01-01T00:00:00+00:00",
        op="lod_linear",
        source="Test up",
        M=16,
        N=(64,),
        K=32,
        R=(8,),
        rank=(7,),
        bias=False,
        dtype="float32",
        mode="forward",
        cache="warm",
        launch="eager",
        provider=provider,
        family=family,
        gate="passed",
        p20_us=p50 * (1 - spread / 2),
        p50_us=p50,
        p80_us=p50 * (1 + spread / 2),
        samples=20,
        calls=3,
        tflops=0.5,
        gbs=2.0,
        roofline=0.4,
        threads=2,
        device={
            "kind": "cpu",
            "name": "test CPU",
            "peak_flops": {"float32": 1e12},
            "bandwidth": 1e10,
        },
        versions={"torch": "2.13", "commit": "abc", "dirty": False},
        command="maestro-kernels bench",
    )
    return dataclasses.replace(base, **changes)


def failed(provider, gate="failed", **changes):
    none = dict.fromkeys(("p20_us", "p50_us", "p80_us", "tflops", "gbs", "roofline"))
    return row(provider, gate=gate, reason="why", **{**none, **changes})


def two(i):
    return two_forward(i.x, i.us, i.vs, i.biases, i.ranks)


def provider(name, forward, family="two matmuls", trains=True):
    def bind(case, ring):
        return [lambda i=i: forward(i) for i in ring]

    return Provider(name, family, bind, trains)


def without_bias(i):
    return two_forward(i.x, i.us, i.vs, [None] * len(i.us), i.ranks)
