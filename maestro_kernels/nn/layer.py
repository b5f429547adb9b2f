"""What the linear and the convolution layer share: factors, active rank, truncation, checkpoints.

A layer holds u (N, R) and v, whose rows are its components, and runs at a prefix of r <= R of them.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from threading import get_ident
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from maestro_kernels.arguments import check_int
from maestro_kernels.dispatch import is_capturing
from maestro_kernels.measure import cost
from maestro_kernels.nn.factorize import factor_bounds
from maestro_kernels.nn.weight import MergedWeight
from maestro_kernels.problem import DTYPES

if TYPE_CHECKING:
    from typing_extensions import Self

# What may have changed factors unseen is given the next number: no two changes ever look like one,
# whichever threads made them.
_changes = itertools.count(1)
# Forwards under checkpointing that may wait for their backward, per layer.
_MAX_FORWARDS = 256
_node = torch._C._current_autograd_node
_next_node = torch._C._autograd._get_sequence_nr


def check_dtype(fn: str, dtype: torch.dtype | None) -> None:
    """Raise TypeError for a dtype that no backend computes in."""
    if dtype is not None and dtype not in DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{fn}: dtype: expected {expected}, got {dtype}")


class LoDLayer(nn.Module):
    """A layer whose weight is u @ v, run at the active rank r through u[:, :r] and v[:r].

    With `groups` > 1 the layer is block-diagonal: rows of u and v lie group after group, R to each
    group in v, and all groups run at the same r.

    Attributes:
        u: output factor (N, R).
        v: input factor (R, ...), (groups * R, ...) with groups.
        bias: (N,) or None.
        active_rank: r as a 0-d int32 buffer: read by compiled models and captured CUDA graphs, and
            what a checkpoint keeps. Set `rank`, which writes this and the host's copy.
    """

    # Its name in saves, in `classify` and in profiles; the names of its tensors.
    kind: ClassVar[str]
    parts: ClassVar[frozenset[str]] = frozenset({"u", "v", "bias", "active_rank"})
    u: nn.Parameter
    v: nn.Parameter
    bias: nn.Parameter | None
    active_rank: Tensor
    groups: int = 1
    _rank: int
    # Another number after whatever may have changed the values without a new version.
    _epoch: int = 0
    # (thread, its next autograd node, rank) of forwards without a graph in training mode.
    _forwards: deque[tuple[int, int, int]]

    def _install(self, u: Tensor, v: Tensor, bias: Tensor | None) -> None:
        """Take the factors, without a copy, and start at full rank."""
        self.u, self.v = _parameter(u), _parameter(v)
        self.register_parameter("bias", None if bias is None else _parameter(bias))
        self._rank, self._forwards = self.max_rank, deque(maxlen=_MAX_FORWARDS)
        self.register_buffer("active_rank", self._new_rank_buffer())

    def reset_parameters(self) -> None:
        """Draw the factors and the bias afresh; the active rank stays."""
        N, K = self.matrix_shape
        bound_u, bound_v = factor_bounds(N, K, self.max_rank)
        nn.init.uniform_(self.u, -bound_u, bound_u)
        nn.init.uniform_(self.v, -bound_v, bound_v)
        if self.bias is not None:
            bound = max(K, 1) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def max_rank(self) -> int:
        """R, the components stored; only `truncate` changes it."""
        return self.u.shape[1]

    @property
    def rank(self) -> int:
        """The active rank r, 0 <= r <= max_rank. Reading it never waits for a device."""
        return self._rank

    @rank.setter
    def rank(self, value: int) -> None:
        self._rank = check_int(type(self).__name__, "rank", value, 0, self.max_rank)
        self._write_rank()

    def _write_rank(self) -> None:
        """Bring the buffer to the host's rank, whoever else is setting it."""
        # An inference tensor can be written to in inference mode only.
        with torch.no_grad(), torch.inference_mode(self.active_rank.is_inference()):
            while True:
                rank = self._rank
                self.active_rank.fill_(rank)
                # Another thread may have written an older rank last: it will find that here.
                if self._rank == rank:
                    return

    def call_rank(self, x: Tensor) -> int | Tensor:
        """The rank to run on x at: the host's int, or the buffer if the call outlives its rank.

        A compiled or captured call must follow the rank without being made again. Read it once per
        call: another thread may set the rank meanwhile.
        """
        if torch.compiler.is_compiling() or is_capturing(x):
            return self.active_rank
        return self.forward_rank()

    def forward_rank(self) -> int:
        """The active rank, or that of the forward that checkpointing is computing again."""
        rank = self._rank
        return self._repeated_rank(rank) if self.training else rank

    def _repeated_rank(self, rank: int) -> int:
        """`rank`, or in a reentrant checkpoint's backward the one that its forward ran at.

        The forward of a checkpoint builds no graph: until it is over, the next autograd node will
        be the one after the checkpoint's own, by which its backward finds the rank again.
        """
        node = _node()
        if node is not None and type(node).__name__.startswith("Checkpoint"):
            first = node._sequence_nr() + 1
            found = [
                (thread, was) for thread, number, was in tuple(self._forwards) if number == first
            ]
            # Threads count nodes for themselves, and a GPU's backward runs in one of its own.
            mine = [was for thread, was in found if thread == get_ident()]
            then = set(mine or [was for _, was in found])
            if len(then) > 1 or (not then and len(self._forwards) == _MAX_FORWARDS):
                raise RuntimeError(
                    f"{type(self).__name__}.forward: rank: expected one rank in the forward that a "
                    f"checkpoint computes again, got {sorted(then) or 'none that is remembered'}: "
                    "set ranks outside of the checkpoint, and keep fewer than "
                    f"{_MAX_FORWARDS} forwards waiting"
                )
            rank = then.pop() if then else rank
        if not torch.is_grad_enabled():
            self._forwards.append((get_ident(), _next_node(), rank))
        return rank

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K) of the matrix that is factorised, of one group where there are several."""
        raise NotImplementedError

    @property
    def break_even_rank(self) -> float:
        """N K / (N + K): the rank from which the factors hold as many weights as the matrix."""
        return cost.break_even_rank(*self.matrix_shape)

    @property
    def weight(self) -> Tensor:
        """The merged active prefix u[:, :r] @ v[:r] in the dense layer's shape.

        The product is computed when values are used, with gradients to u and v; shape, dtype and
        device cost nothing. Writing into it raises NotImplementedError.
        """
        u, v = self.u, self.v
        if torch.compiler.is_compiling():
            # The compiler drops the product where only metadata is read, and follows the buffer.
            return self._merged(torch.where(self._active(self.active_rank), u, 0), v, u.shape[1])
        rank = self._rank
        requires_grad = torch.is_grad_enabled() and (u.requires_grad or v.requires_grad)
        return MergedWeight.of(
            lambda: self._merged(u, v, rank), self._weight_shape(), u, requires_grad
        )

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # PEFT gives a layer that it lets go of its own weight back.
        if not isinstance(value, MergedWeight) or value.like is not self.u:
            raise AttributeError(
                f"{type(self).__name__}: weight: expected it to be read, got a write: it is "
                "computed from u and v; write into those"
            )

    def importance(self) -> Tensor:
        """Per component b: ||u[:, b:]||_F * ||v[b:]||_F, float64 (R,), non-increasing.

        Covers all stored components, active or not. Source: Maestro (arXiv 2308.14929).
        """
        R = self.max_rank
        with torch.no_grad():
            u = self.u.double().square().sum(0)
            v = self.v.double().flatten(1).unflatten(0, (self.groups, R)).square().sum((0, 2))
            tails: Tensor = torch.stack((u, v)).flip(1).cumsum(1).flip(1)
            norms_u, norms_v = tails.sqrt()
            importance: Tensor = norms_u * norms_v
            return importance

    def truncate(self, rank: int | None = None, multiple_of: int = 1) -> None:
        """Drop the components beyond `rank` for good; the parameters (and gradients) shrink.

        Args:
            rank: components to keep, 0 <= rank <= max_rank; None means the active rank. A larger
                active rank becomes `rank`, a smaller one stays.
            multiple_of: keep up to this multiple, within max_rank: fast kernels want R % 8 == 0.
                The active rank is not rounded, so the function does not depend on it.

        u and v become new parameters: make the optimizer afterwards, or use training.shrink.
        """
        fn = f"{type(self).__name__}.truncate"
        keep = self._rank if rank is None else check_int(fn, "rank", rank, 0, self.max_rank)
        step = check_int(fn, "multiple_of", multiple_of, 1)
        width = min(-(-keep // step) * step, self.max_rank)
        u = _sliced(self.u, lambda t: t[:, :width])
        v = _sliced(self.v, lambda t: self._rows(t, width))
        self.u, self.v = u, v
        self.rank = min(self._rank, keep)
        self.changed()

    def train(self, mode: bool = True) -> Self:
        """Set training mode; packed copies of the factors made so far are not used again."""
        if mode:
            self.changed()
        super().train(mode)
        return self

    def changed(self) -> None:
        """Use nothing again that was made of the values so far: see `refresh`."""
        self._epoch = next(_changes)

    def to_dense(self) -> nn.Module:
        """The dense layer with the same function: the merged active prefix, rounded once."""
        raise NotImplementedError

    def _rows(self, v: Tensor, rank: int) -> Tensor:
        """The first `rank` components of v: a view, but a copy where groups lie between them."""
        if self.groups == 1 or rank * self.groups == v.shape[0]:
            return v[: rank * self.groups]
        return v.reshape(self.groups, -1, *v.shape[1:])[:, :rank].flatten(0, 1)

    def _active(self, rank: Tensor) -> Tensor:
        """Which components a rank on the device keeps, (R,) bool."""
        return torch.arange(self.max_rank, device=rank.device) < rank

    def _merged(self, u: Tensor, v: Tensor, rank: int) -> Tensor:
        if self.groups == 1:
            return (u[:, :rank] @ v[:rank].flatten(1)).reshape(self._weight_shape())
        u = u.unflatten(0, (self.groups, -1))[:, :, :rank]
        v = v.flatten(1).unflatten(0, (self.groups, self.max_rank))[:, :rank]
        return (u @ v).reshape(self._weight_shape())

    def _weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _new_rank_buffer(self) -> Tensor:
        # Built under inference_mode, the layer may still be given a rank outside.
        with torch.inference_mode(False):
            return torch.full((), self._rank, dtype=torch.int32, device=self.u.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoDLayer:
        super()._apply(fn, recurse)
        self.changed()
        # to_empty() and the move away from the meta device leave the buffer without a value.
        self._write_rank()
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problems, rank = self._read_checkpoint(state_dict, prefix)
        if problems:
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._rank = rank
        self.changed()
        if local_metadata.get("assign_to_params_buffers", False):
            # The checkpoint's own tensor may be int64, elsewhere, or shared with a second model.
            self.active_rank = self._new_rank_buffer()
        self._write_rank()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Numbers of autograd nodes mean nothing in another process; a checkpoint waits in none.
        super().__setstate__({**state, "_forwards": deque(maxlen=_MAX_FORWARDS)})

    def _read_checkpoint(self, state_dict: Mapping[str, Any], prefix: str) -> tuple[list[str], int]:
        """What is wrong with this layer's entries, and the active rank they hold."""
        name, fn = prefix or "", f"{type(self).__name__}.load_state_dict"
        problems = []
        for key, own in (("u", self.u), ("v", self.v)):
            value = state_dict.get(prefix + key)
            if isinstance(value, Tensor) and value.shape != own.shape:
                problems.append(
                    f"{fn}: {name}{key}: expected shape {tuple(own.shape)} (max_rank "
                    f"{self.max_rank}), got {tuple(value.shape)}: a checkpoint of a truncated "
                    "layer fits a layer built or truncated to the same max_rank"
                )
        value = state_dict.get(prefix + "active_rank")
        if value is None or problems:
            return problems, self._rank
        expected = f"an integer, 0 <= active_rank <= {self.max_rank}"
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_floating_point():
            got = (
                f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            )
            return [f"{fn}: {name}active_rank: expected {expected}, got {got}"], self._rank
        if value.is_meta:
            return [], self._rank
        rank = int(value)
        if not 0 <= rank <= self.max_rank:
            return [f"{fn}: {name}active_rank: expected {expected}, got {rank}"], self._rank
        return [], rank


def _parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value)


def _sliced(parameter: nn.Parameter, cut: Callable[[Tensor], Tensor]) -> nn.Parameter:
    def copy(tensor: Tensor) -> Tensor:
        return cut(tensor.detach()).clone(memory_format=torch.contiguous_format)

    small = nn.Parameter(copy(parameter), requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        small.grad = copy(parameter.grad)
    return small
