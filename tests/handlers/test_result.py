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


def test_the_score_is_how_much_less_probable_the_label_is_and_how_sure_the_other() -> None:
    samples = np.array([[[0, 1, 2], [3, 0, 1]]], np.float32)
    result = Result(samples, np.empty(0, np.float32), np.array([[1, 4, 1]], np.float32), {})
    before, after = softmax(np.array([1.0, 4, 1])), softmax(samples[0].astype(float)).mean(axis=0)
    drop = float(np.log(before[1] / after[1]) * after[0])
    assert result.scores[0] == pytest.approx(drop + np.exp(-3), rel=1e-5)


@given(arrays(np.float32, (5, 4, 3), elements=st.floats(-1e4, 1e4, width=32)))
def test_scores_are_finite_and_not_negative(logits: np.ndarray) -> None:
    assert np.isfinite(scores := Result(logits[:, 1:], np.empty(0, np.float32), logits[:, 0], {}).scores).all()
    assert (scores >= 0).all()


def test_an_image_that_purification_does_not_change_is_not_suspicious() -> None:
    same, moved = (result_of([[9, 0], [8, 0]], before).scores[0] for before in ([8.5, 0], [0, 5]))
    assert same < 0.001
    assert moved > 5


def test_an_image_at_the_border_of_two_classes_is_suspicious_even_where_purification_does_not_move_it() -> None:
    border, inside = (result_of([before, before], before).scores[0] for before in ([5, 4.9, 0], [5, 1, 0]))
    assert border == pytest.approx(np.exp(-0.1))
    assert inside < border / 40


def test_an_image_that_loses_its_answer_for_no_other_is_less_suspicious_than_one_with_a_new_answer() -> None:
    lost, new = (result_of([after, after], [6, 0, 0]).scores[0] for after in ([0, 0, 0], [0, 6, 0]))
    assert lost < new / 5


def test_samples_that_were_not_drawn_do_not_count() -> None:
    logits = np.array([[[1, 0], [3, 0], [np.nan] * 2], [[0, 1], [2, 0], [0, 5]]], np.float32)
    result = Result(logits, np.zeros((2, 3, 3, 1, 1), np.float32), np.zeros((2, 2), np.float32), {})
    alone = Result(logits[:1, :2], np.zeros((1, 2, 3, 1, 1), np.float32), np.zeros((1, 2), np.float32), {})
    assert result.samples.tolist() == [2, 3]
    assert result.votes.tolist() == [[2, 0], [1, 2]]
    assert result.sample_labels.tolist() == [[0, 0, -1], [1, 0, 1]]
    assert result.agreement[0] == 1
    for value in ("logits", "confidences", "scores"):
        assert getattr(result, value)[0] == pytest.approx(getattr(alone, value)[0])


def test_softmax_does_not_overflow() -> None:
    assert np.allclose(softmax(np.array([[1e4, 0]], np.float32)), [[1, 0]])
