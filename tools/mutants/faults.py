"""The planted faults: where each one is, the test that must catch it, and what a user would see.

`old` stands exactly once in its file. Short and meaningful text survives rewriting best.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAULTS", "Fault"]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: unique.
        file: from the root of the repository.
        old: the text that is right.
        new: the text in its place.
        test: node id of the test that must fail.
        harm: what the fault would do to a user.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    harm: str


_MK = "maestro_kernels"

FAULTS = (
    # --- values and gradients ---------------------------------------------------------------
    Fault(
        "matmul-reads-one-component-more",
        f"{_MK}/backends/matmul.py",
        "h = F.linear(x, v[:rank])",
        "rank = min(rank + 1, R)\n        h = F.linear(x, v[:rank])",
        "tests/backends/test_beyond_rank.py::test_of_one_layer",
        "a component that was cut still shows in the output",
    ),
    Fault(
        "tensor-rank-multiplies-zeros-with-nan",
        f"{_MK}/backends/reference.py",
        "u = zero_beyond(u, rank) if isinstance(rank, Tensor) else u[:, : h.shape[-1]]",
        "u = u[:, : h.shape[-1]]",
        "tests/backends/test_beyond_rank.py::test_of_one_layer",
        "NaN beyond a rank on the device reaches the output",
    ),
    Fault(
        "du-not-zero-beyond-the-rank",
        f"{_MK}/backends/reference.py",
        "F.pad(du, (0, R - width))",
        "F.pad(du, (0, R - width), value=1e-9)",
        "tests/test_functional.py::test_gradients_beyond_the_rank_are_exactly_zero",
        "momentum moves components that are switched off",
    ),
    Fault(
        "dv-in-the-wrong-rows",
        f"{_MK}/backends/reference.py",
        "F.pad(dv, (0, 0, 0, R - width))",
        "F.pad(dv, (0, 0, R - width, 0))",
        "tests/test_functional.py::test_gradients_beyond_the_rank_are_exactly_zero",
        "training at a rank below the full one moves the wrong components",
    ),
    Fault(
        "dh-when-nobody-asks",
        f"{_MK}/backends/reference.py",
        "    if needs_x or needs_v:",
        "    if True:",
        "tests/test_functional.py::test_only_the_products_needed_are_computed",
        "freezing a factor saves no time",
    ),
    Fault(
        "dbias-always",
        f"{_MK}/backends/reference.py",
        "(dz.sum(0) if needs_bias and bias is not None else None)",
        "dz.sum(0)",
        "tests/test_functional.py::test_what_nobody_asks_for_is_none",
        "a frozen bias costs a pass over dy",
    ),
    Fault(
        "gelu-tanh-has-the-gradient-of-gelu",
        f"{_MK}/backends/reference.py",
        'approximate = "tanh" if activation == "gelu_tanh" else "none"',
        'approximate = "none"',
        "tests/test_functional.py::test_gradients_match_autograd_of_the_formula",
        "models with the tanh form of GELU train on another gradient",
    ),
    Fault(
        "silu-gradient-with-create-graph",
        f"{_MK}/backends/reference.py",
        "return dy * s * (1 + z * (1 - s))",
        "return dy * s * (1 + z * s)",
        "tests/ops/test_registered.py::test_a_gradient_to_be_differentiated_again_is_the_gradient",
        "gradient penalties on SiLU layers are wrong",
    ),
    Fault(
        "h-kept-though-not-to-be-saved",
        f"{_MK}/ops/gradient.py",
        "*(hs if save_h else nothing),",
        "*hs,",
        "tests/ops/test_registered.py::test_save_h_false_keeps_less",
        "save_h=False saves no memory",
    ),
    Fault(
        "fake-h-has-full-width",
        f"{_MK}/ops/registered.py",
        "width = v.shape[0] if rank is None else rank",
        "width = v.shape[0]",
        "tests/ops/test_registered.py::test_opcheck",
        "torch.compile allocates H of another shape than the kernel writes",
    ),
    Fault(
        "autocast-casts-nothing",
        f"{_MK}/ops/eager.py",
        "return value.to(dtype)",
        "return value",
        "tests/ops/test_registered.py::"
        "test_autocast_casts_inputs_and_returns_gradients_in_the_parameter_dtype",
        "autocast runs layers in float32",
    ),
    Fault(
        "modes-do-not-see-the-op",
        f"{_MK}/ops/eager.py",
        "        and _dispatch_modes() == 0\n",
        "",
        "tests/ops/test_registered.py::test_flop_counter",
        "FlopCounterMode and FakeTensor miss our calls",
    ),
    Fault(
        "forward-mode-gives-zero",
        f"{_MK}/ops/eager.py",
        "raise NotImplementedError(forward_ad_message(fn))",
        "return",
        "tests/ops/test_registered.py::test_forward_mode_raises_instead_of_returning_zero",
        "torch.func.jvp silently returns zero tangents",
    ),
    # --- groups -----------------------------------------------------------------------------
    Fault(
        "shared-x-gets-the-last-gradient",
        f"{_MK}/backends/reference.py",
        "dx if before is None or dx is None else before + dx",
        "dx",
        "tests/test_functional.py::test_group_matches_its_layers",
        "q, k and v together pass back the gradient of v alone",
    ),
    Fault(
        "subset-takes-the-ranks-of-the-first-layers",
        f"{_MK}/ops/gradient.py",
        "ranks = ranks[reached] if tensor else [ranks[i] for i in reached]",
        "ranks = ranks[: len(reached)]",
        "tests/ops/test_gradient.py::test_siblings_of_different_ranks_keep_them_in_separate_backward_passes",
        "a backward pass through some siblings uses the ranks of others",
    ),
    Fault(
        "written-factors-unnoticed",
        f"{_MK}/ops/gradient.py",
        "if tensor is not None and tensor._version != version:",
        "if False:",
        "tests/ops/test_gradient.py::test_factors_written_to_between_backward_passes_are_refused",
        "an optimizer step between two backward passes gives wrong gradients without a word",
    ),
    Fault(
        "group-flop-without-the-expansion",
        f"{_MK}/measure/cost.py",
        "return 2 * M * rank * (K + N)",
        "return 2 * M * rank * K",
        "tests/ops/test_registered.py::test_flop_counter",
        "FlopCounterMode reports too little for groups",
    ),
    # --- choice -----------------------------------------------------------------------------
    Fault(
        "plan-key-without-threads",
        f"{_MK}/dispatch.py",
        "        backend,\n        _threads(),\n",
        "        backend,\n",
        "tests/test_dispatch.py::test_a_plan_belongs_to_a_number_of_threads",
        "a choice measured for one number of threads is used at another",
    ),
    Fault(
        "plan-key-without-the-type-of-rank",
        f"{_MK}/dispatch.py",
        "else (*ranks, *map(type, ranks)),",
        "else tuple(ranks),",
        "tests/test_problem.py::test_a_valid_call_does_not_hide_a_later_invalid_one",
        "rank=True is taken after a call with rank=1",
    ),
    Fault(
        "plans-without-bound",
        f"{_MK}/dispatch.py",
        "if len(_plans) >= _MAX_PLANS:",
        "if False:",
        "tests/test_dispatch.py::test_plans_are_remembered_per_call_and_bounded",
        "a server with many shapes grows without end",
    ),
    Fault(
        "large-calls-count-as-small",
        f"{_MK}/dispatch.py",
        "_SMALL_FLOP = 1 << 16",
        "_SMALL_FLOP = 1 << 40",
        "tests/test_tables.py::test_small_calls_need_no_table_and_large_factors_are_not_small",
        "auto leaves the library matmuls where nothing was measured",
    ),
    Fault(
        "forced-backend-that-cannot-serve",
        f"{_MK}/dispatch.py",
        "if forced in reasons and reasons[forced] is not None:",
        "if False:",
        "tests/test_problem.py::test_a_backend_that_is_not_built_says_so",
        "backend='native' without the library ends in an AttributeError",
    ),
    Fault(
        "strategy-for-calls-it-does-not-take",
        f"{_MK}/dispatch.py",
        "        ):\n            return choice.backend, choice.strategy, choice.reason",
        "        ) or True:\n            return choice.backend, choice.strategy, choice.reason",
        "tests/test_tables.py::test_a_strategy_that_does_not_take_the_call_is_not_run",
        "a tuned strategy is launched on a layout that it cannot read",
    ),
    Fault(
        "one-winning-corner-is-enough",
        f"{_MK}/tuned.py",
        "and all(row.wins(strategy) for row in around)",
        "and any(row.wins(strategy) for row in around)",
        "tests/test_tables.py::test_one_corner_that_does_not_win_keeps_two_matmuls",
        "auto takes a strategy that is slower at some of the sizes around",
    ),
    Fault(
        "true-is-a-rank",
        f"{_MK}/problem.py",
        "if isinstance(rank, bool) or not isinstance(rank, int | torch.SymInt):",
        "if not isinstance(rank, int | torch.SymInt):",
        "tests/test_problem.py::test_lod_linear_says_what_is_wrong",
        "rank=True runs the layer at rank 1",
    ),
    Fault(
        "shared-x-counted-for-every-layer",
        f"{_MK}/measure/cost.py",
        "return max(read, default=0) if shared_x else sum(read)",
        "return sum(read)",
        "tests/measure/test_cost.py::test_group_reads_a_shared_x_once",
        "the roofline of a group is too slow, and its share of it above 100 %",
    ),
    # --- Triton kernels ---------------------------------------------------------------------
    Fault(
        "triton-relu-hides-nan",
        f"{_MK}/backends/triton/epilogue.py",
        "z = tl.where(z < 0, 0.0, z)",
        "z = tl.maximum(z, 0.0)",
        "tests/backends/test_activations.py::test_of_the_triton_kernels",
        "a NaN in a ReLU layer becomes zero on a GPU",
    ),
    Fault(
        "triton-silu-derivative",
        f"{_MK}/backends/triton/epilogue.py",
        "d = s * (1.0 + z * t)",
        "d = s * (1.0 + z * s)",
        "tests/backends/test_activations.py::test_of_the_triton_kernels",
        "SiLU layers train on a wrong gradient on a GPU",
    ),
    Fault(
        "triton-row-kernel-ignores-the-rank",
        f"{_MK}/backends/triton/row_kernel.py",
        "b_h = tl.where((o_r < rank)[None, :], b_h, 0.0).to(p_y.dtype.element_ty)",
        "b_h = b_h.to(p_y.dtype.element_ty)",
        "tests/backends/triton/test_row.py::test_rank_on_the_device_is_clamped_and_h_is_zero_beyond",
        "a rank on the device is rounded up to the tile",
    ),
    Fault(
        "triton-row-kernel-does-not-clamp",
        f"{_MK}/backends/triton/row_kernel.py",
        "rank = tl.minimum(tl.maximum(tl.load(rank), 0), R)",
        "rank = tl.load(rank)",
        "tests/backends/triton/test_row.py::test_rank_on_the_device_is_clamped_and_h_is_zero_beyond",
        "a rank on the device beyond R reads past the factors",
    ),
    Fault(
        "triton-two-phase-ignores-the-rank",
        f"{_MK}/backends/triton/two_phase_kernel.py",
        "    b_h = tl.where((o_r < rank)[None, :], b_h, 0.0)\n",
        "",
        "tests/backends/triton/test_two_phase.py::test_int_and_tensor_rank_agree",
        "H of a layer holds values beyond the rank",
    ),
    Fault(
        "triton-weight-gradients-beyond-the-rank",
        f"{_MK}/backends/triton/wgrad.py",
        "b_g = tl.where((o_r < rank)[:, None], b_g, 0.0).to(",
        "b_g = b_g.to(",
        "tests/backends/triton/test_backward.py::TestWeightGrads::test_zeros_beyond_the_rank_beside_nan",
        "momentum moves components that are switched off, on a GPU",
    ),
    # --- the compiled library ---------------------------------------------------------------
    Fault(
        "cpu-silu-of-the-wrong-sign",
        "csrc/cpu/activation.h",
        "exp(Vec::zero() - s)",
        "exp(s)",
        "tests/csrc/test_cpu_host.py::test_portable_kernels_of_this_machine",
        "SiLU layers of the compiled library are wrong",
    ),
    # --- conversion -------------------------------------------------------------------------
    Fault(
        "fraction-lost-to-rounding",
        f"{_MK}/nn/conversion.py",
        "math.floor(fraction * candidate.break_even_rank + 1e-9)",
        "math.floor(fraction * candidate.break_even_rank)",
        "tests/nn/test_conversion.py::test_a_fraction_is_not_lost_to_rounding",
        "a fraction that is a whole rank gives one less",
    ),
    Fault(
        "smallest-components-first",
        f"{_MK}/nn/factorize.py",
        "vectors.flip(1)[:, :rank]",
        "vectors[:, :rank]",
        "tests/nn/test_factorize.py::test_every_prefix_is_the_best_approximation_of_its_rank",
        "lowering a rank keeps what matters least",
    ),
    Fault(
        "components-out-of-balance",
        f"{_MK}/nn/factorize.py",
        "scale = norms.clamp_min(floor).sqrt()",
        "scale = norms.clamp_min(floor)",
        "tests/nn/test_factorize.py::test_components_carry_the_same_norm_in_both_factors",
        "training moves one factor far more than the other",
    ),
    Fault(
        "bias-shared-with-the-dense-layer",
        f"{_MK}/nn/linear.py",
        "bias = None if linear.bias is None else copied(linear.bias)",
        "bias = linear.bias",
        "tests/nn/test_linear.py::test_from_linear_and_back",
        "training the factorised copy moves the original's bias",
    ),
    Fault(
        "importance-is-a-sum",
        f"{_MK}/nn/layer.py",
        "importance: Tensor = norms_u * norms_v",
        "importance: Tensor = norms_u + norms_v",
        "tests/nn/test_linear.py::test_importance_is_the_product_of_tail_norms",
        "shrinking keeps components that do nothing",
    ),
    Fault(
        "truncate-raises-the-rank",
        f"{_MK}/nn/layer.py",
        "self.rank = min(self._rank, keep)",
        "self.rank = width",
        "tests/nn/test_linear.py::test_truncate_rounds_what_is_stored_but_not_what_is_active",
        "truncate with multiple_of changes the output",
    ),
    Fault(
        "checkpoint-without-its-rank",
        f"{_MK}/nn/layer.py",
        "        self._rank = rank\n        self.changed()\n        if local_metadata",
        "        self.changed()\n        if local_metadata",
        "tests/nn/test_linear.py::test_state_dict_keeps_the_active_rank",
        "a loaded layer runs at the rank it had before",
    ),
    # --- packing, freshness, grouping -------------------------------------------------------
    Fault(
        "written-v-unnoticed",
        f"{_MK}/nn/freshness.py",
        "and v._version == self._v_version",
        "and True",
        "tests/nn/test_packing.py::test_changed_factors_are_packed_again",
        "a packed layer answers with the weights of before",
    ),
    Fault(
        "sibling-called-with-another-x",
        f"{_MK}/nn/grouping.py",
        "if waiting is not None and waiting.x is x:",
        "if waiting is not None:",
        "tests/nn/test_model_summary.py::"
        "test_siblings_that_read_different_tensors_stay_right_and_the_group_gives_up",
        "cross-attention gets keys of the wrong input",
    ),
    Fault(
        "written-x-unnoticed",
        f"{_MK}/nn/grouping.py",
        "autocast, version(x), x.data_ptr()",
        "autocast, x.data_ptr()",
        "tests/nn/test_model_summary.py::test_nothing_stale_is_returned",
        "a sibling answers for the input as it was",
    ),
    Fault(
        "one-choice-for-all-numbers-of-rows",
        f"{_MK}/nn/packing.py",
        "min(1 << (rows - 1).bit_length(), _MAX_BUCKET)",
        "_MAX_BUCKET",
        "tests/nn/test_packing_choices.py::test_forms_are_chosen_per_bucket_of_rows",
        "a form chosen for one row runs batches, too",
    ),
    # --- files ------------------------------------------------------------------------------
    Fault(
        "tied-weights-stored-twice",
        f"{_MK}/nn/serialization.py",
        "if tensor.numel() and place in seen:",
        "if False:",
        "tests/nn/test_serialization.py::test_tied_weights_are_stored_once_and_tied_again",
        "embeddings that were tied train apart after loading",
    ),
    Fault(
        "foreign-weights-overwritten",
        f"{_MK}/nn/serialization.py",
        "if tensors.exists() and saved_file.read_header(tensors) is None:",
        "if False:",
        "tests/test_messages.py::test_the_error_says_what_is_wrong[save: weights of the user's]",
        "save_pretrained destroys another model's weights",
    ),
    Fault(
        "renamed-before-it-is-on-disk",
        f"{_MK}/files.py",
        "            os.fsync(fd)\n            # Before the file is closed",
        "            # Before the file is closed",
        "tests/nn/test_serialization_crash.py::"
        "test_content_is_on_disk_before_its_name_and_the_name_before_the_end",
        "after a power cut the checkpoint is empty",
    ),
    Fault(
        "leftovers-after-an-error",
        f"{_MK}/files.py",
        "            os.unlink(partial)",
        "            pass",
        "tests/test_files.py::test_an_error_in_the_block_leaves_the_old_content",
        "every failed save leaves a file as large as the model",
    ),
    Fault(
        "files-of-living-writers-removed",
        f"{_MK}/files.py",
        "if _lock(fd):",
        "if True:",
        "tests/test_files.py::test_only_leftovers_of_dead_writers_are_removed",
        "two processes that save beside each other lose one save",
    ),
    Fault(
        "permissions-lost",
        f"{_MK}/files.py",
        "            _keep_permissions(fd, place)\n            yield file",
        "            yield file",
        "tests/test_files.py::"
        "test_permissions_are_those_of_the_umask_or_of_the_file_that_was_there",
        "a file shared with a group is private after the next save",
    ),
    Fault(
        "half-a-row-kept",
        f"{_MK}/files.py",
        "return end - len(torn)",
        "return end",
        "tests/test_files.py::test_a_line_that_was_cut_off_is_removed_and_a_whole_one_kept",
        "a journal that a kill cut short cannot be read any more",
    ),
    Fault(
        "two-runs-in-one-folder",
        f"{_MK}/files.py",
        "lock.acquire(blocking=False)",
        "lock.is_locked",
        "tests/test_messages.py::"
        "test_the_error_says_what_is_wrong[train: a run that is still going on]",
        "two runs write over each other's checkpoints",
    ),
    # --- search -----------------------------------------------------------------------------
    Fault(
        "budget-missed-by-rounding",
        f"{_MK}/search/descent.py",
        "return 1e-9 * abs(limit)",
        "return 0.0",
        "tests/search/test_knapsack.py::test_rounding_does_not_cost_a_solution",
        "a budget that is just enough is refused",
    ),
    Fault(
        "hull-turned-over",
        f"{_MK}/search/descent.py",
        "_slope(costs, errors, kept[-1], j) <= _slope(",
        "_slope(costs, errors, kept[-1], j) >= _slope(",
        "tests/search/test_knapsack.py::test_hull_path_is_optimal_at_its_own_costs",
        "allocated ranks are far from the best ones",
    ),
    Fault(
        "refinement-without-a-limit",
        f"{_MK}/search/refine.py",
        "return self.limit - self.used",
        "return 1000",
        "tests/search/test_refine.py::test_measures_no_more_often_than_it_may_and_never_ends_worse",
        "refining takes far more forward passes than announced",
    ),
    Fault(
        "fraction-above-one",
        f"{_MK}/search/budget.py",
        "if not 0 < fraction <= 1:",
        "if not 0 < fraction:",
        "tests/search/test_budget.py::test_fraction_outside_its_range",
        "Params(30) for 30 % leaves the model as it is without a word",
    ),
    # --- training ---------------------------------------------------------------------------
    Fault(
        "ranks-drawn-from-zero",
        f"{_MK}/training/samplers.py",
        "index - (self._ends[layer - 1] if layer else 0) + 1",
        "index - (self._ends[layer - 1] if layer else 0)",
        "tests/training/test_samplers.py::test_single_pair_draws_every_pair_once_per_cycle",
        "layers are trained at rank 0 and never at full rank",
    ),
    Fault(
        "penalty-on-heads-instead-of-tails",
        f"{_MK}/training/penalties.py",
        "tails = _squared_norms(layers).flip(1).cumsum(1).flip(1)",
        "tails = _squared_norms(layers).cumsum(1)",
        "tests/training/test_penalties.py::test_value_and_gradient_in_float64",
        "the lasso drives out the components that matter most",
    ),
    Fault(
        "shrink-forgets-the-optimizer-state",
        f"{_MK}/training/shrinking.py",
        "replace_parameter(optimizers, parameter, fresh[parameter], cut)",
        "replace_parameter(optimizers, parameter, fresh[parameter])",
        "tests/training/test_optimizer_state.py::test_the_same_gradients_give_bitwise_the_same_steps",
        "momentum starts again after every shrinking",
    ),
    Fault(
        "dead-components-keep-their-momentum",
        f"{_MK}/training/shrinking.py",
        "clear_state(optimizers, target, tail)",
        "pass",
        "tests/training/test_shrinking.py::test_masked_components_stay_dead_and_are_cut_later",
        "components that were dropped come back",
    ),
    Fault(
        "an-eighth-is-not-enough",
        f"{_MK}/training/shrinking.py",
        "R - plan.width < options.min_saving * R",
        "R - plan.width <= options.min_saving * R",
        "tests/training/test_shrinking.py::test_an_eighth_itself_is_enough",
        "a layer that may shrink by an eighth stays as large as it was",
    ),
    Fault(
        "shrinks-after-every-epoch",
        f"{_MK}/training/loop.py",
        "if self.shrink_every and self.epochs % self.shrink_every == 0:",
        "if self.shrink_every:",
        "tests/training/test_loop.py::test_shrinking_waits_for_its_epoch",
        "shrink_every=5 shrinks five times as often",
    ),
    Fault(
        "random-state-not-restored",
        f"{_MK}/training/checkpoint.py",
        'restore_random_state(state["random"])',
        "pass",
        "tests/training/test_loop.py::test_a_checkpoint_continues_bit_for_bit_in_a_fresh_model",
        "a resumed run differs from one that was not interrupted",
    ),
    Fault(
        "rows-of-a-killed-run-twice",
        f"{_MK}/measure/records.py",
        "self._file.truncate(keep)",
        "pass",
        "tests/cli/test_train.py::"
        "test_rows_after_the_checkpoint_are_cut_and_fewer_than_it_counted_refused",
        "metrics of a resumed run have some steps twice",
    ),
    # --- the command line -------------------------------------------------------------------
    Fault(
        "misspelled-keys-ignored",
        f"{_MK}/training/config.py",
        'extra="forbid"',
        'extra="ignore"',
        "tests/cli/test_train.py::test_a_configuration_that_does_not_fit_is_named",
        "a typo in the configuration trains with the default for hours",
    ),
    Fault(
        "error-without-the-command",
        f"{_MK}/cli/__init__.py",
        "except (TypeError, ValueError, OSError) as error:",
        "except (TypeError, ValueError) as error:",
        "tests/cli/test_errors.py::test_what_happens_during_the_work_is_one_line_too",
        "a full disk is reported without saying which command met it",
    ),
    Fault(
        "interrupt-looks-like-success",
        f"{_MK}/cli/__init__.py",
        "return _INTERRUPTED",
        "return 0",
        "tests/cli/test_errors.py::test_an_interrupt_is_one_line",
        "a script goes on after Ctrl-C as if the command were done",
    ),
)
