import numpy as np

from fourdstar_jax import bundle, nn
from fourdstar_jax.convert import rules, unitok
from fourdstar_jax.tokenizer import UNITOK

# Tensors of the released file outside its CLIP side, counted on the original's modules.
NUM_TENSORS = 1181


def shapes_of(arguments):
    model = bundle.shapes("tokenizer", arguments)
    return {name: tuple(x.shape) for name, x in nn.named_arrays(model).items()}


def test_the_released_size_is_found_from_shapes_alone():
    shapes = shapes_of(UNITOK)
    wanted = rules.their_shapes(unitok.rules_for(shapes), shapes)
    assert len(wanted) == NUM_TENSORS
    assert wanted["encoder.pos_embed"] == (1, 1, 1024)
    expand = "encoder.patch_embed.backbone.stages.1.0.shortcut.expand.weight"
    assert wanted[expand] == (320, 160, 1, 1)
    assert wanted["quant_proj.attn.zero_k_bias"] == (1024,)
    assert wanted["decoder.up_conv2.0.up.conv.weight"] == (1280, 1280, 3, 3)
    assert wanted["quantizer.codebooks.7.codebook.weight"] == (4096, 8)
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in wanted.items()}
    found = unitok.arguments(state)
    assert found.pop("family") == "unitok"
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in UNITOK.items()}
    assert found == plain
    clip = {"text_encoder.x": np.zeros(1), "logit_scale": np.zeros(()), "projection.bias": 0}
    state |= {name: np.asarray(x) for name, x in clip.items()}
    assert rules.check(state, wanted, unitok.IGNORED) == []
    state["decoder.norm_pre.weight"] = np.zeros(3)
    assert rules.check(state, wanted, unitok.IGNORED) == ["not known: decoder.norm_pre.weight (3,)"]
