"""Every layer of a model as two factors, a layer at a time, each on disk before the next is made.

A prefix of a layer's factors is its best approximation at that rank, so they are made once, up to
the largest rank that pays, and cut when ranks are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maestro_kernels.compression.work import Work, key_of
from maestro_kernels.measure.progress import Advance
from maestro_kernels.nn.conversion import check_values, in_place_of, layer_from_pairs
from maestro_kernels.nn.factorize import factorize
from maestro_kernels.nn.moments import input_moments
from maestro_kernels.nn.swapping import settle, swap_layers
from maestro_kernels.search.layers import Layer
from maestro_kernels.search.sensitivities import LayerSensitivity, Sensitivity
from maestro_kernels.search.trial import Factors, matrices

_FN = "compress"
# Moments of the inputs of layers that are held at a time: this, or a quarter of the model.
_MOMENTS = 256 * 2**20
_SHARE = 4


def decompose(
    model: nn.Module,
    layers: Mapping[str, Layer],
    tops: Mapping[str, int],
    batches: list[Any] | None,
    work: Work,
    key: str,
    advance: Advance,
) -> None:
    """Write the factors of every layer that is not on disk yet.

    Layers of one pass over the batches share it: as many as their moments leave memory for.

    Args:
        model: dense; not changed.
        layers: of it.
        tops: the largest rank of each.
        batches: to weight errors by; None is the plain SVD.
        work: where to.
        key: of all that the factors depend on.
        advance: told of every layer.

    Raises:
        ValueError: a weight or an input is not finite.
    """
    modules = dict(model.named_modules())
    missing = [name for name in layers if work.read(_file(name, layers), _key(key, name)) is None]
    done = len(layers) - len(missing)
    for names in _together(missing, layers, batches is not None, _bytes(model)):
        moments: dict[str, Tensor] = {}
        if batches is not None:
            chosen = {name: modules[name] for name in names}
            advance(f"inputs of {names[0]}", done, len(layers))
            moments = input_moments(model, chosen, batches, fn=_FN, argument="--data")
        for name in names:
            advance(name, done, len(layers))
            layer, module = layers[name], modules[name]
            weight = module.weight
            assert isinstance(weight, Tensor)
            check_values(_FN, f"{name}.weight", weight)
            tensors = _decomposed(layer, module, moments.pop(name, None), tops[name])
            work.write(_file(name, layers), _key(key, name), tensors, {})
            done += 1
    advance("factors", len(layers), len(layers))


def _file(name: str, layers: Mapping[str, Layer]) -> str:
    return f"layer-{list(layers).index(name):05d}"


def _key(key: str, name: str) -> str:
    return key_of(key, name)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _together(
    names: list[str], layers: Mapping[str, Layer], weighted: bool, size: int
) -> Iterator[list[str]]:
    """Layers by passes over the batches, in order."""
    limit = max(_MOMENTS, size // _SHARE) if weighted else 0
    part: list[str] = []
    held = 0
    for name in names:
        layer = layers[name]
        more = 8 * layer.groups * layer.K**2
        if part and held + more > limit:
            yield part
            part, held = [], 0
        part.append(name)
        held += more
    if part:
        yield part


def _decomposed(
    layer: Layer, module: nn.Module, moment: Tensor | None, top: int
) -> dict[str, Tensor]:
    """Factors in the dtype of the weight, and the error of each prefix."""
    tensors = {}
    whole, kept = 0.0, torch.zeros(top, dtype=torch.float64)
    for g, matrix in enumerate(matrices(layer, module)):
        one = None if moment is None else moment[g]
        u, v = factorize(matrix, top, one)
        tensors[f"u{g}"], tensors[f"v{g}"] = u, v
        energy, parts = _energies(matrix, u, v, one)
        whole, kept = whole + energy, kept + parts
    shares = torch.zeros(layer.max_rank + 1, dtype=torch.float64)
    if whole > 0:
        # Beyond the top nothing is asked for; at the full rank nothing is lost.
        shares[: top + 1] = 1 - torch.cat((kept.new_zeros(1), kept.cumsum(0) / whole))
        shares[top + 1 : layer.max_rank] = shares[top]
    tensors["errors"] = shares.clamp_min(0)
    return tensors


def _energies(matrix: Tensor, u: Tensor, v: Tensor, moment: Tensor | None) -> tuple[float, Tensor]:
    """||W S||^2, and what each component has of it: their outputs are orthogonal."""
    w, right = matrix.double(), v.double()
    if moment is None:
        whole, weighted = float(w.square().sum()), right
    else:
        moment = moment / moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        whole, weighted = float(((w @ moment) * w).sum()), right @ moment
    return whole, u.double().square().sum(0) * (weighted * right).sum(1)


def factors(
    layers: Mapping[str, Layer], work: Work, key: str
) -> Iterator[tuple[str, Factors, np.ndarray[Any, Any]]]:
    """Name, factors (mapped from disk) and errors of every layer.

    Raises:
        ValueError: the files were removed meanwhile.
    """
    for name, layer in layers.items():
        found = work.read(_file(name, layers), _key(key, name))
        if found is None:
            raise ValueError(
                f"{_FN}: --out: expected the factors of {name!r} in {str(work.folder)!r}, got "
                "none; run the command again"
            )
        tensors, _ = found
        pairs = tuple((tensors[f"u{g}"], tensors[f"v{g}"]) for g in range(layer.groups))
        yield name, pairs, tensors["errors"].numpy()


def sensitivity_of(
    layers: Mapping[str, Layer],
    work: Work,
    key: str,
    rows: Mapping[str, tuple[int, ...]],
    weighted: bool,
) -> Sensitivity:
    """The errors of all layers, as `search.allocate` takes them, with their factors."""
    found = {}
    for name, pairs, errors in factors(layers, work, key):
        values = np.sqrt(np.maximum(errors[:-1] - errors[1:], 0))
        one = LayerSensitivity(layers[name], errors, values, rows.get(name, ()), factors=pairs)
        found[name] = one
    method = "data" if weighted else "svd"
    unit = "share of the layer's output energy" if weighted else "share of ||W||^2"
    return Sensitivity(method, unit, found)


def assemble(
    model: nn.Module,
    layers: Mapping[str, Layer],
    ranks: Mapping[str, int | str],
    work: Work,
    key: str,
    advance: Callable[[str, int, int], None],
) -> nn.Module:
    """Put factors in the place of the dense layers that have a rank."""
    modules = dict(model.named_modules())
    for i, (name, pairs, _) in enumerate(factors(layers, work, key)):
        rank, kind = ranks[name], layers[name].kind
        advance(name, i, len(layers))
        if isinstance(rank, str):
            continue
        # Copies: the files that these are mapped from will go.
        cut = [(u[:, :rank].contiguous().clone(), v[:rank].clone()) for u, v in pairs]
        module = modules.pop(name)
        layer = in_place_of(module, layer_from_pairs(module, kind, cut), share=True)
        model = swap_layers(model, {module: layer}, inplace=True)
        del module
    return settle(model)
