"""The discriminator beside a decoder in training: made, and its turn in each step (section 3.1)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax.nn import Dtype
from fourdstar_jax.nn.adversarial import discriminator_loss, generator_hinge, only_if
from fourdstar_jax.nn.discriminator import Discriminator
from fourdstar_jax.train import optim
from fourdstar_jax.train import state as train_state
from fourdstar_jax.train.state import TrainState


class Adversary(NamedTuple):
    """What does not change of a discriminator in training; what does is `TrainState.judge`.

    In each step of the decoder from `first_step` on the discriminator first judges the decoded
    pictures, then learns from the same ones and the true ones. Before, neither costs anything.
    """

    graphdef: nnx.GraphDef
    tx: optax.GradientTransformation
    weight: float  # of the hinge in the decoder's loss
    first_step: int
    r1_weight: float
    r1_every: int

    def hinge(
        self, judge: TrainState, step: Int[Array, ""], fake: Float[Array, "*b h w 3"]
    ) -> Float[Array, ""]:
        """The decoder's hinge term before weighting; 0 before the first step."""
        model = nnx.merge(self.graphdef, judge.params, judge.rest)
        return only_if(step >= self.first_step, lambda: generator_hinge(model(fake)))

    def learn(
        self,
        judge: TrainState,
        step: Int[Array, ""],
        real: Float[Array, "B *b h w 3"],
        fake: Float[Array, "B *b h w 3"],
        *,
        skip: Bool[Array, ""] | bool = False,
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """The discriminator after its step, and the parts of its loss; unchanged where `skip`.

        `r1` is computed in every `r1_every`-th step and as many times as large there, so that its
        mean over the steps is the penalty's.
        """

        def loss(params):
            model = nnx.merge(self.graphdef, params, judge.rest)
            return discriminator_loss(
                model, real, fake, judge.step, r1_weight=self.r1_weight, r1_every=self.r1_every
            )

        wanted = (step >= self.first_step) & ~jnp.asarray(skip)
        grads, parts = only_if(wanted, lambda: jax.grad(loss, has_aux=True)(judge.params))
        if "r1" in parts:
            parts["r1"] = self.r1_every * parts["r1"]
        learnt = train_state.apply_gradients(judge, grads, self.tx)
        return jax.tree.map(lambda new, old: jnp.where(wanted, new, old), learnt, judge), parts


def create(
    resolution: int,
    *,
    weight: float,
    start: float,
    multiplier: float,
    learning_rate: float,
    r1_weight: float,
    r1_every: int,
    dtype: Dtype,
    steps: int,
    key: Any,
    mesh: Mesh,
    make_state: Callable[..., Any] = train_state.create,
) -> tuple[Adversary | None, TrainState | None]:
    """A discriminator of pictures of `resolution` and its state; none where `weight` is 0.

    `weight` is that in the decoder's loss, `start` a share of all `steps`, `multiplier` that of the
    discriminator's channels; `r1_*` are those of `nn.adversarial.discriminator_loss`. Its optimizer
    has StyleGAN2's betas, and keeps no average. With `make_state=train_state.abstract` the state is
    one of shapes.

    Raises ValueError for a resolution that the discriminator has no form for.
    """
    if weight == 0:
        return None, None
    tx = optim.make_optimizer(
        optax.constant_schedule(learning_rate), b1=0.0, b2=0.99, weight_decay=0.0, clip_norm=10.0
    )
    arguments = dict(resolution=resolution, multiplier=multiplier, dtype=dtype)
    graphdef, judge = make_state(Discriminator, arguments, tx, key, mesh)
    return Adversary(graphdef, tx, weight, round(start * steps), r1_weight, r1_every), judge
