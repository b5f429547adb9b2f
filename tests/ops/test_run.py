"""The way of a call from a layer to a kernel is as short as CONTRIBUTING.md draws it."""

import sys
from pathlib import Path

import pytest
import torch

import maestro_kernels as mk

PACKAGE = str(Path(mk.__file__).parent)


@pytest.mark.parametrize("backend", ["matmul", "reference"])
def test_four_frames_lead_from_a_layer_to_a_backend(backend):
    layer = mk.LoDLinear(40, 24, max_rank=8).eval()
    layer.backend = backend
    x, walks = torch.randn(3, 40), []

    def look(frame, event, _):
        code = frame.f_code
        here = code.co_name == "forward" and f"backends/{backend}" in code.co_filename
        if event == "call" and here:
            walk = []
            while frame:
                if frame.f_code.co_filename.startswith(PACKAGE):
                    walk.append(frame.f_code.co_name)
                frame = frame.f_back
            walks.append(walk[::-1])

    with torch.no_grad():
        layer(x)
        sys.setprofile(look)
        try:
            layer(x[:2])  # as nobody called it before: the short cut knows no such call
        finally:
            sys.setprofile(None)
    assert walks == [["forward", "lod_linear", "run", "forward"]]
