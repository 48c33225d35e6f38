"""STAR's trainer: the lengths of clips, and the orders of views, that it draws."""

import collections

import numpy as np

from fourdstar_jax.train import star


def test_some_steps_have_shorter_clips():
    batch = {"tokens": np.zeros((2, 5, 3)), "times": np.zeros((2, 5)), "clip": np.zeros(2)}
    seen = collections.Counter()
    for step in range(400):
        short = star.shortened(batch, 0, step, still=0.1, half=0.3)
        assert short["tokens"].shape[1] == short["times"].shape[1]
        assert short["clip"].shape == (2,)
        seen[short["times"].shape[1]] += 1
        again = star.shortened(batch, 0, step, still=0.1, half=0.3)
        assert again["times"].shape == short["times"].shape
    assert set(seen) == {1, 3, 5} and 20 < seen[1] < 60 and 80 < seen[3] < 160


def test_views_come_in_another_order_with_their_cameras():
    views = np.broadcast_to(np.arange(5), (2, 5))
    batch = {"viewmats": views, "Ks": views, "tokens": np.broadcast_to(views[:, None], (2, 3, 5))}
    orders = set()
    for step in range(20):
        found = star.reordered(batch, 0, step)
        order = found["viewmats"][0]
        np.testing.assert_array_equal(found["tokens"][1, 2], order)
        np.testing.assert_array_equal(found["Ks"][1], order)
        assert order[0] == 0 and sorted(order) == list(range(5))
        orders.add(tuple(order))
    assert len(orders) > 5
