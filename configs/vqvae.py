"""Stage 2, the 4D VQ-VAE: codes of the views to 3D Gaussians that move.

    fourdstar train --config=configs/vqvae.py:tiny --workdir=runs/vqvae

Wants `fourdstar prepare --depth` and, but for `tiny`, LPIPS' weights (docs/WEIGHTS.md). `tiny`
takes about 8 minutes on two CPU cores, after configs/tokenizer.py:tiny. `small` is for one GPU; the
bundled model's was trained for 15,299 steps. `base`, for one to four, and `paper`, for eight, have
not been trained yet (paper section 4.1, which gives no sizes). docs/RESULTS.md says how decoder,
losses and offsets were chosen. The last two also build on VQ-16 instead of UniTok, the paper's
baseline: `base,vq16`; the first two build on the local tokenizer, or on a small UniTok:
`tiny,unitok`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fourdstar_jax.tokenizer import LOCAL, RELEASED, choose

# Standard deviations of Gaussians, in halves of the map's spacing: no needles, none that covers
# less than a third of a pixel where the map has half the picture's side.
SCALE_LIMITS = (1 / 3, 4.0)


def get_config(argument: str = "small") -> ConfigDict:
    """`argument` is "scale" or "scale,tokenizer", what it builds on if not `tokenizer.choose`'s."""
    scale, _, tokenizer = argument.partition(",")
    config = ConfigDict()
    config.stage = "vqvae"
    config.seed = 0
    config.steps = 100_000
    config.batch_size = 8  # objects
    config.accumulate = 1  # parts of a batch that a step goes through, in the memory of one
    # `on_device`: all pictures lie in the memory of every device. `buckets` are (timesteps, share
    # of the batches); without any all batches have `timesteps`. Each is a program of its own, 140 s
    # of compiling at `small` on an H200: two lengths below 8 teach attention over time enough.
    config.data = ConfigDict(
        dict(
            dir=f"data/{scale}",
            timesteps=8,
            buckets=((1, 0.1), (4, 0.2), (8, 0.7)),
            on_device=False,
        )
    )
    # Processes that read the data, of each process that trains (0: threads of its own), and how
    # many bytes of decoded clips each keeps.
    config.data.update(workers=0, cache_bytes=2 << 30)
    # One draw a clip, by chances: the mirror image, other colours, backwards (without the losses
    # of flow then), standing still (`inputs.draw`).
    config.augment = ConfigDict(dict(mirror=0.5, colour=0.8, hue=0.5, saturation=0.4, value=0.3))
    config.augment.update(reverse=0.25, frozen=0.05)
    config.bundle = "runs/tokenizer/bundle"  # holds the frozen tokenizer

    config.model = model(scale, tokenizer)
    config.model.offsets = True  # False: coarse Gaussians alone, as in the paper's Table 3
    # A bundle whose 4D VQ-VAE a new run starts from (it may be one without offsets), or without one
    # the decoder of its UniTok; "": none.
    config.warm_start = placeholder(str)
    # What is rendered of each object and step; the tokens of all timesteps and views go in.
    config.render = ConfigDict(dict(num_timesteps=4, rig_views=2, extra_views=4))
    # Share of codes, view 0's left out, that are taken for one of their `near` nearest.
    config.forcing = ConfigDict(dict(code_noise=0.05, near=16))
    config.lpips = "weights/lpips_vgg16.npz"  # by `fourdstar convert lpips`; docs/WEIGHTS.md
    # Triples are (first, last, share of the steps after which it is the last).
    config.loss = ConfigDict(
        dict(
            coarse_weight=(0.5, 0.1, 1.0),
            alpha_weight=1.0,
            foreground_weight=1.0,
            lpips_weight=0.2,
            own_depth_weight=(1.0, 0.0, 0.6),  # these two need `fourdstar prepare --depth`
            own_opacity_weight=(0.1, 0.0, 0.6),
            flow_weight=0.05,
            warp_weight=0.05,
            temporal_weight=0.0,
            capacity=placeholder(int),  # (Gaussian, tile) pairs of a render; None: see rasterize
        )
    )
    # A discriminator from a share `start` of the steps on, with `weight` in the loss (0: none), of
    # StyleGAN2's channels times `multiplier`; R1 with `r1_weight` at every `r1_every`-th step.
    config.adversarial = ConfigDict(
        dict(
            weight=0.05,
            start=0.4,
            multiplier=0.5,
            learning_rate=2e-4,
            r1_weight=1.25,
            r1_every=16,
        )
    )
    # With `decay`, a share of the steps, flat before these; None: a cosine.
    config.schedule = ConfigDict(dict(learning_rate=4e-4, warmup_steps=1000))
    config.schedule.decay = placeholder(float)
    config.optim = ConfigDict(
        dict(b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0, factors=(), average=0.999)
    )  # `average` of the weights goes into evaluation and bundle; 0: none. `factors` of the rate of
    # learning are (beginning of parameters' names, factor), such as (("static/blocks", 0.1),)

    config.log_every = 100
    # a step that takes so many times as long as is usual, and 5 minutes, ends the run; 0: none does
    config.watchdog = 30.0
    # so many steps may have a loss or gradients that are not finite, and teach nothing
    config.nonfinite_steps = 0
    config.profile = placeholder(str)  # "10:13": a trace of these steps in WORKDIR/profile
    config.wandb = placeholder(str)  # a project of Weights & Biases that the log goes to as well
    config.eval_every = 5000
    config.picture_every = 1000  # of unseen clips, into WORKDIR/pictures
    config.checkpoint_every = 5000
    config.storage = "float16"  # of the bundle's weights; or float32, int8
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, seq=1, tensor=1))
    config.rules = ConfigDict()  # changes to sharding.DEFAULT_RULES

    match scale:
        case "tiny":
            config.data.update(timesteps=4, buckets=())
            config.augment.update(mirror=0.0, colour=0.0, reverse=0.0, frozen=0.0)
            config.batch_size = 2
            config.steps = 1500
            config.render = ConfigDict(dict(num_timesteps=2, rig_views=1, extra_views=1))
            config.forcing.near = 8
            config.loss.lpips_weight = 0.0  # twice the step's time on a CPU
            config.loss.flow_weight = 0.0
            config.loss.warp_weight = 0.0
            config.adversarial.weight = 0.0
            config.schedule.update(learning_rate=2e-3, warmup_steps=50)
            config.optim.weight_decay = 0.01
            config.log_every = 50
            config.eval_every = 500
            config.picture_every = 500
            config.checkpoint_every = 500
        case "small":
            config.steps = 24_000
            config.adversarial.weight = 0.0  # so few steps are not enough for it
            config.data.on_device = True
            config.schedule.update(learning_rate=1e-3, warmup_steps=200, decay=0.3)
            config.forcing.code_noise = 0.1
            # What tells a wrong code is that it disagrees with the timesteps around it: six in a
            # row are compared, and how they change (docs/RESULTS.md).
            config.render = ConfigDict(dict(num_timesteps=6, rig_views=1, extra_views=2))
            config.loss.temporal_weight = 0.2
            config.storage = "int8"
        case "base" | "paper":
            if scale == "paper":
                config.data.update(timesteps=24, buckets=((1, 0.1), (8, 0.2), (24, 0.7)))
            if tokenizer in ("", "unitok"):  # and learns slowly what it starts with
                config.warm_start = config.get_oneway_ref("bundle")
                parts = ("post_quant_proj", "blocks", "norm", "up")
                config.optim.factors = tuple((f"static/{part}", 0.1) for part in parts)
    return config


def model(scale: str, tokenizer: str = "") -> ConfigDict:
    """Constructor arguments of `VQVAE4D` at a scale."""
    tokenizer = choose(tokenizer, scale)
    if tokenizer == "local":
        config = model(scale, "unitok")
        config.update(code_dim=LOCAL[scale]["code_dim"], projection="token")
        return config
    match scale:
        case "tiny":
            return ConfigDict(
                dict(
                    resolution=64,
                    grid=4,
                    code_dim=16,
                    dim=64,
                    num_blocks=2,
                    num_heads=4,
                    hidden_dim=128,
                    view_attention_every=2,
                    up_channels=(64, 32),
                    offset_dim=48,
                    offset_layers=1,
                    offset_heads=4,
                    offset_features=True,
                    offset_scaled=True,
                    unet_channels=(16, 32),
                    unet_blocks=1,
                    scale_limits=SCALE_LIMITS,
                    dtype="float32",
                )
            )
        case "small":
            return ConfigDict(
                dict(
                    resolution=128,
                    grid=8,
                    code_dim=32,
                    dim=192,
                    num_blocks=4,
                    num_heads=6,
                    hidden_dim=384,
                    view_attention_every=2,
                    up_channels=(128, 64, 64),
                    offset_dim=128,
                    offset_layers=2,
                    offset_heads=4,
                    offset_features=True,
                    offset_scaled=True,
                    offset_attention="axial_time",
                    unet_channels=(24, 48, 96),
                    unet_blocks=1,
                    scale_limits=SCALE_LIMITS,
                    dtype="bfloat16",
                )
            )
        case "base" | "paper":  # the trunk is UniTok's decoder, whose weights it starts from
            paper = scale == "paper"
            return ConfigDict(
                dict(
                    resolution=256,
                    grid=16,
                    code_dim=RELEASED[tokenizer]["code_dim"],
                    dim=1024,
                    num_blocks=31,
                    num_heads=16,
                    hidden_dim=2048,
                    view_attention_every=8,
                    up="hybrid",
                    up_channels=(320, 320, 160),
                    up_depths=(4, 2),
                    up_pictures=16,  # 0.4 GB each in training
                    offset_dim=512 if paper else 256,
                    offset_layers=2,
                    offset_heads=8,
                    offset_features=True,
                    offset_scaled=True,
                    unet_channels=(32, 64, 128) if paper else (24, 48, 96),
                    unet_blocks=2,
                    scale_limits=SCALE_LIMITS,
                    remat=True,
                    dtype="bfloat16",
                )
            )
        case _:
            raise ValueError(f"{scale=} must be tiny, small, base or paper")
