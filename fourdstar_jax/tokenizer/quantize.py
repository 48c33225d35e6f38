"""Multi-codebook cosine quantiser of UniTok, with usage statistics and dead-code repair.

A vector is cut into K chunks; each chunk becomes the codebook vector of largest cosine. All of it
is float32, as in UniTok, which switches mixed precision off here.

Where the caller says which vectors are blank (`tokenizer.local`), these get the code BLANK of every
codebook, and no other vector does. They count in no loss and no statistics, and repair draws from
the others, so that the code BLANK keeps the direction that it began with.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax import geometry
from fourdstar_jax.nn.embedding import lookup

BLANK = 0  # the code, in every codebook, of what is blank


class CodeUsage(nnx.Variable):
    """How the codes have been used: not a parameter, changed by a tokenizer's `with_stats` only."""


class QuantizerStats(NamedTuple):
    """Per code: its share of recent use, and for how many steps nothing has chosen it."""

    usage: Float[Array, "K vocab"]  # exponential moving average, sums to 1 over vocab once warm
    idle_steps: Int[Array, "K vocab"]


class Quantized(NamedTuple):
    codes: Float[Array, "*b n D"]  # unit-length chunks; the gradient passes straight through
    tokens: Int[Array, "*b n K"]
    loss: Float[Array, ""]
    perplexity: Float[Array, ""]  # exp of the entropy of this call's tokens, mean over codebooks
    stats: QuantizerStats  # after this call


def nearest(
    chunks: Float[Array, "*b n K d"], codebooks: Float[Array, "K vocab d"]
) -> Int[Array, "*b n K"]:
    """Ids of the codebook vectors of largest cosine; the lowest id where several tie.

    Chunks are narrow (8 in UniTok), so the products are written out: they are float32 on every
    device, and the compiler joins them with the search, where a matrix product would first store a
    number for every token and codebook vector.
    """
    books = geometry.normalize(codebooks)
    cosine = sum(chunks[..., None, d] * books[..., d] for d in range(books.shape[-1]))
    return jnp.argmax(cosine, axis=-1).astype(jnp.int32)


class Quantizer(nnx.Module):
    """K codebooks of `vocab_size` vectors; `code_dim` is the width of all chunks together.

    `commitment` is VQ-VAE's beta. `usage_decay` is that of the moving average of the usage.
    """

    def __init__(
        self,
        num_codebooks: int,
        vocab_size: int,
        code_dim: int,
        *,
        commitment: float = 0.25,
        usage_decay: float = 0.99,
        rngs: nnx.Rngs,
    ):
        if code_dim % num_codebooks:
            raise ValueError(f"{code_dim=} must be a multiple of {num_codebooks=}")
        shape = (num_codebooks, vocab_size, code_dim // num_codebooks)
        # Only directions count. Unit length keeps the optimizer's relative step on a code small.
        vectors = geometry.normalize(jax.random.normal(rngs.params(), shape, jnp.float32))
        self.codebooks = nnx.Param(vectors, out_sharding=(None, "vocab", None))
        self.usage = CodeUsage(jnp.zeros(shape[:2], jnp.float32))
        self.idle_steps = CodeUsage(jnp.zeros(shape[:2], jnp.int32))
        self.commitment = commitment
        self.usage_decay = usage_decay

    def chunks(self, x: Float[Array, "*b n D"]) -> Float[Array, "*b n K d"]:
        """The vector cut into K chunks of unit length."""
        num_codebooks, _, width = self.codebooks[...].shape
        x = x.astype(jnp.float32)
        return geometry.normalize(x.reshape(*x.shape[:-1], num_codebooks, width))

    def normalized(self) -> Float[Array, "K vocab d"]:
        """The codebooks as codes are made of them: unit length."""
        return geometry.normalize(self.codebooks[...])

    def encode(
        self, x: Float[Array, "*b n D"], blank: Bool[Array, "*b n"] | None = None
    ) -> Int[Array, "*b n K"]:
        return self._nearest(self.chunks(x), blank)

    def _nearest(self, chunks: Array, blank: Array | None) -> Array:
        if blank is None:
            return nearest(chunks, self.codebooks[...])
        others = BLANK + 1 + nearest(chunks, self.codebooks[:, BLANK + 1 :])
        return jnp.where(blank[..., None], BLANK, others)

    def codes(self, tokens: Int[Array, "*b n K"]) -> Float[Array, "*b n D"]:
        return lookup(self.normalized(), tokens)

    def stats(self) -> QuantizerStats:
        return QuantizerStats(self.usage[...], self.idle_steps[...])

    def __call__(
        self, x: Float[Array, "*b n D"], blank: Bool[Array, "*b n"] | None = None
    ) -> Quantized:
        """Quantises for training: straight-through codes, loss and the statistics to keep."""
        chunks = self.chunks(x)
        tokens = self._nearest(chunks, blank)
        codes = self.codes(tokens)
        flat = chunks.reshape(codes.shape)
        if blank is not None:  # no vector before it: no gradient passes
            flat = jnp.where(blank[..., None], jax.lax.stop_gradient(codes), flat)
        stop = jax.lax.stop_gradient

        num_codebooks, vocab_size, _ = self.codebooks[...].shape
        ids = tokens.reshape(-1, num_codebooks)
        counts = jnp.zeros((num_codebooks, vocab_size), jnp.float32)
        counts = counts.at[jnp.arange(num_codebooks), ids].add(1.0)
        used, total = 1.0, ids.shape[0]  # share of the vectors that count, and their number
        if blank is not None:
            counts = counts.at[:, BLANK].set(0.0)
            used = jnp.maximum(jnp.mean(~blank), 1 / total)
            total = used * total
        loss = jnp.mean((codes - stop(flat)) ** 2)
        loss += self.commitment * jnp.mean((stop(codes) - flat) ** 2)
        loss = loss / used  # blank vectors have no error
        share = counts / total
        entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12)), axis=-1)
        old = self.stats()
        stats = QuantizerStats(
            usage=self.usage_decay * old.usage + (1 - self.usage_decay) * share,
            idle_steps=jnp.where(counts > 0, 0, old.idle_steps + 1),
        )
        return Quantized(
            codes=flat + stop(codes - flat),
            tokens=tokens,
            loss=loss,
            perplexity=jnp.mean(jnp.exp(entropy)),
            stats=stats,
        )


def near_codes(
    codebooks: Float[Array, "K vocab d"], count: int, *, has_blank: bool = False
) -> Int[Array, "K vocab near"]:
    """Ids of the `count` codes of largest cosine to each code, itself left out.

    With `has_blank` the code BLANK is near to itself alone: no other is ever taken for it.

    Raises ValueError where the codebooks have not as many others.
    """
    others = codebooks.shape[1] - has_blank
    if not 0 < count < others:
        raise ValueError(f"near={count} must be positive and below the {others} codes")

    def of_one(book):
        cosine = (book @ book.T).at[jnp.diag_indices(len(book))].set(-jnp.inf)
        if not has_blank:
            return jax.lax.top_k(cosine, count)[1]
        found = jax.lax.top_k(cosine.at[:, BLANK].set(-jnp.inf), count)[1]
        return found.at[BLANK].set(BLANK)

    return jax.lax.map(of_one, geometry.normalize(codebooks))


def corrupt(
    key: Array,
    tokens: Int[Array, "*b n K"],
    near: Int[Array, "K vocab near"],
    rate: Float[Array, ""] | float,
) -> Int[Array, "*b n K"]:
    """Tokens of which each code is one of its near ones instead, with probability `rate`.

    So errs a model that predicts tokens; what learns from its like bears them.
    """
    where_key, what_key = jax.random.split(key)
    wrong = jax.random.bernoulli(where_key, rate, tokens.shape)
    choice = jax.random.randint(what_key, tokens.shape, 0, near.shape[-1])
    return jnp.where(wrong, near[jnp.arange(near.shape[0]), tokens, choice], tokens)


def repair_dead_codes(
    codebooks: Float[Array, "K vocab d"],
    stats: QuantizerStats,
    chunks: Float[Array, "*b n K d"],
    key: Array,
    *,
    max_idle_steps: int,
    blank: Bool[Array, "*b n"] | None = None,
) -> tuple[Float[Array, "K vocab d"], QuantizerStats, Int[Array, ""]]:
    """Re-seeds codes idle for `max_idle_steps` or longer from current encoder vectors.

    Replacements are drawn with replacement, per codebook, from what is not `blank`; where all is,
    nothing is re-seeded, and the code BLANK never. Returns the codebooks, the statistics
    with the idle counters of re-seeded codes at zero, and how many were re-seeded.
    `max_idle_steps=0` re-seeds all codes: a start from data.
    """
    num_codebooks, vocab_size, _ = codebooks.shape
    pool = chunks.reshape(-1, *chunks.shape[-2:])  # [B n, K, d]
    dead = stats.idle_steps >= max_idle_steps
    if blank is None:
        rows = jax.random.randint(key, (vocab_size, num_codebooks), 0, pool.shape[0])
    else:
        weights = 1.0 - blank.reshape(-1)
        rows = jax.random.choice(key, pool.shape[0], (vocab_size, num_codebooks), p=weights)
        dead = (dead & jnp.any(~blank)).at[:, BLANK].set(False)
    fresh = pool[rows, jnp.arange(num_codebooks)].swapaxes(0, 1)  # [K, vocab, d]
    return (
        jnp.where(dead[..., None], fresh, codebooks),
        stats._replace(idle_steps=jnp.where(dead, 0, stats.idle_steps)),
        jnp.sum(dead),
    )
