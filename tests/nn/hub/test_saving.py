"""The folder of a transformers model: whose it is, what is in it, and what a failure leaves."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from file_faults import Faults
from hub_models import assert_same, mixed, small
from torch import nn

import maestro_kernels as mk

SHARDS = "6KB"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def numbered(number, layers=2):
    """A model of which every value tells its number."""
    config = transformers.GPT2Config(
        n_embd=32, n_head=2, n_layer=layers, vocab_size=10, n_positions=8
    )
    config.bos_token_id = config.eos_token_id = 1
    model = transformers.GPT2LMHeadModel(config).eval()
    mk.convert(model, rank=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    mk.set_ranks(model, dict.fromkeys(mk.ranks(model), number % 5))
    return model


def number_of(model):
    (number,) = {int(value) for p in model.parameters() for value in p.detach().flatten()}
    assert set(mk.ranks(model).values()) == {number % 5}
    return number


class Tokenizer:
    """As much of a tokenizer as a save asks for."""

    def __init__(self, text):
        self.text = text

    def save_pretrained(self, folder):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "a.jinja").write_text(self.text)
        (folder / "tokenizer.json").write_text(self.text)


def test_what_hugging_face_writes_is_there(tmp_path):
    model, batch = small("llama")
    mixed(model)
    model.generation_config.max_new_tokens = 7
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    tokenizer = transformers.BertTokenizer(str(vocabulary))
    folder = mk.save_pretrained(model, tmp_path / "one", tokenizer=tokenizer)
    assert {"config.json", "generation_config.json", "model.safetensors"} < set(names(folder))
    assert not [name for name in names(folder) if name.startswith(".")]
    config = json.loads((folder / "config.json").read_text())
    found = config["quantization_config"]
    assert (found["quant_method"], found["version"]) == ("maestro_kernels", 3)
    kinds = (mk.LoDLinear, mk.nn.PivotedLinear)
    assert set(found["layers"]) == {n for n, m in model.named_modules() if isinstance(m, kinds)}
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert transformers.AutoTokenizer.from_pretrained(folder).vocab == tokenizer.vocab
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert again.generation_config.max_new_tokens == 7
    many = mk.save_pretrained(model, tmp_path / "many", max_shard_size=SHARDS)
    shards = [name for name in names(many) if name.endswith(".safetensors")]
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert_same(model, mk.load_pretrained(many), batch)


@pytest.mark.parametrize("first", [None, SHARDS, "transformers", "transformers, sharded"])
@pytest.mark.parametrize("second", [None, SHARDS])
def test_a_later_save_takes_the_place_of_ours_and_of_nothing_else(first, second, tmp_path):
    folder = tmp_path / "m"
    if first in (None, SHARDS):
        mk.save_pretrained(numbered(1), folder, max_shard_size=first, tokenizer=Tokenizer("1"))
    else:
        sizes = {"max_shard_size": SHARDS} if "sharded" in first else {}
        numbered(1).save_pretrained(folder, **sizes)
    (folder / ".git").mkdir()
    notes = ("notes", ".git/HEAD", "pytorch_model.bin", "model-of-mine.safetensors")
    for name in notes:
        (folder / name).write_text(name)
    mk.save_pretrained(numbered(2), folder, max_shard_size=second, tokenizer=Tokenizer("2"))
    assert number_of(mk.load_pretrained(folder)) == 2
    assert number_of(transformers.AutoModelForCausalLM.from_pretrained(folder)) == 2
    assert (folder / "additional_chat_templates" / "a.jinja").read_text() == "2"
    assert [(folder / name).read_text() for name in notes] == list(notes)
    tensors = [n for n in names(folder) if n.startswith("model") and n.endswith(".safetensors")]
    index = folder / "model.safetensors.index.json"
    expected = {"model.safetensors"}
    if second:
        expected = set(json.loads(index.read_text())["weight_map"].values())
    assert set(tensors) - {"model-of-mine.safetensors"} == expected
    assert index.exists() == (second is not None)


def test_transformers_cleans_what_we_wrote(tmp_path):
    for number in (1, 2):
        mk.save_pretrained(numbered(number), tmp_path, max_shard_size=SHARDS)
    assert [n for n in names(tmp_path) if n.count("-") == 4], "no shard with a name of its own"
    numbered(3).save_pretrained(tmp_path, max_shard_size="9KB")
    assert number_of(mk.load_pretrained(tmp_path)) == 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {name for name in names(tmp_path) if name.endswith(".safetensors")}
    assert shards == set(index["weight_map"].values())


def test_a_save_of_the_format_before_is_replaced(tmp_path):
    mk.save_pretrained(nn.Sequential(mk.LoDLinear(8, 8, 4)), tmp_path)
    assert names(tmp_path) == ["maestro.json", "model.safetensors"]
    mk.save_pretrained(numbered(1), tmp_path)
    assert names(tmp_path) == ["config.json", "generation_config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="expected a folder without a model of transformers"):
        mk.save_pretrained(nn.Sequential(mk.LoDLinear(8, 8, 4)), tmp_path)
    assert number_of(mk.load_pretrained(tmp_path)) == 1


def dense(folder):
    small("bert")[0].save_pretrained(folder)


def dense_sharded(folder):
    small("bert")[0].save_pretrained(folder, max_shard_size=SHARDS)


def dense_tensors(folder):
    dense(folder)
    (folder / "config.json").unlink()


def dense_index(folder):
    dense_sharded(folder)
    (folder / "config.json").unlink()


def config_alone(folder):
    small("bert")[0].config.save_pretrained(folder)


def weights_exchanged(folder):
    mk.save_pretrained(numbered(1), folder)
    dense_folder = folder.parent / "dense"
    dense(dense_folder)
    (dense_folder / "model.safetensors").replace(folder / "model.safetensors")


def a_tokenizer(folder):
    folder.mkdir()
    (folder / "tokenizer.json").write_text("mine")


def a_folder(folder):
    (folder / "config.json").mkdir(parents=True)


FOREIGN = {
    "dense": (dense, "another model's config.json"),
    "dense, sharded": (dense_sharded, "another model's config.json"),
    "dense without config": (dense_tensors, "a model.safetensors of another origin"),
    "dense index without config": (dense_index, "a model-00001-of-.* of another origin"),
    "a config": (config_alone, "another model's config.json"),
    "dense weights under our config": (weights_exchanged, "a model.safetensors of another origin"),
    "a tokenizer": (a_tokenizer, "another tokenizer.json"),
    "a folder": (a_folder, "other things of our names"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_somebody_elses_is_refused_and_stays(kind, tmp_path):
    make, message = FOREIGN[kind]
    make(tmp_path / "m")
    before = contents(tmp_path)
    expected = f"^save_pretrained: directory: expected a folder without {message}"
    with pytest.raises(ValueError, match=expected):
        mk.save_pretrained(numbered(1), tmp_path / "m", tokenizer=Tokenizer("new"))
    assert contents(tmp_path) == before


def test_arguments_that_do_not_fit(tmp_path):
    with pytest.raises(TypeError, match="save_pretrained: tokenizer: expected something with a sa"):
        mk.save_pretrained(numbered(1), tmp_path / "m", tokenizer="bert-base")
    for arguments in ({"max_shard_size": "1GB"}, {"processor": Tokenizer("a")}):
        with pytest.raises(ValueError, match="save_pretrained: model: expected a model of transfo"):
            mk.save_pretrained(nn.Linear(2, 2), tmp_path / "m", **arguments)
    assert names(tmp_path) == []


def test_a_tokenizer_that_cannot_be_saved_leaves_nothing(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise ValueError("no vocabulary")

    with pytest.raises(ValueError, match="no vocabulary"):
        mk.save_pretrained(numbered(1), tmp_path / "new" / "m", tokenizer=Broken())
    assert names(tmp_path) == []


def test_a_quantised_model_is_named(tmp_path):
    model = numbered(1)

    class Foreign:
        class quantization_config:
            quant_method = "other"

    model.hf_quantizer = Foreign()
    with pytest.raises(
        NotImplementedError, match=r"expected a model that is not quantised .* other"
    ):
        mk.save_pretrained(model, tmp_path)


def failing_at(number, code):
    def before(i, name, first):
        if i == number:
            raise OSError(code, os.strerror(code))

    return Faults(before)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("first", "second"), [(None, None), (None, SHARDS), (SHARDS, None)])
def test_a_disk_that_fails_leaves_the_old_or_the_new_save(first, second, step, tmp_path):
    with Faults() as faults:
        folder = tmp_path / "count"
        mk.save_pretrained(numbered(1), folder, max_shard_size=first)
        start = len(faults.events)
        mk.save_pretrained(numbered(2), folder, max_shard_size=second)
    calls = len(faults.events) - start
    assert calls > 15
    seen = set()
    for number in range(0, calls, step):
        code = (errno.ENOSPC, errno.EIO)[number % 2]
        folder = tmp_path / str(number)
        mk.save_pretrained(numbered(1), folder, max_shard_size=first)
        raised = None
        with failing_at(number, code):
            try:
                mk.save_pretrained(numbered(2), folder, max_shard_size=second)
            except OSError as error:
                raised = error
        if raised is not None:
            assert raised.errno == code
            assert str(raised.strerror).startswith("save_pretrained: directory: ")
        found = number_of(mk.load_pretrained(folder))
        assert raised is not None or found == 2
        seen.add(found)
        assert not [name for name in names(folder) if name.startswith(".")] or number < 10
        mk.save_pretrained(numbered(3), folder, max_shard_size=second)
        assert number_of(mk.load_pretrained(folder)) == 3
        assert not [name for name in names(folder) if name.startswith(".")]
    assert seen == {1, 2}


def test_a_disk_that_is_full_while_transformers_writes(tmp_path):
    """A limit on the size of a file, in a process of its own, is what a full disk looks like."""
    mk.save_pretrained(numbered(1), tmp_path / "m")
    code = f"""
        import resource, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import maestro_kernels as mk
        from test_saving import numbered
        model = numbered(2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            mk.save_pretrained(model, {str(tmp_path / "m")!r}, max_shard_size="{SHARDS}")
        except OSError as error:
            print(error.errno, error.strerror)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{errno.EFBIG} save_pretrained: directory: ")
    assert number_of(mk.load_pretrained(tmp_path / "m")) == 1
    assert names(tmp_path / "m") == ["config.json", "generation_config.json", "model.safetensors"]


KILLED = """
    import os, signal, sys
    sys.path[:0] = [{here!r}, {support!r}]
    import maestro_kernels as mk
    from file_faults import Faults
    from test_saving import numbered

    def die(i, *_):
        if i == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    models = [numbered(k) for k in range(4)]
    for at in range(int(sys.argv[3])):
        child = os.fork()
        if not child:
            sys.argv[2] = str(at)
            size = {shards!r} if at % 2 else None
            with Faults(after=die):
                mk.save_pretrained(models[at % 3 + 1], sys.argv[1], max_shard_size=size)
            os._exit(0)
        os.waitpid(child, 0)
        print(at, flush=True)
        sys.stdin.readline()
"""


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_or_the_new_one(tmp_path):
    from places import SUPPORT

    amount = 16
    folder = tmp_path / "m"
    mk.save_pretrained(numbered(3), folder)
    code = KILLED.format(here=os.path.dirname(__file__), support=str(SUPPORT), shards=SHARDS)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder), "0", str(amount)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    last, moved, stayed = 3, 0, 0
    with process:
        for at in range(amount):
            assert process.stdout.readline() == f"{at}\n"
            found = number_of(mk.load_pretrained(folder))
            assert found in (last, at % 3 + 1)
            moved, stayed = moved + (found != last), stayed + (found == last)
            last = found
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert moved
    assert stayed
    mk.save_pretrained(numbered(4), folder)
    assert number_of(mk.load_pretrained(folder)) == 4
    assert names(folder) == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_crash_between_two_architectures_is_named(tmp_path):
    from maestro_kernels.nn.hub import saving

    mk.save_pretrained(numbered(1), tmp_path)
    real = saving.move

    def stops(stage, place, name):
        if name == "config.json":
            raise OSError(errno.EIO, "gone")
        real(stage, place, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "move", stops)
        with pytest.raises(OSError, match="gone"):
            mk.save_pretrained(numbered(2, layers=1), tmp_path)
    with pytest.raises(
        ValueError, match=r"load_pretrained: config.json: expected the architecture"
    ):
        mk.load_pretrained(tmp_path)
    mk.save_pretrained(numbered(2, layers=1), tmp_path)
    assert number_of(mk.load_pretrained(tmp_path)) == 2
