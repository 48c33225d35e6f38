"""Qwen2.5-VL by its real classes, small and with random weights: what it sees, asks and answers."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="torch is not installed (extra `describe`)")
pytest.importorskip("torchvision", reason="torchvision is not installed (extra `describe`)")

from fourdstar_jax import cli  # noqa: E402
from fourdstar_jax.data import describe, pipeline, qwen  # noqa: E402
from fourdstar_jax.text import captions  # noqa: E402

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
# in the form of the released models' own
TEMPLATE = """{% for message in messages -%}
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] -%}
{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEXT_SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
TEXT_SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096)
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
VISION_SIZES = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as transformers saves one: weights, configuration and processor."""
    import tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[])
    )
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = tokenizers.decoders.ByteLevel()
    pieces.add_special_tokens(SPECIAL)
    ids = {name: pieces.token_to_id(name) for name in SPECIAL}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(letters) + len(SPECIAL),
            rope_parameters=ROPE,
            bos_token_id=None,
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
            **TEXT_SIZES,
        ),
        vision_config=dict(fullatt_block_indexes=[1], **VISION_SIZES),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    place = tmp_path_factory.mktemp("qwen") / "tiny"
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(folder):
    return qwen.Qwen(str(folder))


def noise(count, side=17):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_model_s_inputs_are_the_prompt_and_the_frames(model, count):
    frames = noise(count)
    inputs = model.inputs(frames, fps=8 / 3)
    times, across = -(-count // 2), qwen.SIDE // 14
    assert inputs["video_grid_thw"].tolist() == [[times, across, across]]
    assert inputs["second_per_grid_ts"].tolist() == [pytest.approx(2 * 3 / 8)]
    ids = inputs["input_ids"][0].tolist()
    tokenizer = model._processor.tokenizer
    video = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert ids.count(video) == times * across * across // 4
    asked = tokenizer.decode([x for x in ids if x != video])
    assert asked == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|><|vision_end|>{qwen.PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    )
    # back from patches, in blocks of 2 x 2, to pictures
    pixels = inputs["pixel_values_videos"].reshape(
        times, across // 2, across // 2, 2, 2, 3, 2, 14, 14
    )
    pixels = pixels.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * times, qwen.SIDE, qwen.SIDE, 3)
    settings = model._processor.video_processor
    pixels = pixels * torch.tensor(settings.image_std) + torch.tensor(settings.image_mean)
    for frame, seen in zip(frames, pixels.numpy() * 255, strict=False):
        large = Image.fromarray(frame).resize((qwen.SIDE, qwen.SIDE), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(seen, np.asarray(large), atol=1e-3)
    if count % 2:  # an odd one out stands twice
        np.testing.assert_array_equal(pixels[-1], pixels[-2])


def test_the_answer_is_the_likeliest_continuation(model):
    """Token by token, without a cache, as the definition says."""
    frames = noise(4)
    answer = model(frames, 4.0)
    assert model(frames, 4.0) == answer and model(255 - frames, 4.0) != answer
    inputs = dict(model.inputs(frames, 4.0))
    start, stop = inputs["input_ids"].shape[1], model._model.config.text_config.eos_token_id
    for _ in range(qwen.MAX_NEW_TOKENS):
        with torch.inference_mode():
            best = model._model(**inputs, use_cache=False).logits[:, -1].argmax(-1)[:, None]
        for name, new in (
            ("input_ids", best),
            ("attention_mask", torch.ones_like(best)),
            ("mm_token_type_ids", torch.zeros_like(best)),
        ):
            inputs[name] = torch.cat([inputs[name], new], 1)
        if best.item() == stop:
            break
    said = inputs["input_ids"][0, start:]
    assert model._processor.tokenizer.decode(said, skip_special_tokens=True) == answer


def test_sampling_and_penalties_of_the_folder_are_not_used(folder, tmp_path):
    """The released models' generation_config.json has such."""
    place = shutil.copytree(folder, tmp_path / "other")
    settings = json.loads((place / "generation_config.json").read_text())
    settings |= dict(do_sample=True, temperature=5.0, top_p=0.9, top_k=50, repetition_penalty=1.9)
    (place / "generation_config.json").write_text(json.dumps(settings))
    frames = noise(3)
    assert qwen.Qwen(str(place))(frames, 4.0) == qwen.Qwen(str(folder))(frames, 4.0)


def test_a_folder_laid_out_as_the_released_ones_gives_the_same(folder, model, tmp_path):
    """Sizes of the text beside those of vision, names of before, no file of the video's own."""
    place = shutil.copytree(folder, tmp_path / "released")
    content = json.loads((place / "config.json").read_text())
    text, seen = content["text_config"], content["vision_config"]
    content = {name: value for name, value in content.items() if name.endswith("_token_id")}
    content |= {name: text[name] for name in (*TEXT_SIZES, "vocab_size", "eos_token_id")}
    content |= {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "float32",
        "rms_norm_eps": text["rms_norm_eps"],
        "rope_theta": ROPE["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": ROPE["mrope_section"]},
        "vision_config": {
            **VISION_SIZES,
            **dict(in_chans=3, spatial_patch_size=14, window_size=112, hidden_act="silu"),
            "fullatt_block_indexes": seen["fullatt_block_indexes"],
            "tokens_per_second": seen["tokens_per_second"],
        },
    }
    (place / "config.json").write_text(json.dumps(content))
    template = place / "chat_template.jinja"
    (place / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    sizes = dict(patch_size=14, temporal_patch_size=2, merge_size=2)
    sizes |= dict(min_pixels=3136, max_pixels=12845056)
    video = model._processor.video_processor
    normal = dict(image_mean=video.image_mean, image_std=video.image_std)
    kinds = dict(
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor"
    )
    (place / "preprocessor_config.json").write_text(json.dumps(sizes | normal | kinds))
    for path in (template, place / "processor_config.json"):
        path.unlink()
    other, frames = qwen.Qwen(str(place)), noise(5)
    inputs, expected = other.inputs(frames, 4.0), model.inputs(frames, 4.0)
    assert inputs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(inputs[name], value, rtol=0, atol=0)
    assert other(frames, 4.0) == model(frames, 4.0)


def test_the_command_describes_a_dataset_and_goes_on(
    folder, dataset_dir, tmp_path, monkeypatch, capsys
):
    seen = []
    inputs = qwen.Qwen.inputs
    monkeypatch.setattr(
        qwen.Qwen,
        "inputs",
        lambda self, frames, fps: seen.append(frames) or inputs(self, frames, fps),
    )
    out = tmp_path / "c.csv"
    argv = ["prepare", "--describe", folder, "--data", dataset_dir, "--out", out]
    argv = [str(word) for word in argv]
    assert cli.main(argv) == 0
    source = pipeline.ClipSource(dataset_dir, "train")
    clips = {source[i]["clip_id"]: source[i] for i in range(len(source))}
    model = qwen.Qwen(str(folder))
    answers = {
        name: describe.clean(model(*describe.shown(clip, 8))) for name, clip in clips.items()
    }
    expected = {name: text for name, text in answers.items() if text}
    assert len(clips) == 3 and expected and captions.read([out]) == expected
    assert f"{len(expected)} motions described, 0 were there" in capsys.readouterr().out
    rows = out.read_text().splitlines(keepends=True)
    out.write_text("".join(rows[1:]))
    seen.clear()
    assert cli.main(argv) == 0
    assert len(seen) == 1 + len(clips) - len(expected) and captions.read([out]) == expected


@pytest.fixture
def broken(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "broken")


def test_what_is_no_such_model_is_told_in_a_line(folder, broken, dataset_dir, tmp_path, capsys):
    config = broken / "config.json"
    content = json.loads(config.read_text())

    def refused(words):
        argv = ["prepare", "--describe", broken, "--data", dataset_dir, "--out", tmp_path / "c.csv"]
        assert cli.main([str(word) for word in argv]) == 2
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fourdstar: ")]
        assert len(lines) == 1 and words in lines[0], lines
        assert not (tmp_path / "c.csv").exists()

    from safetensors.torch import load_file, save_file

    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    name = "lm_head.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    refused(f"broken lacks 1 weights of Qwen2.5-VL, as {name}")
    wider = json.loads(config.read_text())
    wider["text_config"]["intermediate_size"] += 1
    config.write_text(json.dumps(wider))
    refused("broken cannot be loaded as Qwen2.5-VL")  # other sizes than the weights'
    config.write_text(json.dumps(content))
    weights.write_bytes(weights.read_bytes()[:-1])
    refused("broken cannot be loaded as Qwen2.5-VL")
    weights.unlink()
    stream = io.BytesIO()
    torch.save(tensors, stream)
    (broken / "pytorch_model.bin").write_bytes(stream.getvalue())
    refused("broken cannot be loaded as Qwen2.5-VL")  # no pickles
    config.write_text(json.dumps(content | {"model_type": "qwen2"}))
    refused("it is of type qwen2, not qwen2_5_vl")
    config.unlink()
    refused("broken cannot be loaded as Qwen2.5-VL")
