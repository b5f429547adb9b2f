"""LoDMultiheadAttention: nn.MultiheadAttention with q, k, v and the output as linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from maestro_kernels.nn.linear import trainable
from maestro_kernels.nn.opened import Opened, dense_linear_of, linear_of
from maestro_kernels.nn.weight import MergedWeight
from maestro_kernels.problem import DTYPES

if TYPE_CHECKING:
    from typing_extensions import Self

_INPUTS = ("q_proj", "k_proj", "v_proj")
_FN = "LoDMultiheadAttention"


class LoDMultiheadAttention(Opened):
    """y = out_proj(softmax(q · k.T / sqrt(d) + mask) · v) for each head, q = q_proj(query), ...

    Stands for nn.MultiheadAttention: the same arguments, masks, layouts and outputs, through four
    linear layers, each dense or factorised. torch's fused inference path, which reads the weights
    instead of calling anybody, is not taken: nn.TransformerEncoderLayer finds here what it looks at
    to decide so.

    Attributes:
        q_proj: a linear layer (E, E).
        k_proj: (E, kdim).
        v_proj: (E, vdim).
        out_proj: (E, E).
        bias_k: (1, 1, E), one more key for everybody, or None.
        bias_v: its value.
    """

    # What nn.TransformerEncoderLayer asks before it would read in_proj_weight.
    _qkv_same_embed_dim = False
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    # Settings of the module that this one stands for.
    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:  # noqa: D102
        if type(model) is not nn.MultiheadAttention or "forward" in vars(model):
            return False
        out = model._modules.get("out_proj")
        held = [p for p in model.parameters() if p is not None]
        return (
            type(out) is NonDynamicallyQuantizableLinear
            and set(out._parameters) == {"weight", "bias"}
            and len(model._modules) == 1
            and not model._buffers
            and all(type(p) is nn.Parameter and p.dtype in DTYPES for p in held)
        )

    @classmethod
    def of(cls, model: nn.Module) -> Self:  # noqa: D102
        assert isinstance(model, nn.MultiheadAttention)
        made = cls._around(model)
        # The class says so for all of them.
        del vars(made)["_qkv_same_embed_dim"]
        packed, bias = model.in_proj_weight, model.in_proj_bias
        weights = (
            (model.q_proj_weight, model.k_proj_weight, model.v_proj_weight)
            if packed is None
            else packed.detach().chunk(3)
        )
        biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
        out = made._modules.pop("out_proj")
        for name, weight, part in zip(_INPUTS, weights, biases, strict=True):
            own = None if part is None else trainable(part, bias)
            made._modules[name] = linear_of(weight, own, weight if packed is None else packed)
        made._modules["out_proj"] = out
        for name in ("bias_k", "bias_v"):
            if name in model._parameters:
                made.register_parameter(name, model._parameters[name])
        return made

    def close(self) -> nn.Module:  # noqa: D102
        made: Any = self._closed({*_INPUTS, "out_proj"})
        dense = [dense_linear_of(self._modules[name]) for name in _INPUTS]
        weights = [layer.weight for layer in dense]
        made._qkv_same_embed_dim = self.kdim == self.vdim == self.embed_dim
        packed = None
        if made._qkv_same_embed_dim:
            packed = trainable(torch.cat([w.detach() for w in weights]), weights[0])
        made.register_parameter("in_proj_weight", packed)
        for name, weight in zip(_INPUTS, weights, strict=True):
            made.register_parameter(f"{name}_weight", None if packed is not None else weight)
        bias = None
        if dense[0].bias is not None:
            bias = trainable(torch.cat([one.bias.detach() for one in dense]), dense[0].bias)
        made.register_parameter("in_proj_bias", bias)
        made.out_proj = _output_layer(dense_linear_of(self.out_proj))
        for name in ("bias_k", "bias_v"):
            if name in self._parameters:
                made.register_parameter(name, self._parameters[name])
        return made

    @property
    def in_proj_weight(self) -> Tensor | None:
        """(3 E, E), or None for inputs of several sizes; computed when its values are used."""
        weights: list[Any] = [layer.weight for layer in (self.q_proj, self.k_proj, self.v_proj)]
        E = self.embed_dim
        if not self.kdim == self.vdim == E:
            return None
        if torch.compiler.is_compiling():
            return torch.cat(weights)
        wanted = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
        found = MergedWeight.of(
            lambda: torch.cat([w + 0 for w in weights]), (3 * E, E), weights[0], wanted
        )
        # Models of transformers draw it afresh unless it was read from a file: its parts were.
        found._is_hf_initialized = True  # type: ignore[attr-defined]
        return found

    @property
    def in_proj_bias(self) -> Tensor | None:
        """(3 E,) or None."""
        biases: list[Any] = [layer.bias for layer in (self.q_proj, self.k_proj, self.v_proj)]
        return None if biases[0] is None else torch.cat(biases)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(y, weights or None), as nn.MultiheadAttention; without dropout outside of training."""
        batched = _check_inputs(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError(f"{_FN}: attn_mask: expected a mask with is_causal, got None")
        batch_dim = 0 if self.batch_first or not batched else 1
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (self._heads(x if batched else x[None], batch_dim) for x in (q, k, v))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(q, k, None if causal else attn_mask, key_padding_mask, query.dtype)
        k, v = self._with_more(k, v)
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[3]))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = (y.transpose(1, 2) if batch_dim == 0 else y.permute(2, 0, 1, 3)).flatten(2)
        return self.out_proj(y if batched else y[0]), weights

    def _heads(self, x: Tensor, batch_dim: int) -> Tensor:
        """(B, heads, L, d) of (B, L, E), or of (L, B, E)."""
        x = x.unflatten(2, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if batch_dim == 0 else x.permute(1, 2, 0, 3)

    def _with_more(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with those that are not of the input behind them."""
        B = k.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            one, its = (self._heads(bias, 0) for bias in (self.bias_k, self.bias_v))
            k = torch.cat((k, one.expand(B, -1, -1, -1)), 2)
            v = torch.cat((v, its.expand(B, -1, -1, -1)), 2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v

    def _mask(
        self,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None,
        padding: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """What is added to the scores, (B or 1, heads or 1, L or 1, S), or None."""
        (B, heads, L, _), S = q.shape, k.shape[2]
        mask: Tensor | None = None
        if attn_mask is not None:
            _check_shape("attn_mask", attn_mask, [(L, S), (B * heads, L, S)])
            mask = _added("attn_mask", attn_mask, dtype)
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (B, heads))
        if padding is not None:
            _check_shape("key_padding_mask", padding, [(B, S), *([(S,)] if B == 1 else [])])
            padding = _added("key_padding_mask", padding, dtype).reshape(B, 1, 1, S)
            mask = padding if mask is None else mask + padding
        return mask


def _output_layer(dense: nn.Linear) -> nn.Linear:
    """The class that nn.MultiheadAttention keeps there, which quantisers leave alone."""
    if type(dense) is NonDynamicallyQuantizableLinear:
        return dense
    N, K = dense.weight.shape
    made = NonDynamicallyQuantizableLinear(K, N, dense.bias is not None, "meta", dense.weight.dtype)
    made.weight, made.bias = dense.weight, dense.bias
    return made.train(dense.training)


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the inputs are batches."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.is_nested:
            raise NotImplementedError(f"{_FN}: {name}: expected a plain tensor, got a nested one")
        if x.dim() not in (2, 3) or x.dim() != query.dim():
            raise ValueError(
                f"{_FN}: {name}: expected 2 dimensions, or 3 with a batch, as query "
                f"{tuple(query.shape)}, got {tuple(x.shape)}"
            )
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"{_FN}: value: expected as many positions as key {tuple(key.shape)}, got "
            f"{tuple(value.shape)}"
        )
    return query.dim() == 3


def _check_shape(name: str, mask: Tensor, known: list[tuple[int, ...]]) -> None:
    if tuple(mask.shape) not in known:
        expected = " or ".join(map(str, known))
        raise ValueError(f"{_FN}: {name}: expected shape {expected}, got {tuple(mask.shape)}")


def _added(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as it is added to scores: -inf where a boolean one is set."""
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(f"{_FN}: {name}: expected bool or floating point, got {mask.dtype}")
    return mask
