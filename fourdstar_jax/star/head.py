"""The head: a small causal transformer over the K sub-codes of a token (depth transformer).

As UniTok's AutoRegressiveHead (github.com/FoundationVision/UniTok): the sequence is the trunk's
hidden state, then embeddings of codes 1 to K-1; slot k predicts code k. No positional encoding. One
output matrix per codebook, zero at the start, so that training starts at ln(vocab). For comparison
the codes may be predicted in parallel instead, none knowing of another.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fourdstar_jax import nn
from fourdstar_jax.star.embed import vector
from fourdstar_jax.star.transformer import KV, Layer


@jax.custom_vjp
def _products(
    x: Float[Array, "K R E"], weights: Float[Array, "K E vocab"]
) -> Float[Array, "K R vocab"]:
    """x times weights in float32; gradients are products in the type of x, as are all others."""
    return jnp.matmul(x, weights, preferred_element_type=jnp.float32)


def _gradients(arrays, dy):
    x, weights = arrays
    dy = dy.astype(x.dtype)
    return dy @ weights.swapaxes(1, 2), x.swapaxes(1, 2) @ dy


_products.defvjp(lambda x, weights: (_products(x, weights), (x, weights)), _gradients)


class DepthHead(nnx.Module):
    """p(codes of a token | hidden state) by the chain rule over the K codes.

    With `parallel` it is the product of what each code is likely to be by itself: the layers then
    see the hidden state alone.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        num_codebooks: int,
        vocab_size: int,
        parallel: bool = False,
        init,
        out_init=None,
        dtype,
        rngs: nnx.Rngs,
    ):
        kw = nn.CommonInit(init=init, dtype=dtype, rngs=rngs)
        self.input = nn.linear(dim, head_dim, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        shape, axes = (num_codebooks - 1, vocab_size, head_dim), (None, "vocab", None)
        # One code a token has none before it, and checkpoints hold no empty arrays.
        several = num_codebooks > 1 and not parallel
        self.tables = vector(rngs.params(), *shape, std=1.0, axes=axes) if several else None
        self.layers = nnx.List(
            [
                Layer(head_dim, num_heads, hidden_dim, out_init=out_init, **kw)
                for _ in range(num_layers)
            ]
        )
        self.norm = nnx.RMSNorm(head_dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        zeros = nnx.with_partitioning(nnx.initializers.zeros, (None, None, "vocab"))
        shape = (num_codebooks, head_dim, vocab_size)
        self.output = nnx.Param(zeros(rngs.params(), shape, jnp.float32))
        self.num_codebooks, self.parallel = num_codebooks, parallel

    def logits(self, x: Float[Array, "*b D"], code: int) -> Float[Array, "*b vocab"]:
        weights = self.output[...][code].astype(x.dtype)
        return jnp.matmul(x, weights, preferred_element_type=jnp.float32)

    def features(
        self, hidden: Float[Array, "R D"], tokens: Int[Array, "R K"]
    ) -> Float[Array, "R K E"]:
        """What each code is predicted from: the hidden state and the codes before it."""
        x = self.input(hidden)[:, None]
        if self.tables is not None:
            codes = self.tables[...][jnp.arange(self.num_codebooks - 1), tokens[:, :-1]]
            x = jnp.concatenate([x, codes.astype(x.dtype)], axis=1)  # [R, K, E]
        for layer in self.layers:
            q, own = layer.qkv(x, None)
            x = layer.finish(x, nn.attend_short(q, own.k, own.v), None)
        x = self.norm(x)
        return jnp.broadcast_to(x, (x.shape[0], self.num_codebooks, x.shape[-1]))

    def all_logits(self, features: Float[Array, "R K E"]) -> Float[Array, "R K vocab"]:
        """Of every code, from what it is predicted from."""
        weights = self.output[...].astype(features.dtype)
        return jnp.moveaxis(_products(jnp.moveaxis(features, 1, 0), weights), 0, 1)

    def __call__(
        self, hidden: Float[Array, "R D"], tokens: Int[Array, "R K"]
    ) -> Float[Array, "R K vocab"]:
        """Logits of every code given the ones before it."""
        return self.all_logits(self.features(hidden, tokens))

    def decode(
        self,
        hidden: Float[Array, "R D"],
        pick: Callable[[int, Float[Array, "R vocab"]], Int[Array, " R"]],
    ) -> tuple[Int[Array, "R K"], Float[Array, "R K vocab"]]:
        """Codes one after the other, each chosen by `pick(k, logits)`; also the logits."""
        if self.parallel:
            found = self(hidden, jnp.zeros((len(hidden), self.num_codebooks), jnp.int32))
            codes = [pick(k, found[:, k]) for k in range(self.num_codebooks)]
            return jnp.stack(codes, axis=1), found
        x = self.input(hidden)[:, None]
        past: list[KV | None] = [None] * len(self.layers)
        tokens, logits = [], []
        for code in range(self.num_codebooks):
            for i, layer in enumerate(self.layers):
                x, own = layer(x, past[i])
                past[i] = own if code == 0 else jax.tree.map(
                    lambda a, b: jnp.concatenate([a, b], axis=1), past[i], own
                )  # fmt: skip
            logits.append(self.logits(self.norm(x)[:, 0], code))
            tokens.append(pick(code, logits[-1]))
            if self.tables is not None and code < self.num_codebooks - 1:
                x = self.tables[...][code, tokens[-1]][:, None].astype(x.dtype)
        return jnp.stack(tokens, axis=1), jnp.stack(logits, axis=1)


def filter_logits(
    logits: Float[Array, "*b vocab"], *, top_k: int | None, top_p: Float[Array, ""] | None
) -> Float[Array, "*b vocab"]:
    """-inf for codes outside the `top_k` best and outside the smallest set of mass `top_p`."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
        inside = mass - jax.nn.softmax(ranked, axis=-1) < top_p  # the first one always
        least = jnp.min(ranked, axis=-1, where=inside, initial=jnp.inf, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def cooled(
    logits: Float[Array, "*b vocab"],
    temperature: Float[Array, ""],
    *,
    top_k: int | None,
    top_p: Float[Array, ""] | None,
    keep: int | None = None,
) -> Float[Array, "*b vocab"]:
    """Logits to sample from: at a temperature, then filtered.

    The code `keep` has the odds against all others that it has without either. One code against
    hundreds that share what is left wins when it is cold: blank tokens would eat an object's
    outline from all sides.
    """
    temperature = jnp.maximum(temperature, 1e-30)  # below float32's range of normal numbers is 0
    if keep is None:
        return filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
    kept = jnp.arange(logits.shape[-1]) == keep
    others = jnp.where(kept, -jnp.inf, logits)
    odds = logits[..., keep] - jax.nn.logsumexp(others, axis=-1)
    others = (others - jnp.max(others, axis=-1, keepdims=True)) / temperature
    others = filter_logits(others, top_k=top_k, top_p=top_p)
    blank = odds + jax.nn.logsumexp(others, axis=-1)
    return jnp.where(kept, blank[..., None], others)


def likeliest(logits: Float[Array, "*b vocab"], keep: int | None = None) -> Int[Array, "*b"]:
    """The most probable code; `keep` where it is likelier than all others together, else never."""
    if keep is None:
        return jnp.argmax(logits, axis=-1)
    others = jnp.where(jnp.arange(logits.shape[-1]) == keep, -jnp.inf, logits)
    rather = logits[..., keep] > jax.nn.logsumexp(others, axis=-1)
    return jnp.where(rather, keep, jnp.argmax(others, axis=-1))
