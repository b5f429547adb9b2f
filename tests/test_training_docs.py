"""The snippets of docs/training.md run as they stand, one after the other."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()
    dist.destroy_process_group()


def test_snippets(one_process):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) > 5
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["freezer"].epoch(0) == "v"
    assert set(names["ranks"].values()) == {64, 10}


def test_the_limit_it_names_is_torchs():
    limit = torch._dynamo.config.recompile_limit
    assert f"`torch._dynamo.config.recompile_limit` ({limit})" in PAGE.read_text(encoding="utf-8")
