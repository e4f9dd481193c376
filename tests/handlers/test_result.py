import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from handlers.result import Result, softmax


def result_of(sample_logits: list[list[float]], unpurified: list[float]) -> Result:
    """One image whose copies gave these logits."""
    logits = np.array([sample_logits], np.float32)
    copies = logits.shape[1]
    purified = np.arange(copies, dtype=np.float32).reshape(1, copies, 1, 1, 1) * np.ones(
        (1, copies, 3, 2, 2), np.float32
    )
    return Result(logits, purified, np.array([unpurified], np.float32), {})


def test_most_votes_win_over_the_larger_mean() -> None:
    result = result_of([[1, 0], [1, 0], [0, 50]], [1, 0])
    assert result.votes.tolist() == [[2, 1]]
    assert result.labels.tolist() == [0]
    assert result.logits[0, 1] > result.logits[0, 0]
    assert result.agreement[0] == pytest.approx(2 / 3)
    assert not result.flagged[0]


def test_equal_votes_are_decided_by_the_mean_logits() -> None:
    result = result_of([[0, 3, 0], [0, 0, 5], [4, 3.5, 0]], [9, 0, 0])
    assert result.votes.tolist() == [[1, 1, 1]]
    assert result.ranking.tolist() == [[1, 2, 0]]
    assert result.flagged[0]


def test_the_representative_votes_for_the_label() -> None:
    assert result_of([[1, 0], [0, 1], [0, 1]], [1, 0]).representative(0).max() == 1


@given(arrays(np.float32, (4, 6, 3), elements=st.floats(-50, 50, width=32)))
def test_votes_and_ranking_are_consistent(logits: np.ndarray) -> None:
    result = Result(logits, np.zeros((4, 6, 3, 1, 1), np.float32), logits[:, 0], {})
    assert (result.votes.sum(axis=1) == 6).all()
    assert np.array_equal(np.sort(result.ranking, axis=1), np.tile(np.arange(3), (4, 1)))
    assert (result.votes[np.arange(4), result.labels] == result.votes.max(axis=1)).all()
    assert np.allclose(result.confidences.sum(axis=1), 1, atol=1e-5)
    assert ((result.agreement > 0.3) & (result.agreement <= 1)).all()


def test_softmax_does_not_overflow() -> None:
    assert np.allclose(softmax(np.array([[1e4, 0]], np.float32)), [[1, 0]])
