"""Every Python and shell block of README.md and docs/ runs as it stands, each by itself."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from doc_pages import LANGUAGES, ROOT, blocks, pages
from places import SUPPORT

SITE = SUPPORT / "doc_pages"
BLOCKS = [
    block
    for page in pages()
    for block in blocks(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
    if block.language in LANGUAGES.values()
]
RUN = [block for block in BLOCKS if block.fragment is None]
# Of a block: a guard against hanging, far beyond what the slowest takes on a busy machine.
TIMEOUT = 1200


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A user's: own home and caches, no network, no sibling folders, our commands on the path."""
    home = tmp_path_factory.mktemp("home")
    commands = home / "bin"
    commands.mkdir()
    for name, words in {
        "maestro-kernels": f'"{sys.executable}" "{SITE / "command.py"}"',
        "python": f'"{sys.executable}"',
    }.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(SITE / "offline"), str(ROOT)]),
        "DOCS_OUT_OF_REACH": os.pathsep.join(
            os.path.realpath(folder / "shared") for folder in (ROOT, ROOT.parent)
        ),
        "MAESTRO_KERNELS_CACHE": str(home / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.fixture(scope="module")
def server(environment):
    command = [sys.executable, str(SITE / "server.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()
        process.wait(TIMEOUT)


def test_blocks_are_found_with_their_marks():
    text = "a\n\n```python\nx = 1\n```\n\n<!-- fragment: needs a GPU -->\n```sh\nrun\n```\n"
    text += "<!-- in a checkout -->\n  ```bash\n  ls\n  ```\n```json\n{}\n```\n"
    python, shell, checkout, other = blocks(text, "page.md")
    assert (python.line, python.language, python.text, python.fragment) == (
        3, "python", "x = 1\n", None,
    )  # fmt: skip
    assert (shell.language, shell.fragment, shell.checkout) == ("shell", "needs a GPU", False)
    assert (checkout.text, checkout.fragment, checkout.checkout) == ("ls\n", None, True)
    assert other.language == "json"


def test_most_blocks_run():
    assert len(RUN) > 25
    assert {"README.md", "docs/guide/models.md", "docs/guide/training.md"} <= {
        block.page for block in RUN
    }


def run_python(server, environment, folder, file):
    log = folder.parent / "log.txt"
    order = {"file": str(file), "folder": str(folder), "log": str(log)}
    order["environment"] = {"TMPDIR": str(folder.parent)}
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline()), log.read_text(encoding="utf-8")


@pytest.mark.parametrize("block", [b for b in RUN if b.language == "python"], ids=str)
def test_python_block_runs(block, server, environment, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    file = tmp_path / "block.py"
    # Line numbers of a traceback are those of the page.
    file.write_text("\n" * block.line + block.text, encoding="utf-8")
    status, log = run_python(server, environment, folder, file)
    assert status == 0, f"{block}\n{log}"


@pytest.mark.parametrize("block", [b for b in RUN if b.language == "shell"], ids=str)
def test_shell_block_runs(block, environment, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    if block.checkout:
        for name in ("bench", "docs", "examples"):
            shutil.copytree(ROOT / name, folder / name)
        shutil.copy(ROOT / "README.md", folder)
    script = tmp_path / "block.sh"
    script.write_text(block.text, encoding="utf-8")
    done = subprocess.run(
        ["bash", "-eu", str(script)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{block}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import socket; socket.create_connection(('192.0.2.1', 80), 5)", "connects to"),
        (f"open({str(ROOT.parent / 'shared' / 'review.md')!r})", "which no user has"),
        ("undefined_name", "NameError"),
    ],
    ids=["network", "shared folder", "a name of another block"],
)
def test_what_a_user_does_not_have_is_out_of_reach(code, message, server, environment, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    file = tmp_path / "block.py"
    file.write_text(code, encoding="utf-8")
    status, log = run_python(server, environment, folder, file)
    assert status == 1
    assert message in log


def test_a_block_leaves_nothing_behind_for_the_next(server, environment, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    for code in (
        "import torch; torch.marker = 1",
        "import torch; assert 'marker' not in vars(torch)",
    ):
        file = tmp_path / "block.py"
        file.write_text(code, encoding="utf-8")
        status, log = run_python(server, environment, folder, file)
        assert status == 0, log


def test_the_limit_that_training_md_names_is_torchs():
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    text = (ROOT / "docs" / "guide" / "training.md").read_text(encoding="utf-8")
    assert f"`torch._dynamo.config.recompile_limit` ({limit})" in text
