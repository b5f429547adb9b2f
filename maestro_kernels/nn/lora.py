"""What PEFT puts in the place of a LoDLinear. Imports peft: imported when peft has been."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from maestro_kernels.functional import lod_linear
from maestro_kernels.nn.factorize import recompress
from maestro_kernels.nn.linear import LoDLinear, trainable

_INITS = ("gaussian", "orthogonal", "eva")


class LoraLoDLinear(LoraLinear):
    """y = base(x) + scale · x @ A.T @ B.T, the sum over the active adapters.

    The second term is one `lod_linear` call with y as its residual, whatever the base runs on.
    Merging puts the adapter in front of the factors, u = [scale · B, u], v = [A; v], and the active
    rank grows by that of the adapter; unmerging takes it off again, bit for bit.

    Attributes:
        merge_method: "columns", or "svd": the closest factors at the rank that the layer had, which
            cannot be unmerged.

    Raises:
        NotImplementedError: a layer with an activation of its own, or a variant such as DoRA, which
            needs the matrix.
    """

    merge_method = "columns"

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        base: Any = base_layer
        while hasattr(base, "base_layer"):
            base = base.base_layer
        if getattr(base, "activation", None) is not None:
            raise NotImplementedError(
                "LoRA: base_layer: expected a LoDLinear without an activation of its own, got "
                f"{base.activation!r}"
            )
        super().__init__(base_layer, *args, **kwargs)
        # True in configurations for GPT-2, whose Conv1D is a LoDLinear now.
        self.fan_in_fan_out = False
        self._bias_before: dict[str, Tensor] = {}

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """LoRA itself only."""
        return {(): None}

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        """None, which stands for LoRA itself.

        Raises:
            NotImplementedError: the configuration wants another variant, or another initialisation
                than one that leaves the base layer alone.
        """
        init = config.init_lora_weights
        if isinstance(init, str) and init.lower() not in _INITS:
            raise NotImplementedError(
                f"LoRA: init_lora_weights: expected True, False or one of {_INITS} on a LoDLinear, "
                f"got {init!r}, which would change the matrix"
            )
        try:
            return super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            raise NotImplementedError(
                f"LoRA: config: expected plain LoRA on a LoDLinear, got another variant ({error})"
            ) from None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # PEFT's own warns of every class that it does not know.
        return module.in_features, module.out_features  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Y (..., N) for x (..., K)."""
        if (
            args
            or kwargs
            or self.disable_adapters
            or self.merged
            # After `lower` there are standard layers only.
            or not isinstance(self.get_base_layer(), LoDLinear)
        ):
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        y = result = self.base_layer(x)
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            A, B = self.lora_A[name].weight, self.lora_B[name]
            scale = float(self.scaling[name])
            # Adapters of a model in half precision are float32.
            x = self._cast_input_dtype(x, A.dtype)
            y = lod_linear(
                self.lora_dropout[name](x),
                B.weight,
                A,
                None if B.bias is None else B.bias * scale,
                residual=y.to(x.dtype),
                scale=scale,
            )
        return y.to(result.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the factors of the base layer, as `merge_method` says.

        Args:
            safe_merge: raise ValueError, and change nothing, if a result is not finite.
            adapter_names: None means the active ones.

        Raises:
            ValueError: the rank would exceed min(N, K).
            NotImplementedError: the base layer was lowered.
        """
        names = self.to_merge(adapter_names)
        if not names:
            return
        base = self.get_base_layer()
        u, v, bias = base.u.detach(), base.v.detach(), base.bias
        svd = self.merge_method == "svd"
        if svd:
            # Beyond the active rank nothing has to be kept.
            u, v = u[:, : base.rank], v[: base.rank]
        before = {}
        for name in names:
            A, B = self.lora_A[name].weight, self.lora_B[name]
            scale = float(self.scaling[name])
            u = torch.cat(((B.weight.detach().double() * scale).to(u), u), 1)
            v = torch.cat((A.detach().to(v), v))
            if B.bias is not None:
                before[name] = bias
                bias = trainable((bias + B.bias * scale).detach().to(bias), bias)
        added = u.shape[1] - (base.rank if svd else base.max_rank)
        rank = base.rank + (0 if svd else added)
        if svd:
            u, v = recompress(u, v, min(base.max_rank, u.shape[1]))
        if safe_merge and not all(bool(t.isfinite().all()) for t in (u, v)):
            raise ValueError(f"LoRA.merge: adapter_names: expected finite weights, got {names}")
        base.u, base.v, base.bias = trainable(u, base.u), trainable(v, base.v), bias
        base.rank = rank
        base.changed()
        self._bias_before.update(before)
        self.merged_adapters.extend(names)

    def to_merge(self, adapter_names: list[str] | None = None) -> list[str]:
        """The adapters that `merge` would merge; raises what it would."""
        found = check_adapters_to_merge(self, adapter_names) or ()
        names = [name for name in found if name in self.lora_A]
        fn = "LoRA.merge"
        if not names:
            return names
        base = self._factorised(fn)
        grown = base.max_rank + sum(len(self.lora_A[name].weight) for name in names)
        if self.merge_method == "columns" and grown > min(base.matrix_shape):
            raise ValueError(
                f"{fn}: adapter_names: expected at most min(N, K) = {min(base.matrix_shape)} "
                f"components with the adapter's, got {grown}: truncate the layer, or "
                'mk.nn.merge_adapters(model, method="svd")'
            )
        if base.bias is None and any(self.lora_B[name].bias is not None for name in names):
            raise ValueError(f"{fn}: bias: expected a base layer with one for lora_bias, got None")
        return names

    def _factorised(self, fn: str) -> LoDLinear:
        """The base layer; raises where it is none of ours any more."""
        base = self.get_base_layer()
        if not isinstance(base, LoDLinear):
            raise NotImplementedError(
                f"{fn}: base_layer: expected a LoDLinear, got {type(base).__name__}: merge and "
                "unmerge before the model is lowered"
            )
        return base

    def unmerge(self) -> None:
        """Take merged adapters off the factors again.

        Raises:
            NotImplementedError: they were merged by "svd", or the base layer was lowered.
        """
        if not self.merged_adapters:
            return
        base = self._factorised("LoRA.unmerge")
        if self.merge_method == "svd":
            raise NotImplementedError(
                'LoRA.unmerge: merge_method: expected "columns", which can be undone, got "svd"'
            )
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name not in self.lora_A:
                continue
            r = len(self.lora_A[name].weight)
            u, v = base.u.detach()[:, r:], base.v.detach()[r:]
            base.u = trainable(u.clone(memory_format=torch.contiguous_format), base.u)
            base.v = trainable(v.clone(), base.v)
            base.rank = max(min(base.rank, base.max_rank + r) - r, 0)
            if name in self._bias_before:
                before = self._bias_before.pop(name)
                assert base.bias is not None
                base.bias = trainable(before.detach().to(base.bias), base.bias)
        base.changed()
