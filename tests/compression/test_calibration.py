"""Batches from a user's files: nothing judged was fitted to, and the same files give the same."""

import pytest
import torch

from maestro_kernels.compression import architectures, calibration, data


@pytest.fixture(scope="module")
def opened(language):
    found = architectures.find(str(language))
    return found, found.load()


def rows(batches):
    return [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]


def test_the_end_of_a_text_judges_a_language_model(opened, language):
    data = calibration.read(*opened, language / "text.txt", None, 7)
    train, judge = rows(data.batches), rows(data.held_out)
    assert (data.inputs, data.judged) == (len(train), len(judge)) == (7, 7)
    assert {len(row) for row in train + judge} == {64}
    assert not set(train) & set(judge)
    text = "\n".join(calibration.lines(language / "text.txt", "--data"))
    words = opened[0].processor()
    end = words(text[-(len(text) // 5) :])["input_ids"]
    assert judge[0] == tuple(end[:64])
    again = calibration.read(*opened, language / "text.txt", None, 7)
    assert rows(again.batches) == train
    # A distillation takes more of the same part.
    more = calibration.read(*opened, language / "text.txt", None, 7, steps=20)
    assert rows(more.batches) == train
    assert len(rows(more.training)) == 80
    assert not set(rows(more.training)) & set(rows(more.held_out))


def test_another_file_judges(opened, language, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Some other words. " * 60)
    data = calibration.read(*opened, language / "text.txt", other, None)
    assert not set(rows(data.batches)) & set(rows(data.held_out))
    words = opened[0].processor()
    length = len(rows(data.held_out)[0])
    assert rows(data.held_out)[0] == tuple(words(other.read_text().strip())["input_ids"][:length])


def test_folders_name_classes(vision):
    found = architectures.find(str(vision))
    data = calibration.read(found, found.load(), vision / "images", None, None)
    assert data.labels is not None
    assert len(data.labels) == data.judged == 79
    assert data.labels.unique().tolist() == list(range(10))
    assert data.inputs == 397 - 79
    assert data.batches[0]["pixel_values"].shape == (32, 3, 8, 8)
    # A folder that names no class tells nothing.
    data = calibration.read(found, found.load(), vision / "images" / "digit 1", vision, None)
    assert data.labels is not None
    (vision / "pictures").symlink_to(vision / "images" / "digit 1")
    data = calibration.read(found, found.load(), vision / "pictures", None, None)
    (vision / "pictures").unlink()
    assert data.labels is None


def test_pairs_are_divided_by_a_tab_or_in_the_middle():
    assert calibration._halves("one two\tthree") == ("one two", "three")
    assert calibration._halves("one two three four") == ("one two", "three four")
    assert calibration._halves("one") == ("one", "one")


@pytest.mark.parametrize("most", [1, 3, 5, 9])
def test_samples_are_spread_evenly(most):
    found = data.spread(list(range(5)), most)
    assert len(found) == min(most, 5)
    assert found == sorted(set(found))


def test_every_kind_has_an_example(opened, vision):
    batch = calibration.example(*opened)
    assert batch["input_ids"].shape == (1, 64)
    found = architectures.find(str(vision))
    model = found.load()
    assert calibration.example(found, model)["pixel_values"].shape == (1, 3, 8, 8)
    model.to(torch.bfloat16)
    assert calibration.example(found, model)["pixel_values"].dtype == torch.bfloat16
