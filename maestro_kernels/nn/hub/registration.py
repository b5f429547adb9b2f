"""transformers is told of our quantizer when it is imported; importing this costs nothing.

`from_pretrained` finds the quantizer by the quant_method of a config.json. `save_pretrained` of a
model asks nobody, so it is wrapped: for a model without factorised layers it does what it did.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from maestro_kernels.imports import when_imported
from maestro_kernels.nn.hub import seals
from maestro_kernels.nn.hub.record import METHOD, record_of
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.lowering import is_lowered
from maestro_kernels.nn.pivoted import PivotedLinear

OLDEST = (5, 0)
_MODELS = "transformers.modeling_utils"
_MARK = "_maestro_kernels"


def install() -> None:
    """Register with transformers, now or when it is imported."""
    when_imported(_MODELS, _register)


def is_pretrained(model: object) -> bool:
    """Whether a model is one of transformers."""
    models = sys.modules.get(_MODELS)
    return models is not None and isinstance(model, models.PreTrainedModel)


def check_version(fn: str) -> None:
    """Raise NotImplementedError for a transformers that we do not know."""
    import transformers

    version = transformers.__version__
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise NotImplementedError(
            f"{fn}: transformers: expected version {oldest} or later, got {version}"
        )


def _register() -> None:
    models = sys.modules[_MODELS]
    save = models.PreTrainedModel.save_pretrained
    if not hasattr(save, _MARK):
        models.PreTrainedModel.save_pretrained = _wrapped(save)
    from transformers.quantizers import auto

    try:
        check_version("from_pretrained")
    except NotImplementedError as error:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _refusing(error)
        return
    from maestro_kernels.nn.hub.quantizer import LoDConfig, LoDQuantizer

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LoDConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = LoDQuantizer


def config_of(found: Mapping[str, Any]) -> Any:
    """A quantization_config of transformers from its JSON object."""
    from maestro_kernels.nn.hub.quantizer import LoDConfig

    return LoDConfig(**found)


def _refusing(error: NotImplementedError) -> type:
    class Refusing:
        @classmethod
        def from_dict(cls, *_: Any, **__: Any) -> None:
            raise error

    return Refusing


def _wrapped(save: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if not getattr(self, "_hf_peft_config_loaded", False):
            _refuse_lowered(self)
        if not _needs_us(self):
            return save(self, *args, **kwargs)
        with described(self, given.get("state_dict")) as name:
            result = save(self, *args, **kwargs)
        # transformers refuses a file with no more than a line in its log.
        folder = Path(given["save_directory"])
        if folder.is_dir():
            seals.seal(folder, name)
        return result

    setattr(save_pretrained, _MARK, True)
    return save_pretrained


def _needs_us(model: Any) -> bool:
    """Whether transformers would write factorised layers that nobody could read."""
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    # Adapters are saved without the model that they belong to.
    if method == METHOD or getattr(model, "_hf_peft_config_loaded", False):
        return False
    return any(isinstance(m, LoDLayer | PivotedLinear) for m in model.modules())


@contextmanager
def described(model: Any, state: Any = None) -> Iterator[str]:
    """Let a model have a quantizer that describes it; the name of the save.

    Raises:
        NotImplementedError: it has another one, it was lowered, or transformers is too old.
        ValueError: a layer that cannot be built again from its factors.
    """
    fn = "save_pretrained"
    check_version(fn)
    _refuse_lowered(model)
    from maestro_kernels.nn.hub.quantizer import LoDConfig, LoDQuantizer

    if getattr(model, "hf_quantizer", None) is not None:
        method = model.hf_quantizer.quantization_config.quant_method
        raise NotImplementedError(
            f"{fn}: model: expected a model that is not quantised beside its factorised layers, "
            f"got one quantised by {getattr(method, 'value', method)}"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    record = record_of(fn, model, dtype, _stored_names(model))
    config = LoDConfig(**record.to_dict())
    quantizer = LoDQuantizer(config, pre_quantized=True)
    quantizer.given = state
    before = vars(model.config).get("quantization_config")
    model.hf_quantizer, model.config.quantization_config = quantizer, config
    try:
        yield record.save
    finally:
        del model.hf_quantizer
        if before is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


def _refuse_lowered(model: Any) -> None:
    """Raise for a model whose tensors have names that its architecture has not."""
    if is_lowered(model):
        raise NotImplementedError(
            "save_pretrained: model: expected the layers that its configuration describes, got a "
            "lowered model, which from_pretrained could not load: save it before mk.nn.lower, or "
            "its state_dict()"
        )


def _stored_names(model: nn.Module) -> dict[str, str]:
    """Factorised layer -> the name under which transformers saves it, where that is another."""
    from transformers import core_model_loading

    from maestro_kernels.nn.structure import plain

    factors = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, LoDLayer | PivotedLinear):
            factors[f"{plain(path)}.u"] = layer.u.detach()
    owners = {id(tensor): key for key, tensor in factors.items()}
    names = {}
    for key, tensor in core_model_loading.revert_weight_conversion(model, dict(factors)).items():
        own = owners.get(id(tensor), key)
        if own != key:
            names[own.removesuffix(".u")] = key.removesuffix(".u")
    return names
