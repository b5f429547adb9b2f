"""Damaged saves: each ends in the right model or in a named error, with the model untouched."""

import hashlib
import json
import random

import pytest
import torch
from torch import nn

import maestro_kernels as mk
from maestro_kernels.nn import PivotedLinear
from maestro_kernels.nn.saved_file import read_header

TENSORS, COPY = "model.safetensors", "maestro.json"


class Parts(nn.Module):
    """Every kind of entry that a save knows: ties, buffers of both sorts, groups, a convolution."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)
        self.v, self.out = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.conv, self.norm = nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)
        self.register_buffer("places", torch.arange(4), persistent=False)


def dense():
    torch.manual_seed(1)
    return Parts().eval()


def original():
    torch.manual_seed(0)
    model = mk.convert(Parts().eval(), rank=3, allow_larger=True)
    model.k.u = model.q.u
    model.q.rank, model.k.rank = 2, 1
    model.out = PivotedLinear.from_lod(model.out)
    return mk.group(model)


def content(model):
    """Everything of a model that a load may change, bit for bit."""
    tensors = {k: (v.dtype, tuple(v.shape), v.tolist()) for k, v in model.state_dict().items()}
    kinds = {name: (type(m), m.training) for name, m in model.named_modules()}
    return tensors, kinds, mk.ranks(model) if isinstance(model.q, mk.LoDLinear) else {}


def objects(model):
    return [id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())]


@pytest.fixture
def saved(tmp_path):
    return mk.save_pretrained(original(), tmp_path / "m")


def split(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, body, *, signed):
    """A safetensors file; with `signed` its digest is right, so that nothing stops at it."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if signed and isinstance(metadata, dict):
        blank = {"maestro_kernels.sha256": "0" * 64}
        header = {"__metadata__": {**blank, **metadata, **blank}} | {
            key: value for key, value in header.items() if key != "__metadata__"
        }
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + body
    if signed:
        data = data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)
    return data


def flipped(data, chance, end):
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        at, kind = chance.randrange(end), chance.randrange(5)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at] = chance.choice(b'0123456789"{}[]:,-. \xff\x00')
        elif kind == 2:
            data[at:at] = bytes(chance.choices(b'0123456789"{}[],', k=chance.randrange(1, 5)))
        elif kind == 3:
            del data[at : at + chance.randrange(1, 9)]
        else:
            del data[at + chance.randrange(len(data) - at) :]
        end = max(min(end, len(data)), 1)
        if not data:
            break
    return bytes(data)


STRANGE = (
    *(None, True, False, 0, 1, 2, 3, 4, -1, 7, 2**31, 2**70, 2.0, 1.5, "", "u", "2", "relu", "q.u"),
    *("pivoted_linear", "lod_conv2d", [], {}, [1], ["q.u"], {"a": 1}, "F16", "I32", [0, 4]),
)


def changed(value, chance):
    """A copy of a JSON value with one part replaced, removed, added or renamed."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.15:
        return chance.choice(STRANGE)
    if isinstance(value, list):
        at = chance.randrange(len(value))
        return [changed(v, chance) if i == at else v for i, v in enumerate(value)]
    key, kind = chance.choice(list(value)), chance.randrange(8)
    if kind == 0:
        return {k: v for k, v in value.items() if k != key}
    if kind == 1:
        return {**value, chance.choice(("q", "x", "norm.weight", "")): value[key]}
    if kind == 2:
        return {(key[:-1] if k == key else k): v for k, v in value.items()}
    return {**value, key: changed(value[key], chance)}


def mutated(pristine, copy, chance):
    """(file, JSON, whether the header says what another model might say) of one more folder."""
    kind = chance.randrange(5)
    header, body = split(pristine)
    if kind == 0:
        return flipped(pristine, chance, 8 + len(pristine) - len(body)), copy, False
    if kind == 1:
        return pristine, flipped(copy, chance, len(copy)), False
    if kind == 2:
        return joined(changed(header, chance), body, signed=False), copy, False
    if kind == 3:
        return joined(changed(header, chance), body, signed=True), copy, True
    structure = json.loads(header["__metadata__"]["maestro_kernels"])
    text = json.dumps(changed(structure, chance))
    if chance.random() < 0.05:
        text = text.replace("{}", "[" * 100_000, 1)
    header["__metadata__"]["maestro_kernels"] = text
    return joined(header, body, signed=True), copy, True


class Subject:
    """A dense model that stays the same through every load that fails; a fresh one after others."""

    def __init__(self, folder, right):
        self.folder, self.right = folder, right
        self.renew()

    def renew(self):
        self.model = dense()
        self.before, self.parts = content(self.model), objects(self.model)

    def attempt(self, *, open_to_change):
        """Load; whether that succeeded."""
        loaded, error = None, None
        try:
            loaded = mk.load_pretrained(self.folder, self.model)
        except ValueError as raised:
            error = raised
        if loaded is None:
            assert type(error) is ValueError
            assert str(error).startswith("load_pretrained: ")
            assert content(self.model) == self.before
            assert objects(self.model) == self.parts
            return False
        if not open_to_change:
            assert content(loaded) == self.right
        else:
            with torch.no_grad():
                assert loaded.q(torch.ones(2, 6)).shape == (2, 6)
        self.renew()
        return True


@pytest.mark.parametrize("count", [2000, pytest.param(50_000, marks=pytest.mark.exhaustive)])
def test_a_changed_save_is_the_right_model_or_a_named_error(count, saved):
    right = content(mk.load_pretrained(saved, dense()))
    assert right == content(original())
    pristine, copy = (saved / TENSORS).read_bytes(), (saved / COPY).read_bytes()
    chance, loaded, subject = random.Random(0), 0, Subject(saved, right)
    for _ in range(count):
        file, text, open_to_change = mutated(pristine, copy, chance)
        (saved / TENSORS).write_bytes(file)
        (saved / COPY).write_bytes(text)
        loaded += subject.attempt(open_to_change=open_to_change)
    # The JSON beside the tensors does not matter; most of what else can be changed does.
    assert count / 6 < loaded < count / 2


def test_every_bit_of_the_tensors_counts(saved):
    pristine = (saved / TENSORS).read_bytes()
    chance = random.Random(0)
    _, body = split(pristine)
    for _ in range(50):
        data = bytearray(pristine)
        data[-1 - chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        (saved / TENSORS).write_bytes(data)
        with pytest.raises(ValueError, match="content that does not match its digest"):
            mk.load_pretrained(saved, dense())


def old_format(folder):
    """The folder as version 1 wrote it: the structure in JSON, no header, no digest."""
    header, body = split((folder / TENSORS).read_bytes())
    structure = json.loads(header["__metadata__"]["maestro_kernels"])
    header["__metadata__"] = {"format": "pt"}
    for name in structure.pop("buffers"):
        assert name == "places"
        # It is the last of its element size.
        start, end = header.pop(name)["data_offsets"]
        body = body[:start] + body[end:]
        for entry in header.values():
            if "data_offsets" in entry and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [at - (end - start) for at in entry["data_offsets"]]
    (folder / TENSORS).write_bytes(joined(header, body, signed=False))
    (folder / COPY).write_text(json.dumps({**structure, "version": 1}, indent=1))
    assert read_header(folder / TENSORS) is None


def test_a_folder_of_the_old_format_loads(saved):
    right = content(mk.load_pretrained(saved, dense()))
    old_format(saved)
    assert content(mk.load_pretrained(saved, dense())) == right


def test_a_changed_folder_of_the_old_format_loads_or_is_refused(saved):
    right = content(mk.load_pretrained(saved, dense()))
    old_format(saved)
    pristine, copy = (saved / TENSORS).read_bytes(), (saved / COPY).read_bytes()
    chance, subject = random.Random(0), Subject(saved, right)
    for i in range(300):
        text = flipped(copy, chance, len(copy))
        if i % 2:
            text = json.dumps(changed(json.loads(copy), chance)).encode()
        (saved / COPY).write_bytes(text)
        # Without a digest a changed activation is another model; an error has to be a named one.
        subject.attempt(open_to_change=True)
    assert (saved / TENSORS).read_bytes() == pristine
