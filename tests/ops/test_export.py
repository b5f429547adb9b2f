"""Programs that torch.export and AOTInductor save in one process run in another."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

import maestro_kernels as mk

LOADERS = {
    "export": "torch.export.load(path).module()",
    "aoti": "torch._inductor.aoti_load_package(path)",
}


def model(**options):
    """A pair that is grouped, a layer without a bias, and an active rank below the stored one."""
    layers = nn.ModuleDict({"q_proj": mk.LoDLinear(16, 8, 6), "k_proj": mk.LoDLinear(16, 8, 4)})
    layers["o_proj"] = mk.LoDLinear(8, 4, 3, bias=False, activation="gelu")
    layers["q_proj"].rank = 2
    return mk.group(Block(layers)).eval()


class Block(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers["o_proj"](self.layers["q_proj"](x) * self.layers["k_proj"](x))


def export(module, x):
    with warnings.catch_warnings():
        # torch's copyreg says what will change in torch.
        warnings.simplefilter("ignore", FutureWarning)
        return torch.export.export(module, (x,))


def elsewhere(path, how, x, imports="import maestro_kernels"):
    """What a program computes of x in a process of its own: a tensor, or the error that it met."""
    torch.save(x, path.with_suffix(".in"))
    code = f"""
        import sys, torch
        {imports}
        path = {str(path)!r}
        x = torch.load(path[: -len("pt2")] + "in")
        try:
            with torch.no_grad():
                y = {LOADERS[how]}(x)
        except RuntimeError as error:
            y = str(error)
        assert {bool(imports)} == ("maestro_kernels" in sys.modules)
        torch.save(y, path[: -len("pt2")] + "out")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path.with_suffix(".out")), done.stderr


def test_a_saved_program_runs_in_another_process(tmp_path):
    block, x, path = model(), torch.randn(3, 16), tmp_path / "program.pt2"
    with torch.no_grad():
        expected = block(x)
    torch.export.save(export(block, x), path)
    found, _ = elsewhere(path, "export", x)
    torch.testing.assert_close(found, expected)
    # Without the import torch does not know the op, and says so.
    found, said = elsewhere(path, "export", x, imports="")
    assert isinstance(found, str)
    assert "maestro_kernels" in said


def test_a_lowered_program_needs_no_import(tmp_path):
    block, x, path = model(), torch.randn(3, 16), tmp_path / "program.pt2"
    with torch.no_grad():
        expected = block(x)
    torch.export.save(export(mk.nn.lower(block), x), path)
    found, _ = elsewhere(path, "export", x, imports="")
    torch.testing.assert_close(found, expected)


def test_an_exported_program_can_be_trained():
    block, x = model(), torch.randn(3, 16)
    block(x).square().sum().backward()
    expected = {name: p.grad for name, p in block.named_parameters()}
    program = export(block, x).module()
    program(x).square().sum().backward()
    for name, p in program.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_ranks_of_an_exported_program_are_buffers():
    block, x = model(), torch.randn(3, 16)
    program = export(block, x).module()
    block.layers["q_proj"].rank = 5
    program.get_buffer("layers.q_proj.active_rank").fill_(5)
    torch.testing.assert_close(program(x), block(x))


@pytest.mark.slow
def test_a_package_of_aotinductor_runs_in_another_process(tmp_path):
    """One layer: the C++ compiler takes most of a minute."""
    layer, x = mk.LoDLinear(8, 4, 3, bias=False).eval(), torch.randn(2, 8)
    layer.rank = 2
    path = tmp_path / "package.pt2"
    with torch.no_grad():
        expected, program = layer(x), export(layer, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    found, _ = elsewhere(path, "aoti", x)
    torch.testing.assert_close(found, expected)
    found, _ = elsewhere(path, "aoti", x, imports="")
    assert "Could not find schema for maestro_kernels::lod_linear" in found
