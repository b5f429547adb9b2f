"""Conversion, packing, freshness, grouping and files."""

from __future__ import annotations

from tools.mutants.fault import PACKAGE, Fault

FAULTS = (
    # --- conversion -------------------------------------------------------------------------
    Fault(
        "fraction-lost-to-rounding",
        f"{PACKAGE}/nn/conversion.py",
        "math.floor(fraction * candidate.break_even_rank + 1e-9)",
        "math.floor(fraction * candidate.break_even_rank)",
        "tests/nn/test_conversion.py::test_a_fraction_is_not_lost_to_rounding",
        "a fraction that is a whole rank gives one less",
    ),
    Fault(
        "smallest-components-first",
        f"{PACKAGE}/nn/factorize.py",
        "vectors.flip(1)[:, :rank]",
        "vectors[:, :rank]",
        "tests/nn/test_factorize.py::test_every_prefix_is_the_best_approximation_of_its_rank",
        "lowering a rank keeps what matters least",
    ),
    Fault(
        "components-out-of-balance",
        f"{PACKAGE}/nn/factorize.py",
        "scale = norms.clamp_min(floor).sqrt()",
        "scale = norms.clamp_min(floor)",
        "tests/nn/test_factorize.py::test_components_carry_the_same_norm_in_both_factors",
        "training moves one factor far more than the other",
    ),
    Fault(
        "bias-shared-with-the-dense-layer",
        f"{PACKAGE}/nn/linear.py",
        "bias = None if linear.bias is None else copied(linear.bias)",
        "bias = linear.bias",
        "tests/nn/test_linear.py::test_from_linear_and_back",
        "training the factorised copy moves the original's bias",
    ),
    Fault(
        "importance-is-a-sum",
        f"{PACKAGE}/nn/layer.py",
        "importance: Tensor = norms_u * norms_v",
        "importance: Tensor = norms_u + norms_v",
        "tests/nn/test_linear.py::test_importance_is_the_product_of_tail_norms",
        "shrinking keeps components that do nothing",
    ),
    Fault(
        "truncate-raises-the-rank",
        f"{PACKAGE}/nn/layer.py",
        "self.rank = min(self._rank, keep)",
        "self.rank = width",
        "tests/nn/test_linear.py::test_truncate_rounds_what_is_stored_but_not_what_is_active",
        "truncate with multiple_of changes the output",
    ),
    Fault(
        "checkpoint-without-its-rank",
        f"{PACKAGE}/nn/layer.py",
        "        self._rank = rank\n        self.changed()\n        if local_metadata",
        "        self.changed()\n        if local_metadata",
        "tests/nn/test_linear.py::test_state_dict_keeps_the_active_rank",
        "a loaded layer runs at the rank it had before",
    ),
    # --- packing, freshness, grouping -------------------------------------------------------
    Fault(
        "written-v-unnoticed",
        f"{PACKAGE}/nn/freshness.py",
        "and v._version == self._v_version",
        "and True",
        "tests/nn/test_packing.py::test_changed_factors_are_packed_again",
        "a packed layer answers with the weights of before",
    ),
    Fault(
        "sibling-called-with-another-x",
        f"{PACKAGE}/nn/grouping.py",
        "if waiting is not None and waiting.x is x:",
        "if waiting is not None:",
        "tests/nn/test_model_summary.py::"
        "test_siblings_that_read_different_tensors_stay_right_and_the_group_gives_up",
        "cross-attention gets keys of the wrong input",
    ),
    Fault(
        "written-x-unnoticed",
        f"{PACKAGE}/nn/grouping.py",
        "autocast, version(x), x.data_ptr()",
        "autocast, x.data_ptr()",
        "tests/nn/test_model_summary.py::test_nothing_stale_is_returned",
        "a sibling answers for the input as it was",
    ),
    Fault(
        "one-choice-for-all-numbers-of-rows",
        f"{PACKAGE}/nn/packing.py",
        "min(1 << (rows - 1).bit_length(), _MAX_BUCKET)",
        "_MAX_BUCKET",
        "tests/nn/test_packing_choices.py::test_forms_are_chosen_per_bucket_of_rows",
        "a form chosen for one row runs batches, too",
    ),
    # --- factors of others ------------------------------------------------------------------
    Fault(
        "bias-between-factors-dropped",
        f"{PACKAGE}/nn/importing/pairs.py",
        "total = self.u.double() @ self.first_bias.double()",
        "total = 0 * self.u.double() @ self.first_bias.double()",
        "tests/nn/importing/test_factors.py::"
        "test_biases_between_the_factors_are_folded_and_weights_are_cast",
        "an imported model answers a little differently from the one that was trained",
    ),
    Fault(
        "adapter-scale-ignored",
        f"{PACKAGE}/nn/importing/adapters.py",
        'alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)',
        "alpha / rank",
        "tests/nn/importing/test_adapters.py::test_an_adapter_of_llama[rslora-merge]",
        "an adapter counts a fraction of what it was trained for",
    ),
    Fault(
        "shared-bases-copied",
        f"{PACKAGE}/nn/importing/pairs.py",
        "LoDLinear.from_factors(own(pair.u, like), shared[key])",
        "LoDLinear.from_factors(own(pair.u, like), own(pair.v, like))",
        "tests/nn/importing/test_factors.py::test_shared_bases[one name]",
        "a model whose layers share a basis takes the memory of one that does not",
    ),
    # --- files ------------------------------------------------------------------------------
    Fault(
        "tied-weights-stored-twice",
        f"{PACKAGE}/nn/serialization.py",
        "if tensor.numel() and place in seen:",
        "if False:",
        "tests/nn/test_serialization.py::test_tied_weights_are_stored_once_and_tied_again",
        "embeddings that were tied train apart after loading",
    ),
    Fault(
        "foreign-weights-overwritten",
        f"{PACKAGE}/nn/serialization.py",
        "if tensors.exists() and saved_file.read_header(tensors) is None:",
        "if False:",
        "tests/test_messages.py::test_the_error_says_what_is_wrong[save: weights of the user's]",
        "save_pretrained destroys another model's weights",
    ),
    Fault(
        "shards-of-two-saves",
        f"{PACKAGE}/nn/hub/seals.py",
        "if other != text:",
        "if False:",
        "tests/nn/hub/test_bad_input.py::test_one_error_that_names_what_is_wrong[of_another_save]",
        "half of the layers are those of another save",
    ),
    Fault(
        "random-weights-without-us",
        f"{PACKAGE}/nn/hub/seals.py",
        "text = json.dumps({**config, key: name}, indent=2, sort_keys=True)",
        "text = json.dumps(config, indent=2, sort_keys=True)",
        "tests/nn/hub/test_registration.py::"
        "test_without_us_a_load_ends_in_an_error_that_says_what_to_do",
        "who forgets the import gets random weights",
    ),
    Fault(
        "square-conv1d-transposed",
        f"{PACKAGE}/nn/structure.py",
        "return [plain(path) for path, module in named if type(module) is nn.Linear]",
        "return []",
        "tests/nn/test_serialization.py::"
        "test_a_conv1d_that_is_dense_again_is_not_taken_for_its_transpose",
        "a square layer of GPT-2 that is dense again computes with its transpose after loading",
    ),
    Fault(
        "renamed-before-it-is-on-disk",
        f"{PACKAGE}/files.py",
        "            os.fsync(fd)\n            # Before the file is closed",
        "            # Before the file is closed",
        "tests/nn/test_serialization_crash.py::"
        "test_content_is_on_disk_before_its_name_and_the_name_before_the_end",
        "after a power cut the checkpoint is empty",
    ),
    Fault(
        "leftovers-after-an-error",
        f"{PACKAGE}/files.py",
        "            os.unlink(partial)",
        "            pass",
        "tests/test_files.py::test_an_error_in_the_block_leaves_the_old_content",
        "every failed save leaves a file as large as the model",
    ),
    Fault(
        "files-of-living-writers-removed",
        f"{PACKAGE}/files.py",
        "if lock(fd):",
        "if True:",
        "tests/test_files.py::test_only_leftovers_of_dead_writers_are_removed",
        "two processes that save beside each other lose one save",
    ),
    Fault(
        "permissions-lost",
        f"{PACKAGE}/files.py",
        "            _keep_permissions(fd, place)\n            yield file",
        "            yield file",
        "tests/test_files.py::"
        "test_permissions_are_those_of_the_umask_or_of_the_file_that_was_there",
        "a file shared with a group is private after the next save",
    ),
    Fault(
        "half-a-row-kept",
        f"{PACKAGE}/files.py",
        "return end - len(torn)",
        "return end",
        "tests/test_files.py::test_a_line_that_was_cut_off_is_removed_and_a_whole_one_kept",
        "a journal that a kill cut short cannot be read any more",
    ),
    Fault(
        "two-runs-in-one-folder",
        f"{PACKAGE}/files.py",
        "lock.acquire(blocking=False)",
        "lock.is_locked",
        "tests/test_messages.py::"
        "test_the_error_says_what_is_wrong[train: a run that is still going on]",
        "two runs write over each other's checkpoints",
    ),
)
