"""Every wrong call of the tables in messages/ ends in the error that its row names."""

import pytest
from messages import command_line, files, layers, ops, search

ROWS = [*files.ROWS, *layers.ROWS, *ops.ROWS, *command_line.ROWS, *search.ROWS]


# torch warns, once a process, of nested, sparse and quantised tensors that the rows make.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_error_says_what_is_wrong(row, tmp_path):
    with pytest.raises(row.error) as caught:
        row.call(tmp_path)
    assert caught.type is row.error
    assert row.message in str(caught.value)
