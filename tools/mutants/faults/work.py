"""Search, training and the command line."""

from __future__ import annotations

from tools.mutants.fault import PACKAGE, Fault

FAULTS = (
    # --- search -----------------------------------------------------------------------------
    Fault(
        "budget-missed-by-rounding",
        f"{PACKAGE}/search/knapsack.py",
        "return 1e-9 * abs(limit)",
        "return 0.0",
        "tests/search/test_knapsack.py::test_rounding_does_not_cost_a_solution",
        "a budget that is just enough is refused",
    ),
    Fault(
        "hull-turned-over",
        f"{PACKAGE}/search/knapsack.py",
        "_slope(costs, errors, kept[-1], j) <= _slope(",
        "_slope(costs, errors, kept[-1], j) >= _slope(",
        "tests/search/test_knapsack.py::test_hull_path_is_optimal_at_its_own_costs",
        "allocated ranks are far from the best ones",
    ),
    Fault(
        "refinement-without-a-limit",
        f"{PACKAGE}/search/refine.py",
        "return self.limit - self.used",
        "return 1000",
        "tests/search/test_refine.py::test_measures_no_more_often_than_it_may_and_never_ends_worse",
        "refining takes far more forward passes than announced",
    ),
    Fault(
        "fraction-above-one",
        f"{PACKAGE}/search/budget.py",
        "if not 0 < fraction <= 1:",
        "if not 0 < fraction:",
        "tests/search/test_budget.py::test_fraction_outside_its_range",
        "Params(30) for 30 % leaves the model as it is without a word",
    ),
    # --- training ---------------------------------------------------------------------------
    Fault(
        "ranks-drawn-from-zero",
        f"{PACKAGE}/training/samplers.py",
        "index - (self._ends[layer - 1] if layer else 0) + 1",
        "index - (self._ends[layer - 1] if layer else 0)",
        "tests/training/test_samplers.py::test_single_pair_draws_every_pair_once_per_cycle",
        "layers are trained at rank 0 and never at full rank",
    ),
    Fault(
        "penalty-on-heads-instead-of-tails",
        f"{PACKAGE}/training/penalties.py",
        "tails = _squared_norms(layers).flip(1).cumsum(1).flip(1)",
        "tails = _squared_norms(layers).cumsum(1)",
        "tests/training/test_penalties.py::test_value_and_gradient_in_float64",
        "the lasso drives out the components that matter most",
    ),
    Fault(
        "shrink-forgets-the-optimizer-state",
        f"{PACKAGE}/training/shrinking.py",
        "replace_parameter(optimizers, parameter, fresh[parameter], cut)",
        "replace_parameter(optimizers, parameter, fresh[parameter])",
        "tests/training/test_optimizer_state.py::test_the_same_gradients_give_bitwise_the_same_steps",
        "momentum starts again after every shrinking",
    ),
    Fault(
        "dead-components-keep-their-momentum",
        f"{PACKAGE}/training/shrinking.py",
        "clear_state(optimizers, target, tail)",
        "pass",
        "tests/training/test_shrinking.py::test_masked_components_stay_dead_and_are_cut_later",
        "components that were dropped come back",
    ),
    Fault(
        "an-eighth-is-not-enough",
        f"{PACKAGE}/training/shrinking.py",
        "R - plan.width < options.min_saving * R",
        "R - plan.width <= options.min_saving * R",
        "tests/training/test_shrinking.py::test_an_eighth_itself_is_enough",
        "a layer that may shrink by an eighth stays as large as it was",
    ),
    Fault(
        "shrinks-after-every-epoch",
        f"{PACKAGE}/training/loop.py",
        "if self.shrink_every and self.epochs % self.shrink_every == 0:",
        "if self.shrink_every:",
        "tests/training/test_loop.py::test_shrinking_waits_for_its_epoch",
        "shrink_every=5 shrinks five times as often",
    ),
    Fault(
        "random-state-not-restored",
        f"{PACKAGE}/training/checkpoint.py",
        'restore_random_state(state["random"])',
        "pass",
        "tests/training/test_loop.py::test_a_checkpoint_continues_bit_for_bit_in_a_fresh_model",
        "a resumed run differs from one that was not interrupted",
    ),
    Fault(
        "rows-of-a-killed-run-twice",
        f"{PACKAGE}/measure/records.py",
        "self._file.truncate(keep)",
        "pass",
        "tests/cli/test_train.py::"
        "test_rows_after_the_checkpoint_are_cut_and_fewer_than_it_counted_refused",
        "metrics of a resumed run have some steps twice",
    ),
    # --- distillation -----------------------------------------------------------------------
    Fault(
        "best-state-not-put-back",
        f"{PACKAGE}/training/distillation.py",
        "loop.state.restore()",
        "pass",
        "tests/training/test_distillation.py::test_the_state_kept_is_that_of_the_best_step",
        "a model that got worse is what the user saves",
    ),
    Fault(
        "half-precision-without-copies",
        f"{PACKAGE}/training/descent.py",
        "p.detach().float() if p.dtype in _HALF else p",
        "p",
        "tests/training/test_distillation.py::"
        "test_half_precision_is_trained_through_float32_copies",
        "small updates of a bfloat16 model round to nothing",
    ),
    Fault(
        "padding-is-learnt",
        f"{PACKAGE}/training/distances.py",
        "kept = 1.0 if mask is None else mask[..., None].to(s)",
        "kept = 1.0",
        "tests/training/test_distillation.py::"
        "test_the_hidden_distance_is_its_formula_and_ignores_padding",
        "the student spends its weights on repeating what padding gives",
    ),
    # --- the command line -------------------------------------------------------------------
    Fault(
        "misspelled-keys-ignored",
        f"{PACKAGE}/training/config.py",
        'extra="forbid"',
        'extra="ignore"',
        "tests/cli/test_train.py::test_a_configuration_that_does_not_fit_is_named",
        "a typo in the configuration trains with the default for hours",
    ),
    Fault(
        "error-without-the-command",
        f"{PACKAGE}/cli/__init__.py",
        "except (TypeError, ValueError, OSError) as error:",
        "except (TypeError, ValueError) as error:",
        "tests/cli/test_errors.py::test_what_happens_during_the_work_is_one_line_too",
        "a full disk is reported without saying which command met it",
    ),
    Fault(
        "interrupt-looks-like-success",
        f"{PACKAGE}/cli/__init__.py",
        "return _INTERRUPTED",
        "return 0",
        "tests/cli/test_errors.py::test_an_interrupt_is_one_line",
        "a script goes on after Ctrl-C as if the command were done",
    ),
)
