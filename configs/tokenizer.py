"""Stage 1, the image tokenizer.

    fourdstar prepare --assets ASSETS --out data/tiny --licence CC0 --max_frames 8 --depth
    fourdstar train --config=configs/tokenizer.py:tiny --workdir=runs/tokenizer

`tiny` and `small` train the local tokenizer, whose codes depend on a patch's surroundings only and
whose blank patches share one token; `tiny,unitok` and `small,unitok` a small UniTok instead, and
the later stages then take the same argument. `tiny` takes 12 minutes on two CPU cores; a tiny
UniTok's own decoder gives 27.8 dB on unseen clips (18.7 inside the mask; docs/RESULTS.md). `small`
is for one GPU and wants LPIPS' weights (docs/WEIGHTS.md); the bundled model's was trained for
18,500 steps (28.4 dB, 21.3 inside the mask). At the scales `base` and `paper` the tokenizer is a
released one with frozen weights, UniTok or, as `paper,vq16`, LlamaGen's VQ-16: there is nothing to
train, and the config says its sizes.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fourdstar_jax.tokenizer import LOCAL, RELEASED, UNITOK, choose


def get_config(argument: str = "small") -> ConfigDict:
    """`argument` is "scale" or "scale,tokenizer", if not `tokenizer.choose`'s."""
    scale, _, tokenizer = argument.partition(",")
    config = ConfigDict()
    config.stage = "tokenizer"
    config.seed = 0
    config.steps = 100_000
    config.batch_size = 8  # clips; each gives timesteps x (rig + extra views) images
    # `on_device`: all pictures lie in the memory of every device.
    config.data = ConfigDict(dict(dir="data/small", timesteps=2, on_device=False))
    # Processes that read the data, of each process that trains (0: threads of its own), and how
    # many bytes of decoded clips each keeps.
    config.data.update(workers=0, cache_bytes=2 << 30)
    # One draw a clip: the mirror image with a chance, other colours with another (`inputs.draw`).
    config.augment = ConfigDict(dict(mirror=0.5, colour=0.8, hue=0.5, saturation=0.4, value=0.3))

    config.model = model(scale, tokenizer)
    config.warm_start = placeholder(str)  # bundle of one of these sizes that a new run starts from
    config.loss = ConfigDict(
        dict(
            l1_weight=0.2,
            l2_weight=1.0,
            quantizer_weight=1.0,
            foreground_weight=2.0,
            lpips_weight=0.5,
        )
    )
    config.lpips = "weights/lpips_vgg16.npz"  # by `fourdstar convert lpips`; docs/WEIGHTS.md
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
    config.schedule = ConfigDict(dict(learning_rate=5e-4, warmup_steps=1000))
    config.schedule.decay = placeholder(float)
    config.optim = ConfigDict(
        dict(b1=0.9, b2=0.95, weight_decay=0.02, clip_norm=10.0, factors=(), average=0.999)
    )  # `average` of the weights goes into evaluation and bundle; 0: none. `factors` of the rate of
    # learning are (beginning of parameters' names, factor), such as (("encoder", 0.1),)
    config.repair_every = 200  # steps; codes idle for that long are re-seeded
    config.repair_until = 0.7  # of the run: then the codebooks settle

    config.log_every = 100
    # a step that takes so many times as long as is usual, and 5 minutes, ends the run; 0: none does
    config.watchdog = 30.0
    # so many steps may have a loss or gradients that are not finite, and teach nothing
    config.nonfinite_steps = 0
    config.profile = placeholder(str)  # "10:13": a trace of these steps in WORKDIR/profile
    config.wandb = placeholder(str)  # a project of Weights & Biases that the log goes to as well
    config.eval_every = 5000
    config.checkpoint_every = 5000
    config.storage = "float16"  # of the bundle's weights; or float32, int8
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, seq=1, tensor=1))
    config.rules = ConfigDict()  # changes to sharding.DEFAULT_RULES

    match scale:
        case "tiny":
            config.data.dir = "data/tiny"
            config.augment.update(mirror=0.0, colour=0.0)
            config.batch_size = 4
            config.steps = 4000
            config.loss.lpips_weight = 0.0
            config.adversarial.weight = 0.0
            config.schedule.update(learning_rate=2e-3, warmup_steps=100)
            config.eval_every = 1000
            config.checkpoint_every = 1000
        case "small":
            config.steps = 25_000
            config.storage = "int8"  # the other stages are trained on it as it is stored
            config.data.on_device = True
            config.adversarial.weight = 0.0  # so few steps are not enough for it
            config.schedule.decay = 0.25
        case "base" | "paper":
            config.data.dir = f"data/{scale}"
    return config


def model(scale: str, tokenizer: str = "") -> ConfigDict:
    """Arguments of `tokenizer.make` at a scale: the constructor's of the tokenizer's class."""
    tokenizer = choose(tokenizer, scale)
    if tokenizer == "local":
        tiny = scale == "tiny"
        return ConfigDict(
            dict(
                family="local",
                resolution=64 if tiny else 128,
                stem_channels=(16, 32, 64) if tiny else (48, 96, 192),
                dim=64 if tiny else 192,
                num_decoder_blocks=2 if tiny else 4,
                tail_channels=(64, 32, 16) if tiny else (128, 64, 32),
                dtype="float32" if tiny else "bfloat16",
                **LOCAL[scale],
            )
        )
    if tokenizer == "vq16":
        return ConfigDict(
            dict(
                family="vq16",
                resolution=256,
                channels=128,
                multipliers=(1, 1, 2, 2, 4),
                num_blocks=2,
                z_dim=256,
                vocab_size=RELEASED[tokenizer]["vocab_size"],
                code_dim=RELEASED[tokenizer]["code_dim"],
                dtype="bfloat16",
            )
        )
    match scale:
        case "tiny":
            return ConfigDict(
                dict(
                    resolution=64,
                    stem_channels=(16, 32, 64),
                    dim=64,
                    num_blocks=2,
                    num_decoder_blocks=2,
                    num_heads=4,
                    hidden_dim=128,
                    tail_channels=(64, 32, 16),
                    num_codebooks=4,
                    vocab_size=64,
                    code_dim=16,
                    dtype="float32",
                )
            )
        case "small":
            return ConfigDict(
                dict(
                    resolution=128,
                    stem_channels=(32, 64, 128),
                    dim=192,
                    num_blocks=4,
                    num_decoder_blocks=4,
                    num_heads=6,
                    hidden_dim=384,
                    tail_channels=(128, 64, 32),
                    num_codebooks=4,
                    vocab_size=512,
                    code_dim=32,
                    dtype="bfloat16",
                )
            )
        case "base" | "paper":  # UniTok as released (arXiv:2502.20321)
            return ConfigDict(dict(UNITOK, dtype="bfloat16"))
        case _:
            raise ValueError(f"{scale=} must be tiny, small, base or paper")
