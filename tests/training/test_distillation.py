"""distil: a factorised student learns the teacher's answers, and keeps its best state."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hub_models import small
from torch import nn

import maestro_kernels as mk
from maestro_kernels import training
from maestro_kernels.training.distances import hidden_distance, logits_distance


def plain(rank=2, dtype=torch.float32):
    """A teacher, its poor copy, and batches of its inputs."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(12, 24), nn.Dropout(0.5), nn.Tanh(), nn.Linear(24, 6))
    teacher = teacher.to(dtype)
    student = mk.convert(teacher, rank=rank, allow_larger=True, inplace=False)
    return student, teacher, [torch.randn(32, 12, dtype=dtype) for _ in range(6)]


def transformer(kind, rank=0.3):
    teacher, batch = small(kind)
    torch.manual_seed(1)
    batches = []
    for _ in range(4):
        ids = {
            k: torch.randint(0, 50, (3, 10)) if v.dtype == torch.long else torch.randn_like(v)
            for k, v in batch.items()
        }
        batches.append(ids)
    return mk.convert(teacher, rank=rank, inplace=False), teacher, batches


def log_probabilities(model, batch, kept):
    return model(**batch).logits.detach().double().log_softmax(-1)[kept]


def squared(student, teacher, batch):
    return (student(batch) - teacher(batch)).square().mean()


def test_the_student_comes_closer_and_the_teacher_stays():
    student, teacher, batches = plain()
    teacher[3].bias.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    done = training.distil(
        student, teacher, batches, steps=60, held_out=[torch.randn(64, 12)], loss="logits", lr=1e-2
    )
    assert done.held_out[-1][1] < 0.5 * done.held_out[0][1]
    assert [step for step, _ in done.held_out] == [0, *range(6, 61, 6)]
    assert done.steps == len(done.losses) == 60
    assert done.stopped == "steps"
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert student.training
    assert teacher.training
    assert teacher[0].weight.requires_grad
    assert not teacher[3].bias.requires_grad
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters()))


@pytest.mark.parametrize("kind", ["bert", "vit", "seq2seq"])
def test_hidden_states_of_transformers(kind):
    student, teacher, batches = transformer(kind)
    done = training.distil(student, teacher, batches, steps=25, held_out=batches[:2], lr=5e-3)
    assert min(value for _, value in done.held_out) < 0.8 * done.held_out[0][1]


@pytest.mark.parametrize("kind", ["llama", "seq2seq", "classifier"])
def test_logits_of_transformers(kind):
    student, teacher, batches = transformer(kind)
    # Heads as small as initialisation makes them answer nearly alike whatever they read.
    for model in (student, teacher):
        head = model.classifier if kind == "classifier" else model.lm_head
        torch.manual_seed(5)
        nn.init.normal_(head.weight)
    done = training.distil(
        student, teacher, batches, steps=40, held_out=batches[:2], lr=5e-3, loss="logits"
    )
    assert min(value for _, value in done.held_out) < 0.8 * done.held_out[0][1]


def test_the_hidden_distance_is_its_formula_and_ignores_padding():
    student, teacher, batches = transformer("bert")
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, 4:] = 0
    batch = {**batches[0], "attention_mask": mask}
    found = hidden_distance(student, teacher, batch)
    assert found.requires_grad
    for model in (student, teacher):
        model.requires_grad_(False)
    wanted = 0.0
    states = [m(**batch, output_hidden_states=True).hidden_states[1:] for m in (student, teacher)]
    for s, t in zip(*states, strict=True):
        s, t = s[mask.bool()], t[mask.bool()]
        wanted += float((s - t).square().sum() / t.square().sum()) / len(states[0])
    means = [
        torch.stack([part[i][mask[i].bool()].mean(0) for i in range(3)])
        for part in (states[0][-1], states[1][-1])
    ]
    wanted += 1 - float(F.cosine_similarity(*means).mean())
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-4)
    assert float(hidden_distance(teacher, teacher, batch)) == pytest.approx(0, abs=1e-6)


def test_the_logits_distance_is_its_formula_and_ignores_padding():
    student, teacher, batches = transformer("llama")
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, 7:] = 0
    batch = {**batches[0], "attention_mask": mask}
    found = logits_distance(student, teacher, batch).detach()
    s, t = (
        m(**batch).logits.detach().double().log_softmax(-1)[mask.bool()] for m in (student, teacher)
    )
    assert float(found) == pytest.approx(float((t.exp() * (t - s)).sum(-1).mean()), rel=1e-4)
    labels = torch.randint(0, 50, (2, 12))
    labels[0, 5:] = -100
    student, teacher = transformer("seq2seq")[:2]
    for model in (student, teacher):
        model.config.decoder_start_token_id = 0
    batch = {"input_ids": labels.clamp(min=0), "labels": labels}
    found = logits_distance(student, teacher, batch).detach()
    s, t = (
        m(**batch).logits.detach().double().log_softmax(-1)[labels != -100]
        for m in (student, teacher)
    )
    assert float(found) == pytest.approx(float((t.exp() * (t - s)).sum(-1).mean()), rel=1e-4)


def test_embedding_tables_and_tied_heads_stay_unless_asked_for():
    student, teacher, batches = transformer("gpt2")
    table = student.get_input_embeddings().weight
    assert student.get_output_embeddings().weight is table
    before = table.detach().clone()
    training.distil(student, teacher, batches, steps=2, loss="logits")
    assert torch.equal(table, before)
    training.distil(student, teacher, batches, steps=2, loss="logits", embeddings=True)
    assert not torch.equal(table, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_trained_through_float32_copies(dtype):
    student, teacher, batches = plain()
    torch.manual_seed(3)
    fine = copy.deepcopy(student)
    options = {"steps": 60, "held_out": batches[:2], "loss": "logits", "lr": 1e-3}
    halves = [b.to(dtype) for b in batches]
    student = student.to(dtype)
    done = training.distil(
        student, teacher.to(dtype), halves, **{**options, "held_out": halves[:2]}
    )
    assert {p.dtype for p in student.parameters()} == {dtype}
    wanted = training.distil(fine, teacher.float(), batches, **options)
    # Updates below half an ulp of a parameter add up: the gain is float32's.
    gain, full = (d.held_out[0][1] - d.held_out[-1][1] for d in (done, wanted))
    assert full > 0
    assert gain == pytest.approx(full, rel=0.1)


def test_parameters_of_several_dtypes_each_come_back_in_their_own():
    student, teacher, batches = plain()
    student[0].to(torch.bfloat16)

    def loss(student, teacher, batch):
        h = student[0](batch.bfloat16()).float()
        return (student[3](h.tanh()) - teacher(batch)).square().mean()

    done = training.distil(student, teacher, batches, steps=20, held_out=batches[:1], loss=loss)
    assert student[0].u.dtype is torch.bfloat16
    assert student[3].u.dtype is torch.float32
    assert done.held_out[-1][1] < done.held_out[0][1]


def test_the_best_state_is_kept_and_patience_ends_the_run():
    student, teacher, batches = plain(rank=None)
    before = copy.deepcopy(student.state_dict())
    # At full rank the student is the teacher: any step makes it worse.
    done = training.distil(
        student, teacher, batches, steps=50, held_out=batches[:1], loss=squared, lr=0.1,
        evaluate_every=2, patience=2,
    )  # fmt: skip
    assert (done.steps, done.best_step, done.stopped) == (4, 0, "patience")
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_state_kept_is_that_of_the_best_step():
    student, teacher, batches = plain()
    losses = iter([1.0, 0.5, 0.25, 0.7, 0.9])
    seen = []

    def loss(student, teacher, batch):
        value = squared(student, teacher, batch)
        if batch is judge:
            seen.append(copy.deepcopy(student.state_dict()))
            return value * 0 + next(losses)
        return value

    judge = torch.randn(4, 12)
    done = training.distil(
        student, teacher, batches, steps=9, held_out=[judge], loss=loss, evaluate_every=1,
        patience=2,
    )  # fmt: skip
    assert (done.best_step, done.steps) == (2, 4)
    for name, value in student.state_dict().items():
        assert torch.equal(value, seen[2][name])
    assert not torch.equal(seen[2]["0.u"], seen[4]["0.u"])


def test_a_loss_that_is_not_finite_leaves_the_best_state():
    student, teacher, batches = plain()
    steps = []

    def loss(student, teacher, batch):
        if not torch.is_grad_enabled():
            seen.append(copy.deepcopy(student.state_dict()))
            return squared(student, teacher, batch)
        steps.append(1)
        scale = float("nan") if len(steps) == 5 else 1.0
        return squared(student, teacher, batch) * scale

    seen = []
    with pytest.raises(training.NonFiniteLoss, match="at step 5"):
        training.distil(
            student, teacher, batches, steps=20, held_out=batches[:1], loss=loss, evaluate_every=2
        )
    for name, value in student.state_dict().items():
        assert torch.equal(value, seen[2][name])
    assert not torch.equal(seen[2]["0.u"], seen[0]["0.u"])


def test_a_gradient_that_is_not_finite_is_named_and_nothing_is_written():
    student, teacher, batches = plain()
    before = copy.deepcopy(student.state_dict())

    def loss(student, teacher, batch):
        # sqrt has an infinite slope at 0.
        return squared(student, teacher, batch) + (student[3].bias * 0).abs().sum().sqrt()

    with pytest.raises(training.NonFiniteLoss, match=r"gradient: .* step 1; .*'3.bias'"):
        training.distil(student, teacher, batches, steps=3, loss=loss)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])


def test_ctrl_c_without_held_out_batches_leaves_the_student_as_it_was():
    student, teacher, batches = plain()
    before = copy.deepcopy(student.state_dict())

    def stop(text, done, total):
        assert (text.startswith("distillation, loss"), total) == (True, 9)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.distil(student, teacher, batches, steps=9, loss="logits", progress=stop)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])
    assert student.training


def test_the_seed_says_which_batches_come_when():
    ends = []
    for seed in (0, 0, 1):
        student, teacher, batches = plain()
        training.distil(student, teacher, batches, steps=8, loss="logits", seed=seed)
        ends.append(student[0].u.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("kind", ["iterator", "loader", "tuples"])
def test_batches_come_in_many_forms(kind):
    student, teacher, batches = plain()
    if kind == "iterator":
        batches = iter(batches)
    elif kind == "loader":
        batches = torch.utils.data.DataLoader(torch.cat(batches), 16)
    else:
        batches = [(b,) for b in batches]
    assert training.distil(student, teacher, batches, steps=30, loss="logits").steps == 30


def test_a_sampler_draws_ranks_before_every_step_and_is_judged_at_full_rank():
    student, teacher, batches = plain(rank=6)
    seen = {True: set(), False: set()}

    def loss(student, teacher, batch):
        seen[torch.is_grad_enabled()].add(student[0].rank)
        return squared(student, teacher, batch)

    training.distil(
        student, teacher, batches, steps=12, held_out=batches[:1], loss=loss,
        sampler=training.IndependentSampler(student, seed=0),
    )  # fmt: skip
    assert len(seen[True]) > 2
    assert seen[False] == {6}
    assert student[0].rank == 6


def test_what_does_not_fit_is_named_before_anything_changes():
    student, teacher, batches = plain()

    def fails(kind, match, *args, **options):
        models = args or (student, teacher, batches)
        with pytest.raises(kind, match=match):
            training.distil(*models, **{"steps": 3, "loss": "logits", **options})

    before = copy.deepcopy(student.state_dict())
    fails(TypeError, "distil: model: expected an nn.Module, got str", "bert", teacher, batches)
    fails(TypeError, "distil: teacher: expected an nn.Module, got str", student, "bert", batches)
    fails(ValueError, "distil: steps: expected an int >= 1, got 0", steps=0)
    fails(ValueError, "distil: patience: expected an int >= 1, got 0", patience=0)
    fails(ValueError, "distil: evaluate_every: expected an int >= 1", evaluate_every=0)
    fails(ValueError, "distil: lr: expected a finite number > 0, got nan", lr=float("nan"))
    fails(ValueError, "distil: loss: expected 'hidden', 'logits' or a function", loss="mse")
    fails(TypeError, "distil: sampler: expected an object with step", sampler=3)
    fails(TypeError, "distil: batches: expected an iterable", student, teacher, batches[0])
    fails(ValueError, "distil: batches: expected at least one batch", student, teacher, [])
    fails(ValueError, "distil: held_out: expected at least one batch", held_out=[])
    fails(ValueError, "teacher: expected parameters of its own, got one that is the student's '0.w",
          teacher, teacher, batches)  # fmt: skip
    fails(ValueError, "loss: expected a student that returns hidden states", loss="hidden")
    fails(ValueError, "loss: expected a scalar tensor that depends", loss=lambda s, t, b: t(b))
    fails(ValueError, "logits .* of at least two classes", nn.Linear(12, 1), nn.Linear(12, 1),
          batches)  # fmt: skip
    fails(ValueError, r"logits of the student's shape \(32, 6\), got \(32, 5\)",
          student, nn.Linear(12, 5), batches)  # fmt: skip
    frozen = copy.deepcopy(student).requires_grad_(False)
    fails(ValueError, "student: expected parameters that require", frozen, teacher, batches)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])
    bert, other = small("bert")[0], small("bert")[0]
    other.encoder.layer = other.encoder.layer[:1]
    ids = [{"input_ids": torch.arange(8)[None]}]
    fails(ValueError, "teacher: expected hidden states of the student's", bert, other, ids,
          loss="hidden")  # fmt: skip


def test_an_iterable_that_runs_dry_is_an_error():
    student, teacher, batches = plain()

    class Once:
        def __init__(self):
            self.rest = iter(batches)

        def __iter__(self):
            return self.rest

    with pytest.raises(ValueError, match="expected batches in every epoch, got none after 6 steps"):
        training.distil(student, teacher, Once(), steps=9, loss="logits")
