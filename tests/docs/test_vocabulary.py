"""One word for one thing: public signatures use the words of docs/guide/vocabulary.md, its way."""

import dataclasses
import inspect
import re
from collections import Counter

import pytest
from places import ROOT

import maestro_kernels as mk
from maestro_kernels import search, training

MODULES = (mk, mk.nn, search, training)
PAGE = ROOT / "docs" / "guide" / "vocabulary.md"
# What torch's own classes call their arguments, and its protocols ask for.
TORCH = {"mode", "state", "state_dict", "kernel_size", "stride", "padding", "padding_mode"}
TORCH |= {"dilation", "groups", "in_channels", "out_channels", "in_features", "out_features"}
# These make a model of what lies there, so the path comes first.
LOADERS = {"load_pretrained"}
# Asks about a loss; the model is what its error looks into.
LOADERS |= {"check_loss"}


def public():
    """{qualified name: function} of everything a user may call with arguments."""
    found = {}
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                if not dataclasses.is_dataclass(value) and "__init__" in vars(value):
                    found[name] = value.__init__
                for method, function in vars(value).items():
                    function = getattr(function, "__func__", function)
                    if not method.startswith("_") and inspect.isfunction(function):
                        found[f"{name}.{method}"] = function
            elif inspect.isfunction(value):
                found[name] = value
    return found


PUBLIC = public()


def parameters(function):
    every = inspect.signature(function).parameters.values()
    return [p for p in every if p.name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD]


def words():
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*) \| [^|]+ \|$", text, re.M)
    return {word for row in rows for word in re.findall(r"`(\w+)`", row)}


def test_every_shared_argument_is_a_word_of_the_page():
    used = Counter(p.name for function in PUBLIC.values() for p in parameters(function))
    shared = {word for word, times in used.items() if times > 1}
    assert shared - TORCH - words() == set()
    assert words() - set(used) == set()


@pytest.mark.parametrize("name", PUBLIC)
def test_the_model_comes_first_and_the_path_behind_it(name):
    names = [p.name for p in parameters(PUBLIC[name])]
    if "model" in names and name not in LOADERS:
        assert names[0] == "model"
    paths = {"path", "directory"} & set(names)
    if "model" in names and paths:
        assert {names[1]} == paths


@pytest.mark.parametrize("name", PUBLIC)
def test_words_mean_the_same_everywhere(name):
    for p in parameters(PUBLIC[name]):
        if p.name == "inplace":
            assert (p.default, p.kind) == (True, p.KEYWORD_ONLY)
        if p.name in ("include", "exclude", "progress"):
            assert p.default is None
        if p.name in ("seconds", "progress", "loss_fn", "allow_larger"):
            assert p.default is not p.empty or "batches" in [
                q.name for q in parameters(PUBLIC[name])
            ]
        assert p.name not in ("fn", "data", "module", "new", "batch_sizes", "out", "folder")


@pytest.mark.parametrize(
    ("verb", "inverse"),
    [("prepack", "unpack"), ("group", "ungroup"), ("convert", "to_dense"), ("save", "load")],
)
def test_inverse_verbs_stand_beside_each_other(verb, inverse):
    suffix = r"(_pretrained|_checkpoint)?" if verb == "save" else ""
    pairs = [
        (n, n.replace(verb, inverse)) for n in PUBLIC if re.search(rf"(^|\.){verb}{suffix}$", n)
    ]
    assert pairs
    for name, other in pairs:
        assert other in PUBLIC, f"{name} without {other}"
        if verb != "save":
            assert hasattr(mk, verb)
            assert hasattr(mk, inverse)
