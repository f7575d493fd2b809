"""Rows with room behind them: which tensors have it, and what the view of it is."""

from __future__ import annotations

import pytest
import torch

from slora import room


@pytest.mark.parametrize(("wanted", "columns"), [(0, 0), (1, 8), (8, 8), (15, 16), (48, 48)])
def test_room_is_counted_in_aligned_columns(wanted: int, columns: int) -> None:
    assert room.columns(wanted) == columns


def test_rows_and_their_views_have_the_room_and_copies_have_none() -> None:
    x = room.empty(2, 5, 12, room=10, dtype=torch.float16)
    assert (x.shape, x.dtype, x.stride()) == ((2, 5, 12), torch.float16, (5 * 28, 28, 1))
    rows = x.view(10, 12)
    wide, narrower, later = (room.widened(t, columns) for t, columns in ((rows, 16), (rows, 3), (rows[3:7], 16)))
    assert [tuple(t.shape) for t in (wide, narrower, later)] == [(10, 28), (10, 20), (4, 28)]
    assert [t.data_ptr() - x.data_ptr() for t in (wide, narrower, later)] == [0, 0, 3 * 28 * 2]
    later.fill_(1)
    rows.fill_(0)
    # What is written behind the rows is outside of them, and the other way round.
    assert wide[3:7, 12:].eq(1).all()
    assert wide[:, :12].eq(0).all()
    for other in (rows.clone(), rows + 0, rows[:, :8], rows[:, 1:], rows[::2], rows.T, x, torch.zeros(10, 12)):
        assert room.widened(other, 3) is None
    assert room.widened(rows, 17) is None


def test_the_mark_lives_as_long_as_the_storage() -> None:
    x = room.empty(4, 8, room=8)
    detached = x.detach().requires_grad_()
    del x
    assert room.widened(detached, 8) is not None
