"""The main job's pieces: text, embeddings, measures, the verdict. The job is `make bench`."""

import importlib
import re

import pytest
import torch
import trained
from places import ROOT
from torch import nn

import maestro_kernels as mk
from bench import encoder_forms as forms
from bench import encoder_results as results
from bench.encoder_results import BATCHES, DEPLOYED, Form, verdict
from bench.stages import Stages
from examples import encoder_texts as judging
from examples.encoder_texts import Fidelity, fidelity
from maestro_kernels.benchmark import encoder as library
from maestro_kernels.benchmark.encoder import Encoder
from maestro_kernels.compression import architectures


def test_sentences_are_english_prose():
    found = judging.sentences()
    assert len(found) > 1000
    assert len(set(found)) == len(found)
    for text in found:
        assert text[0].isupper()
        assert text[-1] in ".!?"
        assert 6 <= len(text.split()) <= 48
        assert not re.search(r">>>|::=|[{}<>|\\]|\n|``", text)


def test_listings_and_grammars_are_not_text():
    assert judging._prose("   >>> This is not a sentence of the English language at all.") == []
    assert (
        judging._prose('expr_stmt ::= "a" "b" And this is how the grammar would go on here.') == []
    )
    assert judging._prose("Short one.") == []
    assert judging._prose('The *with*\nstatement is used to wrap the "execution" of a block.') == [
        "The with statement is used to wrap the execution of a block."
    ]


def test_split_is_disjoint_and_stable():
    texts = [f"sentence {i}" for i in range(100)]
    calibration, held_out = judging.split(texts, 30, 40)
    assert set(calibration).isdisjoint(held_out)
    assert (len(calibration), len(held_out)) == (30, 40)
    again, wider = judging.split(list(reversed(texts)), 30, 50)
    assert again == calibration
    assert set(held_out) < set(wider)
    with pytest.raises(ValueError, match="split: texts: expected at least 120, got 100"):
        judging.split(texts, 60, 60)


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
    pairs = forms.plain_pairs(model)
    x = torch.randn(3, 64)
    assert [type(m).__name__ for m in pairs] == ["PlainPair", "Tanh", "PlainPair"]
    assert pairs[0].v.shape == (5, 64)
    torch.testing.assert_close(pairs(x), model(x))
    assert type(model[0]) is mk.LoDLinear


DENSE = {"float32": (8.0, 80.0), "bfloat16": (6.0, 40.0), "int8": (4.0, 35.0)}


def form(ranks="searched", dtype="bfloat16", cosine=0.97, ms=(5.0, 30.0), run=DEPLOYED, **more):
    latency = {b: (t * 0.9, t, t * 1.1) for b, t in zip(BATCHES, ms, strict=True)}
    about = {"budget": 0.85, "init": "data", **more}
    return Form(ranks, about["budget"], about["init"], dtype, run, cosine, cosine, cosine,
                5, 10, 15, 5, {} if more.get("untimed") else latency)  # fmt: skip


def dense(**cosines):
    return [
        form("dense", dtype, {"int8": 0.94, **cosines}.get(dtype, 1.0), ms, "nn.Linear", budget=1.0)
        for dtype, ms in DENSE.items()
    ]


def test_verdict_compares_within_the_dtype_first():
    text = verdict([*dense(), form()])
    assert text[0].startswith(
        "In bfloat16 searched ranks at 85% of the weights pay: 1.20× / 1.33× as fast as dense "
        "bfloat16 at batch 1 / 64, mean cosine 0.970 to the original embeddings; that is also the "
        "fastest dense form at least as close."
    )
    assert "dense bfloat16 1.33× / 2.00× (cosine 1.000), dense int8 2.00× / 2.29×" in text[1]
    # Faster than dense float32 alone is no gain.
    slow = verdict([*dense(), form(ms=(7.0, 60.0))])
    assert slow[0].startswith("In bfloat16 nothing pays without fine-tuning")


def test_verdict_names_a_dense_form_that_is_as_close_and_faster():
    text = verdict([*dense(int8=0.98), form(dtype="float32", ms=(6.0, 50.0)), form()])
    assert "against dense int8 (cosine 0.980), the fastest dense form at least as close" in text[0]
    assert "0.80× / 1.17×" in text[0]
    assert text[1].startswith("In float32 searched ranks at 85%")


@pytest.mark.parametrize(
    "bad", [{"cosine": 0.9}, {"ms": (6.0, 40.0)}, {"ms": (4.0, 60.0)}, {"ms": (5.8, 39.0)}], ids=str
)
def test_verdict_says_that_nothing_pays(bad):
    assert verdict([*dense(), form(**bad)])[0].startswith("In bfloat16 nothing pays")


def test_verdict_compares_ranks_initialisations_and_two_matmuls():
    forms = [
        *dense(),
        form(cosine=0.96),
        form("uniform", cosine=0.90),
        form("uniform", "float32", cosine=0.90),
        form("uniform", "float32", cosine=0.60, init="svd", untimed=True),
        form(cosine=0.96, run="two matmuls", ms=(6.0, 45.0)),
    ]
    text = " ".join(verdict(forms))
    assert "At equal weights searched ranks are +0.060 to +0.060 of mean cosine" in text
    assert "at 1 of 1 budgets, by +0.30 mean cosine" in text
    assert "ours grouped, prepacked runs at 1.20× to 1.50×" in text
    # Whatever is missing is not spoken of.
    assert verdict([]) == []
    assert verdict([form(untimed=True)]) == []
    assert verdict([form()]) == []


def test_rows_and_tables(tmp_path):
    stamp = {"device": "here", "threads": 2, "versions": {"torch": "2", "commit": "abc"}}
    forms = [*dense(), form(), form("uniform", init="svd", untimed=True)]
    results.save(tmp_path / "rows.jsonl", forms, {**stamp, "notes": ["it took 3 s"]})
    loaded, about = results.load(tmp_path / "rows.jsonl")
    assert [f.name for f in loaded] == [f.name for f in forms]
    assert loaded[3].speed("batch 64", loaded[1]) == pytest.approx(40 / 30)
    text = results.markdown(loaded, about)
    assert "| searched 85%, bfloat16 | grouped, prepacked | data | 0.970 |" in text
    assert "1.20× / 1.33× | 1.60× / 2.67× |" in text
    assert "here, 2 threads, torch 2, commit abc" in text
    assert "- it took 3 s" in text
    short = results.markdown(loaded, about, short=True)
    assert "svd" not in short
    assert "it took" not in short
    with pytest.raises(ValueError, match="expected a clean work tree"):
        results.markdown(loaded, {"versions": {"dirty": True}})
    (tmp_path / "old.jsonl").write_text('{"schema": 1}\n')
    with pytest.raises(ValueError, match=r"old\.jsonl, line 1: schema: expected 2, got 1"):
        results.load(tmp_path / "old.jsonl")


@pytest.mark.parametrize(
    ("device", "threads", "name"),
    [
        ("Intel(R) Xeon(R) Processor", 2, "intel-xeon-processor-amx-2-threads"),
        ("AMD EPYC 9R14 @ 2.6GHz", 1, "amd-epyc-9r14-amx-1-thread"),
    ],
)
def test_each_machine_has_its_own_files(device, threads, name):
    assert results.file_name({"device": device, "threads": threads}, "amx") == name


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


TEXTS = [f"{'a' * (i % 7 + 1)} sentence number {i} of a few{' and more' * (i % 5)}"
         for i in range(60)]  # fmt: skip


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder(Model().eval(), Words())


def test_factorised_as_the_command_line_does(encoder):
    original = encoder.embed(TEXTS)
    torch.testing.assert_close(original.norm(dim=-1), torch.ones(60))
    model = library.factorised(encoder, 0.5, "data", TEXTS)
    assert type(encoder.model.dense) is nn.Linear
    assert model.dense.rank == 16
    full = forms.full_rank(encoder, TEXTS, "data")
    small = forms.at_ranks(encoder, full, forms.uniform_ranks(full, 0.5))
    assert small.dense.max_rank == 16
    torch.testing.assert_close(encoder.embed(TEXTS, small), encoder.embed(TEXTS, model))
    whole = forms.at_ranks(encoder, full, {"dense": "dense"})
    assert torch.equal(whole.dense.weight, encoder.model.dense.weight)
    for budget in (0, 1.5):
        with pytest.raises(ValueError, match="compress: budget: expected 0 < budget <= 1"):
            library.factorised(encoder, budget, "svd", [])
    with pytest.raises(ValueError, match="compress: data: expected sentences for init 'data'"):
        library.factorised(encoder, 0.5, "data", [])


def test_texts_are_ordered_by_length(encoder):
    ordered = forms.by_length(encoder, TEXTS)
    assert sorted(ordered) == sorted(TEXTS)
    lengths = [len(text.split()) for text in ordered]
    assert lengths == sorted(lengths)


def test_searched_ranks_keep_the_budget_and_count_their_passes(encoder):
    told = []
    found = forms.search_ranks(
        encoder, TEXTS[:40], TEXTS[40:], [0.75, 0.5], passes=6,
        progress=lambda *line: told.append(line),
    )  # fmt: skip
    assert set(found.allocations) == {0.75, 0.5}
    for budget, allocation in found.allocations.items():
        assert allocation.predicted.weights <= budget * 64 * 64
        assert allocation.refined.passes <= 6
    refined = sum(a.refined.passes for a in found.allocations.values())
    # The model as it is, and two ranks of the one layer.
    assert found.passes == refined + 3
    assert found.sentences == 20
    assert ("losses of layers", 1, 1) in told
    assert "for 2 budgets" in str(found)
    assert "passes over 20 sentences in float32" in str(found)


def test_the_loss_of_embeddings_is_what_is_judged(encoder):
    batches = list(encoder.batches(TEXTS))
    encoder.model.requires_grad_(False)
    loss = forms.EmbeddingLoss(encoder, batches)
    assert loss(encoder.model, batches[0]) == pytest.approx(0, abs=1e-6)
    small = library.factorised(encoder, 0.25, "data", TEXTS)
    close = fidelity(encoder.embed(TEXTS, small), encoder.embed(TEXTS))
    mean = sum(loss(small, b) * len(b["input_ids"]) for b in batches) / len(TEXTS)
    assert mean == pytest.approx(1 - close.cosine, rel=1e-3)


def test_int8_is_torch_s_own_where_there_is_an_engine(encoder, monkeypatch):
    made, engine = forms.int8(encoder.model)
    if made is None:
        pytest.skip(engine)
    assert engine == torch.backends.quantized.engine
    assert type(encoder.model.dense) is nn.Linear
    assert "quantized" in type(made.dense).__module__
    with forms.quietly():
        assert fidelity(encoder.embed(TEXTS, made), encoder.embed(TEXTS)).cosine > 0.99

    def refuses(*args, **kwargs):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(torch.ao.quantization, "quantize_dynamic", refuses)
    assert forms.int8(encoder.model) == (None, f"engine {engine} refuses: no such instruction")


def test_a_part_that_fails_is_told_and_the_others_run(tmp_path):
    stages = Stages(tmp_path / "failures.log")

    def fails():
        raise ValueError("planted\nsecond line")

    assert stages.run("first", lambda: 3) == 3
    second = stages.run("second", fails)
    assert second is None
    assert stages.run("third", lambda value: value, second) is None
    assert stages.run("fourth", lambda value: value + 1, 3) == 4
    assert stages.failed == [
        f"second: failed with ValueError: planted; traceback in {tmp_path / 'failures.log'}",
        "third: not run, because a part that it needs failed",
    ]
    assert "raise ValueError" in (tmp_path / "failures.log").read_text()
    assert list(stages.seconds) == ["first", "second", "fourth"]
    with pytest.raises(KeyboardInterrupt):
        stages.run("stopped", _interrupt)


def _interrupt():
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """A folder like that of the real encoder, with a tiny one in it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bundled")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=128,
        vocab_size=400, max_position_embeddings=160,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    trained.tokenizer(folder)
    return folder


@pytest.fixture
def job(monkeypatch, bundled):
    """The job on a tiny encoder: everything but the model is as in `make bench --quick`."""
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("bench.sentence_encoder")
    for user in (library, architectures):
        monkeypatch.setattr(user, "bundled_folder", lambda fn: bundled)
    monkeypatch.setattr(module, "SECONDS_QUICK", 0.02)
    return module


def test_the_job_reports_every_form(job, tmp_path, capsys):
    assert job.main(["--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("factorise the encoder, search ranks by measured loss, ")
    assert "about a minute on 2 cores" in out.split("\n")[0]
    assert "Searched ranks took" in out
    assert "same embeddings" in out
    assert "Failed" not in out
    assert "Deprecat" not in out
    (rows,) = tmp_path.glob("*-thread*-encoder.jsonl")
    found, about = results.load(rows)
    assert about["threads"] == torch.get_num_threads()
    kinds = {(f.ranks, f.dtype) for f in found if f.latency}
    assert {("dense", "float32"), ("uniform", "float32"), ("searched", "float32")} <= kinds
    if not any("bfloat16 is left out" in note for note in about["notes"]):
        assert {("dense", "bfloat16"), ("uniform", "bfloat16"), ("searched", "bfloat16")} <= kinds
    assert all(set(f.latency) == set(BATCHES) for f in found if f.latency)
    assert "Cosine over latency" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "failures.log").exists()


PLANTED = {
    "embed the original": ("forms.bfloat16_slowdown", "factorise the encoder: not run"),
    "factorise the encoder": ("forms.full_rank", "not run, because a part that it needs failed"),
    "search ranks by measured loss": ("forms.search_ranks", "searched ranks: not run"),
    "compare embeddings: dense": ("forms.int8", ""),
    "compare embeddings: uniform ranks": ("forms.uniform_ranks", ""),
    "time whole models": ("judging.latencies", ""),
    "save, reload, compare": ("command_line", ""),
    "write the rows": ("results.save", ""),
    "write the report": ("page.sections", ""),
}  # fmt: skip


@pytest.mark.parametrize("part", PLANTED)
def test_the_report_comes_out_whatever_fails(job, part, tmp_path, capsys, monkeypatch):
    def planted(*args, **kwargs):
        raise RuntimeError("planted fault")

    path, more = PLANTED[part]
    place, _, name = path.rpartition(".")
    monkeypatch.setattr(getattr(job, place) if place else job, name, planted)
    assert job.main(["--quick", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    line = f"{part}: failed with RuntimeError: planted fault; traceback in"
    assert f"- {line}" in out
    assert more in out
    assert "planted fault" in (tmp_path / "failures.log").read_text()
    if part != "write the report":
        assert line in (tmp_path / "report.html").read_text()
    if part not in ("embed the original", "write the rows"):
        assert list(tmp_path.glob("*-encoder.jsonl"))


def test_a_cpu_that_emulates_bfloat16_does_not_wait_for_it(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job.forms, "bfloat16_slowdown", lambda *args: 40.0)
    assert job.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "bfloat16 is left out: a pass takes 40 times as long" in capsys.readouterr().out
    (rows,) = tmp_path.glob("*-encoder.jsonl")
    assert {f.dtype for f in results.load(rows)[0]} <= {"float32", "int8"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "0.5", "1.5"], "--budgets: expected fractions in (0, 1], got 1.5"),
        (["--measured", "512"], "--measured: expected 1 to 511 of the calibration sentences"),
    ],
)
def test_wrong_arguments_end_before_anything_runs(job, arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        job.main([*arguments, "--out", str(tmp_path / "new")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
