"""One compression: read, judge, factorise, choose ranks, put together, train, judge again, save.

What was finished when a run was killed is read back by the next one with the same options, which
then ends with the same bits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from maestro_kernels import search
from maestro_kernels.compression import calibration, decomposition, evaluation, work
from maestro_kernels.compression.architectures import Architecture, Copies, find
from maestro_kernels.compression.choosing import OPTIONS, Chooser, candidates
from maestro_kernels.compression.data import Data
from maestro_kernels.compression.evaluation import Evaluation
from maestro_kernels.measure.progress import Advance
from maestro_kernels.nn.grouping import group
from maestro_kernels.nn.model_summary import ModelSummary, summary
from maestro_kernels.nn.serialization import check_destination, save_pretrained
from maestro_kernels.search.layers import Layer, storage_bytes
from maestro_kernels.version import __version__

_FN = "compress"
FIGURES = "compression.json"
# Above so many weights ranks are compared with uniform ones and not improved further.
_REFINED = 300e6
# Inputs that losses of the whole model are measured on.
_MEASURED = 32
# One in so many batches chooses the best state of a distillation.
_CHOOSING = 10


@dataclass(frozen=True)
class Options:
    """What a user asks for.

    Attributes:
        model: "minilm" or a folder.
        out: the folder to write.
        budget: of the layers together; a plain fraction is of each layer.
        memory: the fraction of the model's bytes that is asked for instead of a budget.
        data: a file or folder to calibrate and judge with.
        held_out: what to judge with instead of a part of `data`.
        init: "svd", or "data" to weight errors by what the layers see.
        samples: most inputs of `data`.
        passes: most measurements of the loss while ranks are chosen; None is the default.
        recover: steps of distillation.
        seed: of the order of its batches.
        group: whether q/k/v and gate/up run together.
        require: the least quality; None is the default of the measure.
        max_shard_size: of the files written, as `save_pretrained` takes it.
    """

    model: str
    out: Path
    budget: search.Budget | float | None = None
    memory: float | None = None
    data: Path | None = None
    held_out: Path | None = None
    init: str = "svd"
    samples: int | None = None
    passes: int | None = None
    recover: int = 0
    seed: int = 0
    group: bool = False
    require: float | None = None
    max_shard_size: str | None = None


@dataclass(frozen=True)
class Plan:
    """What will be done, once it is known that it can be.

    Attributes:
        architecture: of the model.
        layers: that can be factorised.
        weights: of the whole model.
        data: to calibrate and judge with.
        passes: most measurements of the whole model while ranks are chosen.
    """

    architecture: Architecture
    layers: dict[str, Layer]
    weights: int
    data: Data | None
    passes: int


@dataclass(frozen=True)
class Compression:
    """What was done.

    Attributes:
        folder: where the smaller model lies.
        summary: of its layers.
        evaluation: None where there was nothing to judge with.
        bytes: of parameters and buffers before and after.
        record: all figures, as they lie beside the model.
    """

    folder: Path
    summary: ModelSummary
    evaluation: Evaluation | None
    bytes: tuple[int, int]
    record: dict[str, Any]


def compress(
    options: Options,
    *,
    planned: Callable[[Plan], None] = lambda plan: None,
    advance: Advance = lambda text, done, total: None,
) -> Compression:
    """Write a smaller model into `options.out`.

    Args:
        options: what is asked for.
        planned: told before long work begins.
        advance: told of what is done.

    Raises:
        TypeError, ValueError, NotImplementedError, OSError: what is asked for cannot be done; found
            before anything is written where it can be.
    """
    check(options)
    architecture = find(options.model)
    if os.path.realpath(options.out) == os.path.realpath(architecture.folder):
        raise ValueError(
            f"{_FN}: --out: expected another folder than the model's, got {str(options.out)!r}"
        )
    dense = architecture.load()
    data = None
    if options.data is not None:
        data = calibration.read(
            architecture,
            dense,
            options.data,
            options.held_out,
            options.samples,
            options.recover,
        )
    budget = _budget(options, dense)
    choose = Chooser(architecture, dense, candidates(dense), budget)
    layers = choose.layers
    size = sum(p.numel() for p in dense.parameters())
    passes = 0
    if data is not None and not choose.uniform:
        default = 0 if size > _REFINED else 16 + 4 * len(layers)
        passes = default if options.passes is None else options.passes
    planned(Plan(architecture, layers, size, data, passes))
    with work.opened(options.out) as place:
        run = _Run(options, architecture, layers, choose.tops, data, place, advance)
        before = run.judged(dense)
        run.decompose(dense)
        ranks = run.ranks(dense, choose, passes)
        bytes_before = storage_bytes(dense)
        del dense, choose
        model = run.assembled(ranks)
        found = run.recovered(model)
        if options.group:
            group(model)
        judged = run.compared(before, model)
        done = _done(run, model, bytes_before, judged, found)
        save_pretrained(
            model,
            options.out,
            max_shard_size=options.max_shard_size,
            processor=run.beside(done.record),
        )
        place.clear()
    return done


def check(options: Options) -> None:
    """Raise what can be seen to be wrong before the model is read."""
    check_destination(options.out, hub=True)
    work.check(options.out)
    for name, path in (("--data", options.data), ("--held-out", options.held_out)):
        if path is not None and not path.is_dir():
            calibration.lines(path, name)
    if options.data is None:
        for name, given in (
            ("--init data", options.init == "data"),
            ("--recover", options.recover > 0),
        ):
            if given:
                raise ValueError(f"{_FN}: --data: expected a file or folder for {name}, got none")
        for name, value in (("--held-out", options.held_out), ("--require", options.require)):
            if value is not None:
                raise ValueError(
                    f"{_FN}: {name}: expected nothing without --data, got {str(value)!r}"
                )


def _budget(options: Options, model: nn.Module) -> search.Budget | float:
    if options.memory is not None:
        return search.Memory(math.floor(options.memory * storage_bytes(model)))
    assert options.budget is not None
    return options.budget


class _Run:
    """The stages of a run, each of which is read back where it was finished before."""

    def __init__(
        self,
        options: Options,
        architecture: Architecture,
        layers: dict[str, Layer],
        tops: dict[str, int],
        data: Data | None,
        place: work.Work,
        advance: Advance,
    ) -> None:
        self.options, self.architecture = options, architecture
        self.layers, self.tops = layers, tops
        self.data, self.place, self.advance = data, place, advance
        o = options
        model = work.contents(architecture.folder)
        texts = [str(o.data), work.contents(o.data), work.contents(o.held_out), o.samples]
        self._key_read = work.key_of(__version__, model, texts)
        of_data = texts if o.init == "data" else None
        asked = o.budget if isinstance(o.budget, int | float) else None
        self._key_factors = work.key_of(__version__, model, o.init, of_data, asked)
        self._key_ranks = work.key_of(self._key_factors, texts, o.budget, o.memory, o.passes)
        self._key_trained = work.key_of(self._key_ranks, o.recover, o.seed)

    def judged(self, dense: nn.Module) -> dict[str, Any] | None:
        """What the dense model answers to the held-out batches."""
        if self.data is None:
            return None
        found = self.place.read("dense", self._key_read)
        if found is None:
            self.advance("judging the dense model", 0, 1)
            tensors = evaluation.answers(self.architecture.task, dense, self.data.held_out)
            self.place.write("dense", self._key_read, tensors, {})
            return tensors
        return found[0]

    def decompose(self, dense: nn.Module) -> None:
        """Factors of all layers, on disk."""
        batches = None
        if self.options.init == "data" and self.data is not None:
            batches = self.data.batches
        decomposition.decompose(
            dense, self.layers, self.tops, batches, self.place, self._key_factors, self.advance
        )

    def ranks(self, dense: nn.Module, choose: Chooser, passes: int) -> dict[str, int | str]:
        """The rank of every layer with factors."""
        if choose.uniform:
            return dict(self.tops)
        found = self.place.read("ranks", self._key_ranks)
        if found is not None:
            return dict(found[1])
        self.advance("choosing ranks", 0, 1)
        sens = decomposition.sensitivity_of(
            self.layers,
            self.place,
            self._key_factors,
            choose.rows,
            self.options.init == "data",
        )
        ranks = choose.ranks(dense, sens, self._measured(passes))
        self.place.write("ranks", self._key_ranks, {}, ranks)
        return ranks

    def _measured(self, passes: int) -> dict[str, Any]:
        """With data the loss of the whole model decides, not the sum of errors of layers alone."""
        if self.data is None:
            return {}
        batches, inputs = [], 0
        for batch in self.data.batches:
            if inputs >= _MEASURED:
                break
            batches.append(batch)
            inputs += len(next(iter(batch.values())))
        task = self.architecture.task
        loss = evaluation.loss if task in ("language", "seq2seq") else None
        return {
            "batches": batches,
            "passes": passes,
            "loss_fn": loss,
            "progress": self.advance,
        }

    def assembled(self, ranks: Mapping[str, int | str]) -> nn.Module:
        """The factorised model, from weights that are read anew."""
        every: dict[str, int | str] = dict.fromkeys(self.layers, "dense")
        return decomposition.assemble(
            self.architecture.load(),
            self.layers,
            {**every, **ranks},
            self.place,
            self._key_factors,
            self.advance,
        )

    def recovered(self, model: nn.Module) -> dict[str, Any] | None:
        """Distil the dense model into it, if that is asked for."""
        if not self.options.recover or self.data is None:
            return None
        found = self.place.read("trained", self._key_trained)
        if found is not None:
            tensors, values = found
            model.load_state_dict({k: t.clone() for k, t in tensors.items()}, strict=False)
            return values
        from maestro_kernels.training.distillation import distil

        # What judges the result has no part in choosing it.
        batches = self.data.training
        judge = batches[-max(len(batches) // _CHOOSING, 1) :] if len(batches) > 1 else []
        result = distil(
            model,
            self.architecture.load(),
            batches[: len(batches) - len(judge)],
            steps=self.options.recover,
            held_out=judge or None,
            loss="hidden" if self.architecture.task == "embedding" else "logits",
            seed=self.options.seed,
            progress=self.advance,
        )
        values = {"steps": result.steps, "best_step": result.best_step}
        state = {k: t for k, t in model.state_dict().items() if t.numel()}
        self.place.write("trained", self._key_trained, state, values)
        return values

    def compared(self, before: dict[str, Any] | None, model: nn.Module) -> Evaluation | None:
        """The figures of both models."""
        if before is None or self.data is None:
            return None
        self.advance("judging the smaller model", 0, 1)
        task = self.architecture.task
        return evaluation.compare(
            task,
            before,
            evaluation.answers(task, model, self.data.held_out),
            inputs=self.data.judged,
            noun=self.data.noun,
            labels=self.data.labels,
            required=self.options.require,
        )

    def beside(self, record: Mapping[str, Any]) -> Copies:
        """What is saved beside the model."""
        text = json.dumps(record, indent=2) + "\n"
        return Copies(self.architecture.folder, self.architecture.beside(), {FIGURES: text})


def _done(
    run: _Run,
    model: nn.Module,
    before: int,
    judged: Evaluation | None,
    trained: dict[str, Any] | None,
) -> Compression:
    report, after = summary(model), storage_bytes(model)
    o = run.options
    name = OPTIONS.get(type(o.budget), "--budget") if o.memory is None else "--memory"
    value: Any = o.memory if o.memory is not None else o.budget
    if not isinstance(value, int | float):
        (value,) = vars(value).values()
    record = {
        "model": run.architecture.name,
        "task": run.architecture.task or None,
        name.removeprefix("--"): value,
        "init": o.init,
        "bytes_before": before,
        "bytes": after,
        "evaluation": None if judged is None else judged.to_dict(),
        "recovered": trained,
        "version": __version__,
    }
    return Compression(o.out, report, judged, (before, after), {**record, **report.to_dict()})
