"""What the figures mean, on answers whose figures are known."""

import json
import math

import pytest
import torch

from maestro_kernels.compression import evaluation


def compare(task, before, after, **more):
    return evaluation.compare(task, before, after, inputs=2, noun="text", **more)


def test_perplexity_weighs_by_tokens():
    tokens = torch.tensor([1.0, 3.0])
    before = {"loss": torch.tensor([2.0, 2.0]), "tokens": tokens}
    after = {"loss": torch.tensor([4.0, 2.0]), "tokens": tokens}
    found = compare("language", before, after)
    assert found.before == pytest.approx(math.exp(2))
    assert found.after == pytest.approx(math.exp(2.5))
    assert found.quality == pytest.approx(math.exp(-0.5))
    assert found.passed
    assert "1.65 times as high. It passes (at most 2 times required)" in str(found)
    assert not compare("language", before, after, required=0.61).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, 800.0])
def test_a_loss_beyond_all_bounds_fails_and_is_json(value):
    before = {"loss": torch.tensor([2.0]), "tokens": torch.ones(1)}
    found = compare("seq2seq", before, {**before, "loss": torch.tensor([value])})
    assert found.quality == 0
    assert "It FAILS" in str(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["after"] is None


def test_vectors_must_be_near_and_nearest_to_their_own():
    dense = torch.eye(4)
    found = compare("embedding", {"vectors": dense}, {"vectors": dense})
    assert (found.after, found.more["nearest_own"], found.passed) == (1, 1, True)
    # Anisotropic models: every vector is near to every other, and one vector for all is useless.
    dense = torch.nn.functional.normalize(torch.eye(4) * 0.1 + 1, dim=-1)
    one = dense.mean(0, keepdim=True).expand(4, 4)
    found = compare("embedding", {"vectors": dense}, {"vectors": one / one.norm(dim=-1)[:, None]})
    assert found.after > 0.99
    found = compare("embedding", {"vectors": dense}, {"vectors": dense[:1].expand(4, 4)})
    assert found.after > 0.99
    assert found.more["nearest_own"] == 0.25
    assert not found.passed
    nothing = torch.full((4, 4), math.nan)
    assert compare("embedding", {"vectors": dense}, {"vectors": nothing}).quality == 0


def test_agreement_and_accuracy():
    before = {"top": torch.tensor([1, 2, 3, 4])}
    after = {"top": torch.tensor([1, 2, 3, 0])}
    found = compare("labels", before, after, labels=torch.tensor([1, 2, 0, 0]))
    assert found.quality == 0.75
    assert found.more == {"dense_accuracy": 0.5, "accuracy": 0.75}
    assert not found.passed
    assert compare("labels", before, after, required=0.75).passed


def test_answers_that_are_no_numbers_agree_with_none():
    class Model(torch.nn.Module):
        def forward(self, x):
            return type("Output", (), {"logits": x})

    logits = torch.tensor([[0.0, 1.0], [math.nan, math.nan]])
    found = evaluation.answers("labels", Model(), [{"x": logits}])
    assert found["top"].tolist() == [1, -1]
