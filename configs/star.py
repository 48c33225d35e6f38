"""Stage 3, STAR: video, text and cameras to the tokens of a 4D object.

    fourdstar prepare --tokens --data data/tiny --bundle runs/vqvae/bundle --out data/tiny_tokens
    fourdstar train --config=configs/star.py:tiny --workdir=runs/star

`tiny` leaves a whole model in runs/star/bundle, after configs/vqvae.py:tiny. (One of older forms of
STAR and tokenizer took 13 minutes on two CPU cores, and 1.78 nats a code for the novel views of
unseen clips, where counting gives 3.13, docs/RESULTS.md.) `small`, for one GPU, is the bundled
model, trained for three quarters of it; `base`, for one to four, and `paper`, for sixteen, have
not been trained yet (paper section 4.1, which gives no sizes: the trunk is LlamaGen's and MVAR's
XL). The last two also build on VQ-16 instead of UniTok (`base,vq16`), and take the features of
FLAN-T5 XL, computed beforehand with a bundle that has it as its stage `text`:

    fourdstar prepare --text_features --data data/base --bundle runs/vqvae/bundle \\
        --out data/base_text

`small,baseline`, `small,average`, `small,merging` and `small,explicit` are the paper's ablations
(Table 4): another way of the past, all else as it is (docs/PAPER.md). The baseline's groups see the
tokens of all before them, which only the small sizes can bear. `small,slots` is no ablation of the
paper: the container with as many slots as a group has places.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fourdstar_jax.star import sample
from fourdstar_jax.tokenizer import LOCAL, RELEASED, choose

# What else may carry the past (paper Table 4), for comparison: changes to `model`.
ABLATIONS = {
    "baseline": dict(inject="none", history="full"),  # all tokens of all groups before
    "average": dict(container_merge="mean"),  # B: averaged over time
    "merging": dict(container_merge="learned"),  # C: merged over time by an MLP
    "explicit": dict(container_merge="last"),  # A, without L4GM: the tokens of the group before
    "slots": {},  # ours, with as many slots as a group has places
}


def get_config(argument: str = "small") -> ConfigDict:
    """`argument` is a scale and perhaps, after commas, what it builds on if not
    `tokenizer.choose`'s, and a name of `ABLATIONS`, which changes what carries the past and nothing
    else.
    """
    scale, *more = argument.split(",")
    ablation = more.pop() if more and more[-1] in ABLATIONS else None
    tokenizer = ",".join(more)
    config = ConfigDict()
    config.stage = "star"
    config.seed = 0
    config.steps = 100_000
    config.batch_size = 64  # objects
    config.accumulate = 1  # parts of a batch that a step goes through, in the memory of one
    name = "_".join([scale, *more])
    # `dir` is a folder of tokens, or a dataset, whose pictures are tokenised in each step.
    # `on_device`: all of these lie in the memory of every device.
    config.data = ConfigDict(dict(dir=f"data/{name}_tokens", timesteps=8, on_device=False))
    # Processes that read the data, of each process that trains (0: threads of its own), and how
    # many bytes of decoded clips each keeps.
    config.data.update(workers=0, cache_bytes=2 << 30)
    # (timesteps, share of the batches); without any all batches have `timesteps`. A clip of one is
    # a picture, and a batch of shorter clips has as many more of them. Each length is a program of
    # its own: 20 s of compiling at `small` on an H200.
    config.data.buckets = ((1, 0.1), (4, 0.1), (8, 0.8))
    config.data.max_stride = 1  # 2: half of the windows take every second frame, twice as fast
    config.data.shuffle_views = False  # whether novel views come in another order at each step
    config.data.text_features = placeholder(str)  # a folder, for text_encoder="t5"; None: words
    # One draw a clip of pictures, by chances: the mirror image, other colours, backwards, standing
    # still (`inputs.draw`). Tokens stay as they are.
    config.augment = ConfigDict(dict(mirror=0.0, colour=0.0, hue=0.5, saturation=0.4, value=0.3))
    config.augment.update(reverse=0.0, frozen=0.0)
    config.bundle = "runs/vqvae/bundle"  # its tokenizer and decoder go into the new bundle
    # a bundle whose STAR a new run starts from; or one made by `fourdstar convert llamagen` or
    # `mvar`, whose layers it takes
    config.warm_start = placeholder(str)

    try:
        config.model = model(scale, tokenizer)
    except ValueError as error:
        if not tokenizer:
            raise
        raise ValueError(f"{error}; or, of STAR alone, in {list(ABLATIONS)}") from None
    config.forcing = ConfigDict(  # what a step draws at random: `star.forcing.corrupt`
        dict(
            drop_text=0.1,
            drop_video=0.1,
            drop_history=0.1,
            code_noise=0.15,  # the most, of what is seen of the past: each for one of
            near=16,  # so many nearest codes
            num_groups=placeholder(int),  # of T timesteps are predicted at each step; None: all
        )
    )
    config.loss = ConfigDict(dict(known_weight=1.0, z_loss=5e-5))
    # With `decay`, a share of the steps, flat before these; None: a cosine.
    config.schedule = ConfigDict(dict(learning_rate=1e-4, warmup_steps=2000))
    config.schedule.decay = placeholder(float)
    config.optim = ConfigDict(
        dict(b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0, muon=False, average=0.999)
    )  # `average` of the weights goes into evaluation and bundle; 0: none. `muon` is for kernels of
    # linear layers, and takes AdamW's learning rate (`train.optim`).

    # How the model is sampled, in training and where generation is not told otherwise.
    config.sampling = ConfigDict({**sample.DEFAULTS, "top_k": placeholder(int)})
    config.free = ConfigDict(dict(every=5000, clips=8))  # sampled of unseen clips: `train.free`
    config.lpips = "weights/lpips_vgg16.npz"  # without it no LPIPS in `free`; docs/WEIGHTS.md
    # The metric of the log that the bundle's weights are the best by. None: free/lpips where it is
    # measured, else eval/nll; `train.star.METRICS` has the others.
    config.best = placeholder(str)
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
            config.forcing.near = 8
            config.data.update(timesteps=4, buckets=((1, 0.1), (2, 0.1), (4, 0.8)))
            config.batch_size = 8
            config.steps = 1500
            config.schedule.update(learning_rate=2e-3, warmup_steps=50)
            config.optim.weight_decay = 0.01
            config.log_every = 50
            config.eval_every = 500
            config.free.every = 500
            config.checkpoint_every = 500
        case "small":
            config.steps = 12_000
            config.batch_size = 96
            config.data.update(dir="data/small", on_device=True, max_stride=2)
            config.data.workers = 3  # threads would hold up the one that starts the step's kernels
            config.data.buckets = ((1, 0.1), (2, 0.1), (4, 0.1), (8, 0.7))
            config.augment.update(mirror=0.5, colour=0.8, reverse=0.25, frozen=0.05)
            config.schedule.update(learning_rate=1.2e-3, decay=0.25)
            config.optim.muon = True
            config.sampling.cfg_scale = 3.0  # pictures that move as much as the truth's
            config.storage = "int8"  # all three stages are 29 MB then
        case "base":
            config.batch_size = 32
            config.data.text_features = "data/base_text"
        case "paper":
            config.data.update(timesteps=24, buckets=((1, 0.1), (12, 0.1), (24, 0.8)))
            config.data.text_features = "data/paper_text"
            config.forcing.num_groups = 6
    if ablation is not None:
        config.model.update(ABLATIONS[ablation])
    if ablation == "slots":
        views = 8 if scale in ("base", "paper") else 4
        config.model.container_slots = (views - 1) * config.model.grid**2
    if ablation == "baseline":
        config.forcing.num_groups = None  # a group sees those before it, so all are there
    return config


def model(scale: str, tokenizer: str = "") -> ConfigDict:
    """Constructor arguments of `STAR` at a scale; its `text_vocab` is counted from the captions."""
    tokenizer = choose(tokenizer, scale)
    if tokenizer == "local":
        config = model(scale, "unitok")
        config.update(LOCAL[scale])
        config.blank_code = 0  # of what its tokenizer takes for blank
        return config
    match scale:
        case "tiny":
            return ConfigDict(
                dict(
                    num_codebooks=4,
                    vocab_size=64,
                    code_dim=16,
                    resolution=64,
                    grid=4,
                    dim=128,
                    num_layers=4,
                    num_heads=4,
                    hidden_dim=352,
                    head_dim=64,
                    head_layers=1,
                    head_heads=4,
                    container_slots=16,
                    container_neighbors=3,
                    text_encoder="words",
                    text_length=12,
                    text_dim=64,
                    spe_octaves=4,
                    normalize=True,
                    rope="axial",
                    predict_input_view=False,
                    inject="both",
                    container_place=0.25,
                    container_around=True,
                    scan_layers=True,
                    dtype="float32",
                )
            )
        case "small":
            return ConfigDict(
                dict(
                    num_codebooks=4,
                    vocab_size=512,
                    code_dim=32,
                    resolution=128,
                    grid=8,
                    dim=320,
                    num_layers=8,
                    num_heads=5,
                    hidden_dim=896,
                    head_dim=192,
                    head_layers=2,
                    head_heads=4,
                    container_slots=64,
                    container_neighbors=5,
                    text_encoder="words",
                    text_length=24,
                    text_dim=64,
                    spe_octaves=4,
                    normalize=True,
                    rope="axial",
                    qk_norm=True,
                    predict_input_view=False,
                    inject="both",
                    container_place=0.25,
                    container_around=True,
                    remat=True,  # a fifth faster: less to write and read
                    remat_saves="products",
                    scan_layers=True,  # False: one program of all layers in training
                    dtype="bfloat16",
                )
            )
        case "base" | "paper":
            paper = scale == "paper"
            return ConfigDict(
                dict(
                    **RELEASED[tokenizer],
                    resolution=256,
                    grid=16,
                    dim=1280 if paper else 1024,
                    num_layers=36 if paper else 24,
                    num_heads=20 if paper else 16,
                    hidden_dim=3584 if paper else 2816,
                    head_dim=768 if paper else 512,
                    head_layers=3,
                    head_heads=12 if paper else 8,
                    container_slots=512 if paper else 256,
                    container_neighbors=5,
                    text_encoder="t5",
                    text_length=120,
                    text_dim=2048,
                    time_features=256,
                    normalize=True,
                    predict_input_view=False,
                    inject="both",
                    container_place=0.25,
                    dropout=0.1,
                    remat=True,
                    remat_saves="products",  # less memory: "attention", then "nothing"
                    scan_layers=not paper,  # measured there: 4 % faster, for 9 GB
                    dtype="bfloat16",
                )
            )
        case _:
            raise ValueError(f"{scale=} must be tiny, small, base or paper")
