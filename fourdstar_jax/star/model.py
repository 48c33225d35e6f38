"""STAR: from text, a video and cameras to the tokens of a 4D object, timestep by timestep.

Tokens of a timestep form a group of N = (V - 1) n, view after view without the video's, each view
row by row. (The paper leaves open whether the video's view is predicted, too: an option, N = V n.)
The model predicts group t from the prefix (text, tokens of the video), the container's tokens (the
state of groups before t) and the group's own past. What is called with an object's tokens takes
those of all views, A = V n, and picks the groups out of them. Shapes, with M container slots and
P = L + T n:

    prefix stream  [B, P, D]          text MLP | image MLP + own ray + own time + segment
    group stream   [B, T, M + N, D]   container tokens | previous token (START first) + ray and time
                                      of the position to be predicted (shift positional encoding)

The image tokenizer's MLP is strictly position-wise: attention over an image would let a token see
the ones it has to predict.
"""

import math
import typing
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Bool, Float, Int, Shaped

from fourdstar_jax import nn
from fourdstar_jax.nn.embedding import lookup
from fourdstar_jax.star import embed
from fourdstar_jax.star.container import Container, Density, Inject, State, Update
from fourdstar_jax.star.embed import Codebook
from fourdstar_jax.star.forcing import AS_GIVEN, Forcing
from fourdstar_jax.star.head import DepthHead
from fourdstar_jax.star.losses import GroupLosses, code_losses, summarize
from fourdstar_jax.star.pooling import Pooling
from fourdstar_jax.star.transformer import (
    Rotary,
    Transformer,
    axial_angles,
    round_up,
    window_of,
)
from fourdstar_jax.types import Cameras


class Condition(NamedTuple):
    """What generation is conditioned on. View 0 of the cameras is the video's."""

    text_ids: Int[Array, "B L"]  # padded with 0
    video_tokens: Int[Array, "B T n K"]
    times: Float[Array, "B T"]  # seconds since the first frame * fps
    cameras: Cameras  # [B, V], intrinsics at the tokenizer's image size, constant over time
    text_features: Float[Array, "B L C"] | None = None  # with text_encoder="t5" only


class Places(NamedTuple):
    """Where and when each token of the object is, or each of those that stand in the groups."""

    spe: Float[Array, "B T N D"]  # ray embedding + time embedding
    coordinates: Float[Array, "B T N 4"]  # time, view, row, column
    rays: Float[Array, "B T N 6"]  # Plücker, mean over the patch

    @property
    def positions(self) -> Float[Array, "B T N C"]:
        """All that is averaged over a cluster."""
        return jnp.concatenate([self.spe.astype(jnp.float32), self.coordinates], axis=-1)


# Rays and times are normalised to this size each where they are (`normalize`): the tokens, which
# are at 1, stay the louder part of a slot.
PLACE_GAIN = 0.5


def initializers(dim: int, num_layers: int, std: float | None) -> dict[str, Initializer]:
    """Of a stack of blocks: by width unless given, less where 2 L matrices add to one stream."""
    std = 1 / math.sqrt(dim) if std is None else std
    return {
        "init": nnx.initializers.normal(std),
        "out_init": nnx.initializers.normal(std / math.sqrt(2 * num_layers)),
    }


class STAR(nnx.Module):
    """Spatial-temporal state propagation autoregressive model (paper 3.2)."""

    def __init__(
        self,
        *,
        num_codebooks: int,
        vocab_size: int,
        code_dim: int,
        resolution: int,
        grid: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        head_layers: int,
        head_heads: int,
        head_parallel: bool = False,
        container_slots: int,
        container_neighbors: int,
        text_encoder: Literal["words", "t5"] = "words",
        text_vocab: int = 0,
        text_length: int,
        text_dim: int = 64,
        hidden_dim: int | None = None,
        head_hidden_dim: int | None = None,
        num_kv_heads: int | None = None,
        refine_blocks: int = 2,
        time_features: int = 32,
        spe_octaves: int = 0,
        normalize: bool = False,
        rope: Literal["none", "axial"] = "none",
        qk_norm: bool = False,
        prefix: Literal["bidirectional", "causal"] = "bidirectional",
        predict_input_view: bool = True,
        inject: Inject = "tokens",
        container_place: float | None = None,
        container_density: Density = "group",
        container_update: Update = "all_history",
        container_merge: Literal["clusters", "mean", "learned", "last"] = "clusters",
        container_around: bool = False,
        blank_code: int | None = None,
        history: str = "container",
        dropout: float = 0.0,
        init_std: float | None = None,
        remat: bool = False,
        remat_saves: nn.Saves = "nothing",
        scan_layers: bool = True,
        codebooks: Float[Array, "K vocab C"] | None = None,
        dtype: nn.Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`code_dim` is the width of a whole code, `codebooks` the tokenizer's `[K, vocab, D/K]`.

        A view is an image of `resolution` pixels a side and `grid` tokens a side. `text_vocab` is
        the size of the table of `words`. Without `codebooks` random unit vectors stand in for them
        until the weights are loaded.
        Feed-forwards are 8/3 of the width, rounded up to a multiple of 32, unless given. Matrices
        start at 1 / sqrt(width) unless `init_std` says otherwise. `normalize` brings rays, times
        and tokens to one size, with learned gains; without it the rays drown the times. Without
        `predict_input_view` the groups hold the other views only.

        `inject` says how the container's state reaches a group: as tokens, by place, in both ways,
        or not at all. For `container_*` and `blank_code` see `Container`; `container_merge` other
        than "clusters" puts a `Pooling` in its place; with `container_around` what is told by place
        has the places around it in it. `history` is what else a group sees of those
        before: nothing (`container`), the tokens of the w before it (`window:w`) or of all
        (`full`). `head_parallel` is for comparison, see `DepthHead`; for `remat` of the layers and
        what it saves see `nn.recomputed`, for `scan_layers` `Transformer`.
        """
        if rope not in ("none", "axial"):
            raise ValueError(f"{rope=} must be 'none' or 'axial'")
        if prefix not in ("bidirectional", "causal"):
            raise ValueError(f"{prefix=} must be 'bidirectional' or 'causal'")
        if inject not in typing.get_args(Inject):
            raise ValueError(f"{inject=} must be one of {typing.get_args(Inject)}")
        if code_dim % num_codebooks:
            raise ValueError(f"{code_dim=} must be a multiple of {num_codebooks=}")
        shape = (num_codebooks, vocab_size, code_dim // num_codebooks)
        if codebooks is None:
            books = jax.random.normal(rngs.params(), shape)
            books /= jnp.linalg.norm(books, axis=-1, keepdims=True)
        else:
            books = jnp.asarray(codebooks, jnp.float32)
        if books.shape != shape:
            raise ValueError(f"codebooks are {books.shape}; the sizes given say {shape}")
        hidden_dim = hidden_dim or round_up(8 / 3 * dim)
        head_hidden_dim = head_hidden_dim or round_up(8 / 3 * head_dim)
        # The tokenizers' MLPs keep the variance instead (default init): text, tokens, rays and
        # times are summed, and with N(0, 0.02) twice in a row rays would drown the others.
        kw = nn.Common(dtype=dtype, rngs=rngs)
        self.codebook = Codebook(books)
        self.text = embed.TextPrefix(
            text_encoder,
            vocab_size=text_vocab,
            length=text_length,
            text_dim=text_dim,
            dim=dim,
            **kw,
        )
        self.image = nn.Mlp(code_dim, dim, dim, use_bias=False, **kw)
        self.rays = embed.RayEncoder(resolution, grid, dim, octaves=spe_octaves, std=0.02, **kw)
        self.time = embed.TimeEncoder(time_features, dim, **kw)
        self.image_norm = embed.gain(dim, 1.0, **kw) if normalize else None
        self.ray_norm = embed.gain(dim, PLACE_GAIN, **kw) if normalize else None
        self.time_norm = embed.gain(dim, PLACE_GAIN, **kw) if normalize else None
        self.start = embed.vector(rngs.params(), dim)
        self.video_segment = embed.vector(rngs.params(), dim)
        self.null_video = embed.vector(rngs.params(), dim)
        around = grid if container_around else None
        self.container: Any  # None, or a Container, which a Pooling is called like
        if inject == "none":
            self.container = None
        elif container_merge != "clusters":
            self.container = Pooling(dim, pool=container_merge, inject=inject, around=around, **kw)
        else:
            self.container = Container(
                dim, num_heads, num_slots=container_slots, neighbors=container_neighbors,
                refine_blocks=refine_blocks, inject=inject, place=container_place,
                blank_code=blank_code, density=container_density, update=container_update,
                around=around,
                **initializers(dim, refine_blocks, init_std), **kw,
            )  # fmt: skip
        self.trunk = Transformer(
            dim, num_layers, num_heads, hidden_dim, num_kv_heads=num_kv_heads, qk_norm=qk_norm,
            causal_prefix=prefix == "causal", dropout=dropout, remat=remat,
            remat_saves=remat_saves, scan_layers=scan_layers,
            **initializers(dim, num_layers, init_std), **kw,
        )  # fmt: skip
        self.head = DepthHead(
            dim, head_dim=head_dim, num_layers=head_layers, num_heads=head_heads,
            hidden_dim=head_hidden_dim, num_codebooks=num_codebooks, vocab_size=vocab_size,
            parallel=head_parallel, **initializers(head_dim, head_layers, init_std), **kw,
        )  # fmt: skip
        self.grid = grid
        self.window = window_of(history)
        self.num_known = grid**2 if predict_input_view else 0  # tokens of a group
        self.rotary_dim = dim // num_heads if rope == "axial" else None
        self.num_codebooks, self.vocab_size = num_codebooks, vocab_size
        self.dropout, self.dtype = dropout, dtype
        self.blank_code = blank_code  # in every codebook: a token without anything of the object
        self.head_saves: nn.Saves = remat_saves if remat else "products"

    # ---------------------------------------------------------------- pieces of the sequence

    def embed(self, tokens: Int[Array, "*b K"]) -> Float[Array, "*b D"]:
        """Image tokenizer (paper 3.2.1): an MLP of the dequantised code, position by position."""
        x = self.image(lookup(jax.lax.stop_gradient(self.codebook[...]), tokens))
        return x if self.image_norm is None else self.image_norm(x)

    def in_groups(self, x: Shaped[Array, "B T A ..."]) -> Shaped[Array, "B T N ..."]:
        """Of something of all views' tokens what belongs to those in the groups."""
        return x if self.num_known else x[:, :, self.grid**2 :]

    def places(self, condition: Condition) -> Places:
        """Positional encoding of all views' tokens: ray embedding plus time embedding."""
        (rays, mean_rays), times = self.rays(condition.cameras), self.time(condition.times)
        if self.ray_norm is not None and self.time_norm is not None:
            rays, times = self.ray_norm(rays), self.time_norm(times)
        views = condition.cameras.viewmats.shape[1]
        spe = rays[:, None] + times[:, :, None]
        return Places(
            spe=spe,
            coordinates=embed.token_coordinates(condition.times, views, self.grid, self.grid),
            rays=jnp.broadcast_to(mean_rays[:, None], (*spe.shape[:-1], 6)),
        )

    def prefix_stream(
        self,
        condition: Condition,
        places: Places,
        drop_text: Bool[Array, " B"] | None,
        drop_video: Bool[Array, " B"] | None,
    ) -> tuple[Float[Array, "B P D"], Rotary | None]:
        """Text, then the video frame by frame; a dropped condition holds a learned vector."""
        text = self.text(condition.text_ids, condition.text_features, drop_text)
        n = condition.video_tokens.shape[2]
        video = self.embed(condition.video_tokens)
        if drop_video is not None:
            null = self.null_video[...].astype(video.dtype)
            video = jnp.where(drop_video[:, None, None, None], null, video)
        video = video + places.spe[:, :, :n] + self.video_segment[...].astype(video.dtype)
        video = video.reshape(video.shape[0], -1, video.shape[-1])
        rotary = None
        if self.rotary_dim is not None:
            seen = places.coordinates[:, :, :n].reshape(video.shape[0], -1, 4)
            seen = jnp.pad(seen, ((0, 0), (text.shape[1], 0), (0, 0)))  # text does not turn
            angles = axial_angles(seen, self.rotary_dim)
            rotary = Rotary(angles, angles)
        return jnp.concatenate([text, video], axis=1), rotary

    def token_slots(
        self, features: Float[Array, "*b N D"], spe: Float[Array, "*b N D"]
    ) -> Float[Array, "*b N D"]:
        """Slot j holds token j - 1 (START first) and the ray and time of token j."""
        start = jnp.broadcast_to(
            self.start[...].astype(spe.dtype), (*spe.shape[:-2], 1, spe.shape[-1])
        )
        return jnp.concatenate([start, features[..., :-1, :]], axis=-2) + spe

    def group_rotary(
        self, memory_places: Float[Array, "*b M 4"], coordinates: Float[Array, "*b N 4"]
    ) -> Rotary | None:
        """A slot asks from the position it predicts and is found at that of the token it holds."""
        if self.rotary_dim is None:
            return None
        held = jnp.concatenate([coordinates[..., :1, :], coordinates[..., :-1, :]], axis=-2)
        asked = jnp.concatenate([memory_places, coordinates], axis=-2)
        held = jnp.concatenate([memory_places, held], axis=-2)
        return Rotary(q=axial_angles(asked, self.rotary_dim), k=axial_angles(held, self.rotary_dim))

    def visible(
        self, tokens: Int[Array, "B *b N K"], drop_video: Bool[Array, " B"] | None
    ) -> Bool[Array, "B *b N"]:
        """All but the input view's tokens in groups without the video."""
        visible = jnp.ones(tokens.shape[:-1], bool)
        if drop_video is None:
            return visible
        drop = drop_video.reshape(-1, *[1] * (visible.ndim - 1))
        return visible & ~(drop & (jnp.arange(visible.shape[-1]) < self.num_known))

    def past(
        self, tokens: Int[Array, "B *b N K"], visible: Bool[Array, "B *b N"]
    ) -> Float[Array, "B *b N D"]:
        """Features of a group's tokens, as its own past shows them."""
        features = self.embed(tokens)
        null = self.null_video[...].astype(features.dtype)
        return jnp.where(visible[..., None], features, null)

    # ---------------------------------------------------------------- teacher forcing

    def hidden(
        self, tokens: Int[Array, "B T A K"], condition: Condition, forcing: Forcing = AS_GIVEN
    ) -> Float[Array, "B G N D"]:
        """The trunk's hidden states of the groups that are predicted."""
        self.check(condition, tokens.shape)
        places = self.places(condition)
        prefix, prefix_rotary = self.prefix_stream(
            condition, places, forcing.drop_text, forcing.drop_video
        )
        tokens, places = self.in_groups(tokens), jax.tree.map(self.in_groups, places)
        size = tokens.shape[2]
        visible = self.visible(tokens, forcing.drop_video)
        seen = tokens if forcing.past_tokens is None else self.in_groups(forcing.past_tokens)
        features = self.past(seen, visible)
        state = self.propagate(seen, features, visible, places, forcing)

        features, places = jax.tree.map(forcing.chosen, (features, places))
        stream, rotary = self.group_stream(state, self.token_slots(features, places.spe), places)
        slots = stream.shape[2] - size
        if self.window and forcing.groups is not None:
            raise ValueError("a history of tokens needs all groups: num_groups must be None")
        stream = self.trunk(
            prefix,
            stream,
            slots,
            prefix_rotary,
            rotary,
            forcing.dropout_key if self.dropout else None,
            aligned=[] if state is None else state.aligned,
            window=min(self.window, tokens.shape[1] - 1),
        )
        return stream[:, :, slots:]

    def propagate(
        self,
        tokens: Int[Array, "B T N K"],
        features: Float[Array, "B T N D"],
        visible: Bool[Array, "B T N"],
        places: Places,
        forcing: Forcing,
    ) -> State | None:
        """The container's state for every group that is predicted."""
        if self.container is None:
            return None
        if forcing.history_tokens is not None:
            tokens = self.in_groups(forcing.history_tokens)
            features = self.past(tokens, visible)
        groups = self.container.group(features, tokens, places.rays, visible)
        merged = self.container.over_time(groups, places.positions, forcing.chosen)
        begun = jnp.broadcast_to(jnp.arange(tokens.shape[1]) > 0, tokens.shape[:2])
        if forcing.drop_history is not None:
            begun = begun & ~forcing.drop_history[:, None]
        return self.container.tell(merged, forcing.chosen(begun), places.spe.dtype)

    def group_stream(
        self, state: State | None, slots: Float[Array, "B G N D"], places: Places
    ) -> tuple[Float[Array, "B G Q D"], Rotary | None]:
        """The container's tokens, if any, then the slots, and the angles of both."""
        coordinates = places.coordinates[:, :, :0]
        if state is not None:
            slots, coordinates = jnp.concatenate([state.tokens, slots], axis=2), state.coordinates
        return slots, self.group_rotary(coordinates, places.coordinates)

    def logits(
        self, tokens: Int[Array, "B T A K"], condition: Condition, forcing: Forcing = AS_GIVEN
    ) -> Float[Array, "B G N K vocab"]:
        """Teacher-forced logits of every code, all at once."""
        hidden = self.hidden(tokens, condition, forcing)
        targets = forcing.chosen(self.in_groups(tokens))
        codes = targets.shape[-1]
        flat = self.head(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1, codes))
        return flat.reshape(*targets.shape, self.vocab_size)

    def group_losses(
        self, tokens: Int[Array, "B T A K"], condition: Condition, forcing: Forcing = AS_GIVEN
    ) -> GroupLosses:
        """Losses of every code, one group's logits at a time."""
        hidden = self.hidden(tokens, condition, forcing)
        targets = forcing.chosen(self.in_groups(tokens))
        return code_losses(
            self.head, hidden, targets, saves=self.head_saves, blank_code=self.blank_code
        )

    def nll(
        self, tokens: Int[Array, "B T A K"], condition: Condition, forcing: Forcing = AS_GIVEN
    ) -> Float[Array, "B G N K"]:
        """Negative log-likelihood of every code in nats, for evaluation.

        The condition may be another clip's; `forcing` can give the container another object.
        """
        return self.group_losses(tokens, condition, forcing).nll

    def loss(
        self,
        tokens: Int[Array, "B T A K"],
        condition: Condition,
        forcing: Forcing = AS_GIVEN,
        *,
        known_weight: float = 1.0,
        z_loss: float = 0.0,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Mean cross-entropy over groups, slots and codes (paper Eq. 4), and metrics in nats.

        Training draws `forcing` with `corrupt`. `known_weight` weighs the input view's tokens,
        which the prefix shows, where the groups have them; `z_loss` the squared log-sum-exp of the
        logits. `nll_blank` of the metrics is the outline's part, a hundredth of the likelihood: of
        a token being blank or not.
        """
        return summarize(
            self.group_losses(tokens, condition, forcing),
            num_known=self.num_known,
            known_weight=known_weight,
            z_loss=z_loss,
            by_group=forcing.groups is None,
        )

    def check(self, condition: Condition, shape: tuple[int, ...] | None = None):
        """Raises ValueError if the condition (or tokens of this shape) do not fit the model."""
        batch, timesteps, n, codes = condition.video_tokens.shape
        views = condition.cameras.viewmats.shape[1]
        if n != self.grid**2 or codes != self.num_codebooks:
            raise ValueError(
                f"video_tokens have {n} tokens of {codes} codes a frame; the model takes "
                f"{self.grid**2} of {self.num_codebooks}"
            )
        if condition.times.shape != (batch, timesteps):
            raise ValueError(f"times are {condition.times.shape}, not {(batch, timesteps)}")
        expected = (batch, timesteps, views * n, codes)
        if shape is not None and tuple(shape) != expected:
            raise ValueError(f"tokens are {tuple(shape)}; the condition says {expected}")
        if not self.num_known and views < 2:
            raise ValueError("cameras have the video's view alone; there is none to predict")
        if self.container is not None:
            self.container.check(timesteps * (views * n - n + self.num_known))
