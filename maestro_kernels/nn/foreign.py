"""What other packages put into a model: quantised layers and adapters, known by names alone.

Nothing is imported to find them. torchao is told of factorised layers when it is imported.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from maestro_kernels.imports import when_imported
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.pivoted import PivotedLinear

_TORCHAO = "torchao.quantization.quant_api"
# Packages whose linear layers, or whose weights, are quantised.
_PACKAGES = {"aqlm", "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "eetq", "fbgemm_gpu"}
_PACKAGES |= {"fp_quant", "gptqmodel", "hqq", "optimum", "quanto", "spqr_quant", "torchao", "vptq"}
_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "transformers.integrations")
# What layers of PEFT are that hold a part of the model, and not only weights of their own.
_AROUND = frozenset(("BaseTuner", "BaseTunerLayer", "PeftModel", "PeftMixedModel"))


def install() -> None:
    """Have torchao's `quantize_` say what it leaves alone, now or when it is imported."""
    when_imported(_TORCHAO, _watch)


def _watch() -> None:
    quantize = getattr(sys.modules[_TORCHAO], "quantize_", None)
    if quantize is None:
        return

    @functools.wraps(quantize)
    def quantize_(model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> Any:
        result = quantize(model, config, *args, **kwargs)
        # Who passes a filter_fn has chosen.
        if not args and "filter_fn" not in kwargs:
            layers = [m for m in model.modules() if isinstance(m, LoDLayer | PivotedLinear)]
            if layers:
                warnings.warn(
                    f"quantize_: model: {len(layers)} factorised layers stay as they are, because "
                    "torchao quantises nn.Linear; maestro_kernels.nn.lower(model) turns them into "
                    "pairs of those",
                    stacklevel=2,
                )
        return result

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "torchao" and vars(module).get("quantize_") is quantize:
            module.quantize_ = quantize_  # type: ignore[attr-defined]


def quantiser_of(module: nn.Module) -> str | None:
    """Who quantised a linear or convolution layer, or None: "bitsandbytes (Linear4bit)"."""
    if not (hasattr(module, "out_features") or hasattr(module, "out_channels")):
        return None
    weight = module._parameters.get("weight")
    for kind in (type(module), type(weight)):
        path = kind.__module__
        root = path.partition(".")[0]
        if root in _PACKAGES or path.startswith(_MODULES):
            package = "torch" if path.startswith("torch.") else root
            return f"{package} ({kind.__name__})"
    if "qweight" in (*module._buffers, *module._parameters):
        return f"{type(module).__module__.partition('.')[0]} ({type(module).__name__})"
    return None


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """(N, K) as a layer states them, 0 where it does not."""
    stated = [
        (getattr(module, f"out_{what}", 0), getattr(module, f"in_{what}", 0))
        for what in ("features", "channels")
    ]
    N, K = max(stated, key=lambda pair: isinstance(pair[0], int) and pair[0])
    return N, K


def adapter_weights(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Every module that holds weights of a PEFT adapter, and which part of it that is."""
    for module in modules:
        if type(module).__module__.partition(".")[0] != "peft":
            continue
        names = {cls.__name__ for cls in type(module).__mro__}
        if "BaseTunerLayer" in names:
            parts = [(key, getattr(module, key, None)) for key in module.adapter_layer_names]  # type: ignore[union-attr]
        elif names & _AROUND:
            continue
        else:
            parts = [(type(module).__name__, module)]
        for key, part in parts:
            if isinstance(part, nn.Module):
                for inner in part.modules():
                    yield inner, f"{key} of a PEFT adapter"
