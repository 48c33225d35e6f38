"""What may stand in a file for a state dict."""

import numpy as np
import pytest

from fourdstar_jax.convert import rules


def test_a_state_dict_is_tensors_by_name():
    state = {"a.weight": np.ones(3), "b": np.zeros((2, 5), np.int64)}
    assert rules.state_dict(state) == state


@pytest.mark.parametrize(
    "tree, why",
    [
        ([1, 2], "a list where the state dict should be"),
        (None, "a NoneType where the state dict should be"),
        ({7: np.ones(3)}, "7 is no name of a tensor"),
        ({"a\nb": np.ones(3)}, r"'a\\nb' is no name of a tensor"),
        ({"a": 1.0}, "a is no tensor"),
    ],
)
def test_anything_else_is_told_in_a_line(tree, why):
    with pytest.raises(ValueError, match=why) as caught:
        rules.state_dict(tree)
    assert "\n" not in str(caught.value)
