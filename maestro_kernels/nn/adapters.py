"""LoRA adapters of PEFT on factorised layers: telling PEFT of them, and merging.

PEFT is told when it is imported; importing this costs nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from maestro_kernels.arguments import check_model
from maestro_kernels.imports import when_imported
from maestro_kernels.nn.linear import LoDLinear

_MODEL = "peft.tuners.lora.model"
_METHODS = ("columns", "svd")


def install() -> None:
    """Make LoDLinear a target of LoRA, now or when peft is imported."""
    when_imported(_MODEL, _register)


def _register() -> None:
    """Add our layer to what a configuration knows, the place that PEFT has for layers of others."""
    lora_model = sys.modules[_MODEL].LoraModel
    create = lora_model._create_new_module

    @functools.wraps(create)
    def create_new_module(lora_config: Any, *args: Any, **kwargs: Any) -> Any:
        from maestro_kernels.nn.lora import LoraLoDLinear

        if LoDLinear not in (lora_config._custom_modules or {}):
            lora_config._register_custom_module({LoDLinear: LoraLoDLinear})
        return create(lora_config, *args, **kwargs)

    lora_model._create_new_module = staticmethod(create_new_module)
    tuners = sys.modules["peft.tuners.tuners_utils"]
    find = getattr(tuners, "_maybe_include_all_linear_layers", None)
    if find is not None:
        tuners._maybe_include_all_linear_layers = _with_ours(find)  # type: ignore[attr-defined]


def _with_ours(find: Callable[..., Any]) -> Callable[..., Any]:
    """What PEFT takes "all-linear" for, with the factorised layers."""

    @functools.wraps(find)
    def find_all(peft_config: Any, model: nn.Module) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        found = find(peft_config, model)
        # Other methods would refuse ours.
        if asked != "all-linear" or str(getattr(peft_config.peft_type, "value", "")) != "LORA":
            return found
        # PEFT leaves heads out.
        outputs = getattr(model, "get_output_embeddings", lambda: None)()
        heads = ("score", "classifier") if peft_config.task_type == "SEQ_CLS" else ()
        ours = {
            name
            for name, module in model.named_modules()
            if isinstance(module, LoDLinear)
            and module is not outputs
            and module.activation is None
            and name.partition(".")[0] not in heads
            and name.rpartition(".")[2] != "base_layer"
        }
        found.target_modules = {*found.target_modules, *ours}
        return found

    return find_all


def merge_adapters(model: nn.Module, *, method: str = "columns") -> nn.Module:
    """Merge the active adapters of a PEFT model into its layers and take PEFT off it.

    Args:
        model: what `get_peft_model` or `PeftModel.from_pretrained` returned.
        method: of factorised layers. "columns" is PEFT's `merge_and_unload`: u = [scale · B, u] and
            v = [A; v], exact, and the active rank grows by that of the adapter. "svd" keeps the
            active rank, with the factors closest to that product, and stores as many components
            beyond it as before.

    Returns:
        The model without PEFT, changed in place.

    Raises:
        TypeError: model is no module.
        ValueError: no model of PEFT that can be merged, an unknown method, a rank that would exceed
            min(N, K), or "svd" where adapters are merged already. Nothing has changed then.
    """
    fn = "merge_adapters"
    check_model(fn, model)
    if method not in _METHODS:
        raise ValueError(f"{fn}: method: expected one of {_METHODS}, got {method!r}")
    if not hasattr(model, "merge_and_unload") or "peft" not in sys.modules:
        raise ValueError(
            f"{fn}: model: expected a model of peft's get_peft_model, got {type(model).__name__}"
        )
    from maestro_kernels.nn.lora import LoraLoDLinear

    layers = [module for module in model.modules() if isinstance(module, LoraLoDLinear)]
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if method == "svd" and merged:
        raise ValueError(
            f"{fn}: model: expected adapters that are not merged, got {', '.join(merged)}: "
            "unmerge_adapter() first"
        )
    try:
        for layer in layers:
            layer.merge_method = method
            layer.to_merge()
    except Exception:
        for layer in layers:
            layer.merge_method = "columns"
        raise
    plain: nn.Module = model.merge_and_unload()  # type: ignore[operator]
    return plain
