"""The main job's pieces: text, embeddings, measures, the verdict. The job is `make bench`."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

import maestro_kernels as mk
from maestro_kernels.benchmark import encoder as library
from maestro_kernels.benchmark.encoder import Encoder, Fidelity, Result, fidelity, verdict


def test_sentences_are_english_prose():
    found = library.sentences()
    assert len(found) > 1000
    assert len(set(found)) == len(found)
    for text in found:
        assert text[0].isupper()
        assert text[-1] in ".!?"
        assert 6 <= len(text.split()) <= 48
        assert not re.search(r">>>|::=|[{}<>|\\]|\n|``", text)


def test_listings_and_grammars_are_not_text():
    assert library._prose("   >>> This is not a sentence of the English language at all.") == []
    assert (
        library._prose('expr_stmt ::= "a" "b" And this is how the grammar would go on here.') == []
    )
    assert library._prose("Short one.") == []
    assert library._prose('The *with*\nstatement is used to wrap the "execution" of a block.') == [
        "The with statement is used to wrap the execution of a block."
    ]


def test_split_is_disjoint_and_stable():
    texts = [f"sentence {i}" for i in range(100)]
    calibration, held_out = library.split(texts, 30, 40)
    assert set(calibration).isdisjoint(held_out)
    assert (len(calibration), len(held_out)) == (30, 40)
    again, wider = library.split(list(reversed(texts)), 30, 50)
    assert again == calibration
    assert set(held_out) < set(wider)
    with pytest.raises(ValueError, match="split: texts: expected at least 120, got 100"):
        library.split(texts, 60, 60)


def test_pooling_ignores_padding():
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    mean = torch.tensor([[1.5, 2.0]])
    torch.testing.assert_close(library.pooled(hidden, mask), mean / mean.norm())


def test_fidelity_against_hand_figures():
    original = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0.6, 0.8, 0]])
    assert fidelity(original, original).cosine == pytest.approx(1.0)
    turned = original.clone()
    turned[0] = torch.tensor([0.6, 0.0, 0.8, 0.0])
    close = fidelity(turned, original)
    assert close.cosine == pytest.approx((0.6 + 1 + 1) / 3)
    assert close.worst == pytest.approx(0.6)
    angles = torch.tensor([0.0, 0.2, 1.0])
    line = torch.stack([angles.cos(), angles.sin()], -1)
    mirrored = torch.stack([(-3 * angles).cos(), (-3 * angles).sin()], -1)
    assert fidelity(line, line).spearman == pytest.approx(1.0)
    assert isinstance(fidelity(mirrored, line), Fidelity)
    swapped = line[[0, 2, 1]]
    assert fidelity(swapped, line).spearman < 1.0


def test_plain_pairs_compute_the_same():
    torch.manual_seed(0)
    model = mk.convert(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), rank=12)
    model[0].rank = 5
    pairs = library.plain_pairs(model)
    x = torch.randn(3, 64)
    assert [type(m).__name__ for m in pairs] == ["PlainPair", "Tanh", "PlainPair"]
    assert pairs[0].v.shape == (5, 64)
    torch.testing.assert_close(pairs(x), model(x))
    assert type(model[0]) is mk.LoDLinear


def result(budget=0.5, init="data", cosine=0.97, ours=4.0, dense=8.0, two=5.0, plain=6.25):
    times = {"dense": dense, "two matmuls": two, "ours": plain, "ours, prepacked": ours}
    latency = {
        batch: {name: (t * 0.9, t, t * 1.1) for name, t in times.items()}
        for batch in ("batch 1", "batch 64")
    }
    return Result(
        budget, init, cosine, cosine, cosine, 5, 10, 15, 20, 5, 10,
        latency if init == "data" else {},
    )  # fmt: skip


def test_verdict_names_the_budget_that_pays():
    text = verdict([result(0.9, cosine=0.99, ours=7.2), result(0.5, cosine=0.96, ours=4.0)])
    assert text[0].startswith("Keeping 50% of the linear layers' weights pays at batch 1: 2.00×")
    assert "90%: keeps mean cosine 0.990; speed 1.11× dense at batch 1" in text[1]


@pytest.mark.parametrize(
    "bad", [{"cosine": 0.9}, {"ours": 8.0}, {"ours": 9.6}, {"ours": 7.84}], ids=str
)
def test_verdict_says_that_nothing_pays(bad):
    text = verdict([result(**bad)])
    assert text[0].startswith("Without fine-tuning no budget pays")


def test_verdict_compares_initialisations_and_two_matmuls():
    rows = [result(cosine=0.8), result(init="svd", cosine=0.5)]
    text = " ".join(verdict(rows))
    assert "at 1 of 1 budgets, by +0.30 mean cosine" in text
    assert "ours on the factors as they are runs at 0.80× to 0.80×" in text
    assert "ours prepacked runs at 1.25× to 1.25×" in text


def test_rows_are_json():
    row = json.loads(result().to_json(device="here"))
    assert row["job"] == "sentence encoder"
    assert row["device"] == "here"
    assert row["latency"]["batch 64"]["ours"][1] == 6.25


class Words:
    """A tokenizer for tests: one id per word length."""

    def __call__(self, texts, **kwargs):
        rows = [[min(len(w), 19) for w in t.split()] for t in texts]
        width = max(map(len, rows))
        pad = [r + [0] * (width - len(r)) for r in rows]
        mask = [[1] * len(r) + [0] * (width - len(r)) for r in rows]
        return {"input_ids": torch.tensor(pad), "attention_mask": torch.tensor(mask)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 64)
        self.dense = nn.Linear(64, 64)

    def forward(self, input_ids, attention_mask):
        return (self.dense(self.words(input_ids)),)


def test_factorise_and_evaluate():
    torch.manual_seed(0)
    encoder = Encoder(Model().eval(), Words())
    texts = [f"{'a' * (i % 7 + 1)} sentence number {i} of a few" for i in range(40)]
    original = encoder.embed(texts)
    torch.testing.assert_close(original.norm(dim=-1), torch.ones(40))
    dense_before = encoder.model.dense
    model = library.factorised(encoder, 0.5, "data", texts)
    assert encoder.model.dense is dense_before
    assert model.dense.rank == 16
    found = library.evaluate(encoder, model, 0.5, "data", texts, original, seconds=0.05)
    assert found.linear_weights == 16 * 128
    assert found.dense_linear_weights == 64 * 64
    assert found.cosine > 0.5
    assert set(found.latency) == {"batch 1", "batch 64"}
    assert set(found.latency["batch 1"]) == {"dense", "two matmuls", "ours", "ours, prepacked"}
    plain = dataclasses.replace(found, latency={})
    assert plain.ratio("batch 1", "ours", "dense") is None
    for budget in (0, 1.5):
        with pytest.raises(ValueError, match="compress: budget: expected 0 < budget <= 1"):
            library.factorised(encoder, budget, "svd", [])
    with pytest.raises(ValueError, match="compress: data: expected sentences for init 'data'"):
        library.factorised(encoder, 0.5, "data", [])
