"""The ordinary model of transformers behind a checkpoint whose own classes are not at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from maestro_kernels.nn.hub.registration import check_version
from maestro_kernels.nn.importing.sources import CONFIG, Source


def built(fn: str, source: Source) -> nn.Module:
    """A model of the architecture that a folder's config.json names, in eval mode.

    People put a prefix before the name of the class that they changed: ASVDOPTForCausalLM. The
    longest end of it that transformers knows is taken.

    Raises:
        ValueError: there is no config.json, or none of such an architecture.
        ModuleNotFoundError: transformers is not installed.
        NotImplementedError: it is too old.
    """
    names = source.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if source.folder is None or not isinstance(name, str):
        place = "a state dict" if source.folder is None else f"{str(source.folder)!r}"
        raise ValueError(
            f"{fn}: dense_model: expected the ordinary model to put the layers into, as {place} "
            f"has no {CONFIG} that names an architecture, got None"
        )
    kind = _known(fn, name)
    try:
        config = kind.config_class.from_dict(
            {k: v for k, v in source.config.items() if k not in ("auto_map", "model_type")}
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{fn}: {CONFIG}: expected the configuration of a {kind.__name__}, got another "
            f"({error})"
        ) from None
    config.architectures = [kind.__name__]
    dtypes = [t.dtype for t in source.tensors.values() if t.is_floating_point()]
    before = torch.get_default_dtype()
    try:
        # As from_pretrained does: casting afterwards would round buffers that stay float32.
        torch.set_default_dtype(dtypes[0] if dtypes else before)
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = kind(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def _known(fn: str, name: str) -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{fn}: dense_model: expected a model to put the layers into where transformers is not "
            f"installed, got None for a {name}"
        ) from None
    check_version(fn)
    for start in range(len(name)):
        kind = getattr(transformers, name[start:], None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    raise ValueError(
        f"{fn}: {CONFIG}: expected an architecture of transformers {transformers.__version__}, "
        f"perhaps with a prefix, got {name!r}; build the dense model and pass it as dense_model"
    )
