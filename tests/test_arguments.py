import pytest
import torch
from torch import nn

import maestro_kernels as mk
from maestro_kernels import search, training
from maestro_kernels.arguments import renamed


@renamed(old="new")
def doubled(x, new=0):
    return 2 * (x + new)


def test_an_old_name_works_and_warns_where_it_is_used():
    with pytest.warns(DeprecationWarning, match="doubled: old is called new now") as caught:
        assert doubled(1, old=2) == 6
    assert caught[0].filename == __file__
    assert doubled(1, new=2) == 6
    with pytest.raises(TypeError, match="doubled: old: expected new alone"):
        doubled(1, old=2, new=2)


# Not as a keyword, which a search for old names would replace.
OLD = {"data": [torch.randn(64, 16)]}


def layer():
    return mk.convert(nn.Sequential(nn.Linear(16, 16)), rank=4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mk.prepack(module=layer()),
        lambda: mk.unpack(module=layer()),
        lambda: mk.refresh(module=layer()),
        lambda: mk.set_ranks(layer(), new={"0": 2}),
        lambda: mk.convert(nn.Sequential(nn.Linear(16, 16)), 4, init="data", **OLD),
    ],
)
def test_names_of_the_last_release_still_work(call):
    with pytest.warns(DeprecationWarning, match="is called"):
        assert isinstance(call(), nn.Module)


def test_profile_takes_rows_by_their_old_name():
    with pytest.warns(DeprecationWarning, match="profile: batch_sizes is called rows now"):
        found = search.profile((16, 16), (4,), batch_sizes=(2,), seconds=1e-4, resume=False)
    assert found.batch_sizes == (2,)


def test_checkpoints_take_the_path_first_and_warn(tmp_path):
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(DeprecationWarning, match="save_checkpoint: the model comes before the path"):
        path = training.save_checkpoint(tmp_path / "a.pt", model, optimizer, epoch=1)
    with pytest.warns(DeprecationWarning, match="load_checkpoint: the model comes before the path"):
        assert training.load_checkpoint(str(path), model, optimizer) == {"epoch": 1}
    assert training.load_checkpoint(model, path, optimizer) == {"epoch": 1}


def test_sensitivity_takes_progress_of_two_arguments():
    seen = []
    with pytest.warns(DeprecationWarning, match=r"sensitivity: progress: .* got one of \(done, to"):
        search.sensitivity(
            nn.Linear(16, 16), method="svd", progress=lambda done, total: seen.append((done, total))
        )
    assert seen == [(1, 1)]
