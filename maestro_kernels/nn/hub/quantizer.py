"""What transformers calls when it loads or saves a model with factorised layers.

Imports transformers, so only `registration` imports it, and only where transformers is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from maestro_kernels.nn.grouping import group
from maestro_kernels.nn.hub import seals
from maestro_kernels.nn.hub.record import METHOD, Record, parse_record
from maestro_kernels.nn.hub.seals import CONFIG, Stored
from maestro_kernels.nn.kinds import open_form
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.pivoted import PivotedLinear
from maestro_kernels.nn.placing import Where, build_layer
from maestro_kernels.nn.structure import LayerRecord, is_conv1d, linear_like, plain
from maestro_kernels.nn.swapping import find_slots, swap_layers

_FN = "from_pretrained"
# transformers marks what it has read, so as not to draw it afresh.
_READ = "_is_hf_initialized"


class LoDConfig(QuantizationConfigMixin):
    """The quantization_config of a config.json: which layers are factorised, and how.

    Raises:
        ValueError: a version that is not known, or anything else that no save has written.
    """

    def __init__(self, **found: Any) -> None:
        self.quant_method = METHOD
        self.record = parse_record(_FN, CONFIG, found)

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json."""
        return self.record.to_dict()


class LoDQuantizer(HfQuantizer):
    """Builds factorised layers before transformers loads weights, and describes them when it saves.

    A model carries it only while it is loaded or saved. Before and after it is a model like any
    other, that trains, compiles and moves: nothing in it is quantised.
    """

    requires_calibration = True
    requires_parameters_quantization = False

    def __init__(self, quantization_config: LoDConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # What to save instead of the model's own state_dict.
        self.given: Mapping[str, Tensor] | None = None
        self._asked: torch.dtype | None = None
        self._layers: dict[str, nn.Module] = {}

    @property
    def record(self) -> Record:
        """What the config says."""
        record: Record = self.quantization_config.record
        return record

    # --- what transformers asks ---

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Whether it can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether gradients flow."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights themselves can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile takes the layers."""
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Note what was asked for: what is in the config, or another dtype for all tensors."""
        self._asked = dtype
        return dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """The dtype to read a tensor in; None for that in which it was saved."""
        return None if self._keeps() else super().get_new_dtype(converter, param, dtype)

    def update_attn_implementation(self, config: Any) -> Any:
        """Seen before transformers looks for the files."""
        seals.forget_the_name(config)
        return config

    # Earlier versions of transformers call these two at that moment.
    update_tp_plan = update_attn_implementation
    update_ep_plan = update_attn_implementation

    # --- loading ---

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> nn.Module:
        if not checkpoint_files:
            raise NotImplementedError(
                f"{_FN}: state_dict: expected a folder for a model with factorised layers, got a "
                "state_dict; build the model with convert and load that into it"
            )
        contents = seals.check(_FN, [Path(name) for name in checkpoint_files], self.record)
        self.quantization_config.record = contents.record
        self._build(model, contents.tensors)
        if self._keeps():
            _keep_dtypes(model, contents.tensors)
        return model

    def _keeps(self) -> bool:
        """Whether no other dtype was asked for than that of the model that was saved."""
        return str(self._asked) in (f"torch.{self.record.dtype}", "None")

    def _build(self, model: Any, tensors: Mapping[str, Stored]) -> None:
        """Hang layers on the meta device where the record has factorised ones."""
        at = Where(f"{_FN}: {CONFIG}", f"{_FN}: tensors")
        modules = {plain(path): m for path, m in model.named_modules(remove_duplicate=False)}
        if self._open(model, modules):
            modules = {plain(path): m for path, m in model.named_modules(remove_duplicate=False)}
        places = find_slots(model)
        layers: dict[int, nn.Module] = {}
        names: dict[str, str] = {}
        for name, record in self.record.structure.layers.items():
            here = _name_in(model, name, modules)
            if here is None:
                if type(model).__name__ in (model.config.architectures or ()):
                    raise ValueError(
                        f"{at.model}: expected a layer {name!r} in the model, got none"
                    )
                # The head of another architecture: transformers says what it leaves out.
                continue
            names[name] = here
            old = modules[here]
            if id(old) not in layers:
                layers[id(old)] = self._layer(at, name, record, old, tensors)
            self._layers[here] = layers[id(old)]
        for name in self.record.structure.linears:
            other = modules.get(_name_in(model, name, modules) or "")
            if other is not None and is_conv1d(other):
                layers[id(other)] = linear_like(other)
        for key, new in layers.items():
            for parent, child in places[key]:
                setattr(parent, child, new)
        self._tie(model, names)

    def _open(self, model: Any, modules: Mapping[str, nn.Module]) -> bool:
        """Open the modules that were open when the model was saved, if there are any."""
        forms: dict[nn.Module, nn.Module] = {}
        for name in self.record.structure.opened:
            here = _name_in(model, name, modules)
            form = None if here is None else open_form(modules[here])
            if here is not None and form is not None:
                forms[modules[here]] = form
        swap_layers(model, forms, inplace=True)
        return bool(forms)

    def _layer(
        self,
        at: Where,
        name: str,
        record: LayerRecord,
        old: nn.Module,
        tensors: Mapping[str, Stored],
    ) -> nn.Module:
        """The factorised layer for one place, as the files have it."""
        found = {}
        for part in sorted(record.tensors):
            stored = self._stored(at, f"{name}.{part}", tensors)
            if part in ("active_rank", "order") and stored.dtype is torch.int32:
                found[part] = stored.read()
            else:
                dtype = stored.dtype or torch.uint8
                found[part] = torch.empty(stored.shape, dtype=dtype, device="meta")
        layer = build_layer(at, name, record, old, found)
        if not self._keeps():
            layer.to(self._asked)
        return layer.requires_grad_(True)

    def _stored(self, at: Where, key: str, tensors: Mapping[str, Stored]) -> Stored:
        """Where the files have a tensor: under its name, an older one, or that of its tie."""
        for own in (key, self.record.structure.ties.get(key, key)):
            for name in (_moved(own, self.record.stored), own):
                if name in tensors:
                    return tensors[name]
        raise ValueError(f"{at.tensors}: expected {key!r}, got no such tensor")

    def _tie(self, model: Any, names: Mapping[str, str]) -> None:
        """Tell transformers which parameters of factorised layers are one, and which are gone."""
        tied = model.all_tied_weights_keys
        parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
        for key, other in list(tied.items()):
            if not {key, other} <= parameters:
                del tied[key]
        for key, other in self.record.structure.ties.items():
            ends = [_moved(end, names) for end in (key, other)]
            if set(ends) <= parameters:
                tied[ends[0]] = ends[1]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        marked = any(hasattr(p, _READ) for p in model.parameters())
        for name, layer in self._layers.items():
            held = layer.named_parameters()
            # What accelerate keeps on a disk is on the meta device here.
            missing = [k for k, p in held if not p.is_meta and not hasattr(p, _READ)]
            if marked and missing:
                raise ValueError(
                    f"{_FN}: tensors: expected {name + '.' + missing[0]!r}, got no such tensor"
                )
            _settle(name, layer)
        if self.record.structure.grouped:
            group(model)
        self._leave(model)
        return model

    def _leave(self, model: Any) -> None:
        """Make it a model like any other: save_pretrained brings a quantizer of its own."""
        self.remove_quantization_config(model)
        for module in model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig):
                vars(config).pop("_is_quantized", None)

    # --- saving ---

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
        """What goes into the files: every tensor by its plain name, and the header."""
        given = self.given if self.given is not None else model.state_dict()
        state = {plain(key): value for key, value in given.items()}
        for key, other in self.record.structure.ties.items():
            if other in state:
                state.pop(key, None)
        for name, record in self.record.structure.layers.items():
            for part in record.tensors:
                value = state.get(f"{name}.{part}")
                if value is not None and not value.is_meta:
                    state[f"{name}.{part}"] = _own(value, part)
        return state, seals.header_of(self.record)


def _own(value: Tensor, part: str) -> Tensor:
    """A tensor that transformers does not take for one with another.

    It compares addresses, and all empty tensors lie at 0; the rank of one layer under two names is
    one buffer, of which it wants to read both.
    """
    if not value.numel():
        return value.new_empty(1)[:0].reshape(value.shape)
    return value.clone() if part in ("active_rank", "order") else value


def _name_in(model: Any, name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of a saved layer in a model that may have more around it, or less."""
    prefix = f"{model.base_model_prefix}."
    for here in (name, name.removeprefix(prefix), prefix + name):
        if here in modules:
            return here
    return None


def _moved(key: str, names: Mapping[str, str]) -> str:
    name, _, part = key.rpartition(".")
    return f"{names[name]}.{part}" if name in names else key


def _keep_dtypes(model: Any, tensors: Mapping[str, Stored]) -> None:
    """Let the model expect every tensor in its saved dtype; transformers reads it in that."""
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for key, value in held.items():
                name = f"{path}.{key}" if path else key
                stored = tensors.get(name)
                if value is None or stored is None or stored.dtype in (None, value.dtype):
                    continue
                if value.is_meta and value.is_floating_point() and stored.dtype.is_floating_point:
                    new = torch.empty_like(value, dtype=stored.dtype)
                    wanted = isinstance(value, nn.Parameter)
                    held[key] = nn.Parameter(new, value.requires_grad) if wanted else new


def _settle(name: str, layer: nn.Module) -> None:
    """Give a loaded layer memory of its own and the rank that was read with it."""
    for parameter in layer.parameters():
        # Where a file is mapped, tensors lie anywhere; fast kernels read in pieces of 16 bytes.
        if not parameter.is_meta and parameter.data_ptr() % 16:
            parameter.data = parameter.detach().clone()
    # Earlier versions of transformers keep whole layers of some models in float32, their ints too.
    if isinstance(layer, PivotedLinear):
        layer.order = layer.order.to(torch.int32)
        return
    assert isinstance(layer, LoDLayer)
    read = layer.active_rank
    if read.is_meta or int(read) != layer.rank:
        got = "none" if read.is_meta else int(read)
        raise ValueError(
            f"{_FN}: tensors: expected the rank {layer.rank} of {name!r} as its active_rank, got "
            f"{got}; was another save going on?"
        )
    layer.active_rank = read.to(torch.int32, copy=True)
    layer.changed()
