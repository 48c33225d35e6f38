"""A config for `fourdstar train`: the tiny tokenizer, so small that a step takes milliseconds."""

import importlib.util
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"


def get_config(_: str = ""):
    spec = importlib.util.spec_from_file_location("tokenizer", CONFIGS / "tokenizer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny")
    config.model = dict(
        family="local", resolution=16, stem_channels=(8,), tail_channels=(8,), dim=16,
        num_decoder_blocks=1, num_codebooks=2, vocab_size=16, code_dim=8,
    )  # fmt: skip
    config.data.timesteps = 2
    config.update(batch_size=6, steps=12, log_every=1, checkpoint_every=2, eval_every=1000)
    return config
