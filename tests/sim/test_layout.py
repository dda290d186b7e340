import numpy as np
import pytest

from sim import from_kernel_layout, to_kernel_layout


def test_there_and_back():
    heads = np.random.default_rng(0).standard_normal((3, 5, 4))
    batch = to_kernel_layout(heads)
    assert batch.shape == (1, 5, 3, 4)
    assert batch.flags.c_contiguous
    assert batch[0, 2, 1].tolist() == heads[1, 2].tolist()
    assert np.array_equal(from_kernel_layout(batch), heads)
    two = np.concatenate([batch, 2 * batch])
    assert np.array_equal(from_kernel_layout(two, 1), 2 * heads)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: to_kernel_layout(np.zeros((2, 3))), r"x must be \[heads, length, head_dim\]"),
        (lambda: from_kernel_layout(np.zeros((2, 3, 4))), r"x must be \[batch, length, heads"),
        (lambda: from_kernel_layout(np.zeros((2, 3, 4, 5)), 2), "request must be 0 to 1, got 2"),
    ],
)
def test_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
