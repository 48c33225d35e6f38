"""The optimizer of all three stages: AdamW, warm-up and cosine decay, gradient clipping."""

import jax
import optax


def learning_rate_schedule(
    *, learning_rate: float, warmup_steps: int, total_steps: int, final_fraction: float = 0.1
) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine down to `final_fraction` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        learning_rate,
        warmup_steps,
        max(total_steps, warmup_steps + 1),
        end_value=final_fraction * learning_rate,
    )


def make_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW; weight decay leaves vectors (norms, biases, learned tokens) alone."""

    def is_matrix(params):
        return jax.tree.map(lambda x: x.ndim >= 2, params)

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=is_matrix),
    )
