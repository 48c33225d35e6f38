"""A folder of text features: written for every caption, read back by it, damage found out."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest

from fourdstar_jax.data import features, pipeline, tokens
from fourdstar_jax.text import pieces
from fourdstar_jax.text.captions import NEUTRAL_PROMPT, caption
from fourdstar_jax.types import TokenizerSpec

L, C, BATCH = 11, 6, 2
ENCODER = {"sha256": "ab" * 32, "model": {"dim": C}}


def encode(ids, mask):
    """Sines of the ids, also where there is no token: what an encoder returns, without one."""
    assert ids.shape == mask.shape == (BATCH, L)
    return np.sin(ids[..., None] * np.arange(1, C + 1, dtype=np.float32)) + 2


@pytest.fixture(scope="module")
def folder(dataset_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "set"
    features.write(dataset_dir, out, encode, encoder=ENCODER, length=L, batch=BATCH, log=len)
    return out


def captions(dataset_dir):
    """Of all clips, the long way: with their images."""
    found = set()
    for split in pipeline.read_manifest(dataset_dir)["splits"]:
        clips = pipeline.ClipSource(dataset_dir, split)
        found |= {caption(clips[i]["appearance"], clips[i]["motion"]) for i in range(len(clips))}
    return found


def test_every_caption_has_its_features(dataset_dir, folder):
    opened = features.TextFeatures(folder)
    texts = [*captions(dataset_dir), NEUTRAL_PROMPT]
    assert len(texts) == opened.content["count"] == len(opened.content["rows"]) == 4
    for text in texts:
        ids, values = opened(text)
        expected_ids, mask = pieces.tokenize([text], L)
        np.testing.assert_array_equal(ids, expected_ids[0])
        exact = np.sin(ids[:, None] * np.arange(1, C + 1, dtype=np.float32)) + 2
        expected = np.where(mask[0][:, None], exact, 0).astype(ml_dtypes.bfloat16)
        assert values.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(values, expected)
        assert (values[~mask[0]] == 0).all() and (values[mask[0]] != 0).any()
    # one form of a text: case and outer blanks do not matter
    np.testing.assert_array_equal(opened(f" {NEUTRAL_PROMPT.upper()} ")[1], values)


def test_the_manifest_says_what_made_it(dataset_dir, folder):
    content = json.loads((folder / "manifest.json").read_text())
    assert content["encoder"] == ENCODER and content["dtype"] == "bfloat16"
    assert (content["length"], content["dim"]) == (L, C)
    assert content["data"] == pipeline.provenance(dataset_dir)
    assert sorted(content["rows"].values()) == [0, 1, 2, 3]
    assert features.key_of(NEUTRAL_PROMPT) in content["rows"]
    from safetensors.numpy import load_file

    count = load_file(folder / "rows_00000.safetensors")
    row = content["rows"][features.key_of(NEUTRAL_PROMPT)]
    assert count["num_tokens"][row] == pieces.tokenize([NEUTRAL_PROMPT], L)[1].sum()


def test_several_files(dataset_dir, tmp_path, monkeypatch, folder):
    monkeypatch.setattr(features, "ROWS_A_FILE", 3)
    features.write(
        dataset_dir, tmp_path / "a", encode, encoder=ENCODER, length=L, batch=BATCH, log=len
    )
    assert len(list((tmp_path / "a").glob("rows_*.safetensors"))) == 2
    one, two = features.TextFeatures(folder), features.TextFeatures(tmp_path / "a")
    for text in [*captions(dataset_dir), NEUTRAL_PROMPT]:
        np.testing.assert_array_equal(one(text)[1], two(text)[1])


def test_a_caption_without_features_is_named(folder):
    opened = features.TextFeatures(folder)
    with pytest.raises(ValueError, match="no features of 'a zebra, flying'"):
        opened("a zebra, flying")
    with pytest.raises(ValueError, match="a zebra"):
        opened.check([NEUTRAL_PROMPT, "a zebra"], L, C)
    with pytest.raises(ValueError, match=r"\[11, 6\].*text_length=12"):
        opened.check([NEUTRAL_PROMPT], 12, C)


def test_float16_that_overflows_names_the_caption(dataset_dir, tmp_path):
    def large(ids, mask):
        neutral = pieces.tokenize([NEUTRAL_PROMPT], L)[0]
        return encode(ids, mask) * np.where((ids == neutral).all(axis=1), 1e5, 1)[:, None, None]

    kw = dict(encoder=ENCODER, length=L, batch=BATCH, log=len)
    with pytest.raises(ValueError, match="generate object.*do not fit float16"):
        features.write(dataset_dir, tmp_path / "a", large, dtype="float16", **kw)
    assert list(tmp_path.iterdir()) == []  # nothing half-written
    features.write(dataset_dir, tmp_path / "a", large, dtype="bfloat16", **kw)
    features.write(dataset_dir, tmp_path / "b", encode, dtype="float16", **kw)
    assert features.TextFeatures(tmp_path / "b")(NEUTRAL_PROMPT)[1].dtype == np.float16
    with pytest.raises(ValueError, match="not finite"):
        features.write(dataset_dir, tmp_path / "c", lambda i, m: encode(i, m) * np.nan, **kw)


def test_overwriting_is_asked_for(dataset_dir, tmp_path):
    kw = dict(encoder=ENCODER, length=L, batch=BATCH, log=len)
    features.write(dataset_dir, tmp_path / "a", encode, **kw)
    before = features.TextFeatures(tmp_path / "a")(NEUTRAL_PROMPT)[1]
    with pytest.raises(ValueError, match="not empty"):
        features.write(dataset_dir, tmp_path / "a", encode, **kw)
    features.write(dataset_dir, tmp_path / "a", lambda i, m: encode(i, m) + 1, overwrite=True, **kw)
    after = features.TextFeatures(tmp_path / "a")(NEUTRAL_PROMPT)[1]
    assert (after[0] > before[0]).all()
    assert [x.name for x in tmp_path.iterdir()] == ["a"]
    for wrong in (dict(dtype="float32"), dict(batch=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            features.write(dataset_dir, tmp_path / "d", encode, **(kw | wrong))


def test_damage_is_found_out(folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "rows_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        features.TextFeatures(copy)(NEUTRAL_PROMPT)
    file.unlink()
    with pytest.raises(ValueError, match="lacks rows_00000"):
        features.TextFeatures(copy)(NEUTRAL_PROMPT)
    for text, words in (
        ("[]", "object"),
        ("{", "not JSON"),
        ('{"schema": 1}', "encoder is missing"),
    ):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            features.TextFeatures(copy)
    with pytest.raises(ValueError, match="manifest.json"):
        features.TextFeatures(tmp_path)


def test_it_goes_to_worker_processes(folder):
    opened = features.TextFeatures(folder)
    expected = opened(NEUTRAL_PROMPT)
    again = pickle.loads(pickle.dumps(opened))(NEUTRAL_PROMPT)
    for a, b in zip(again, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_of_images_and_of_tokens_carry_them(dataset_dir, folder, tmp_path):
    tokens.tokenize(
        dataset_dir,
        tmp_path / "tokens",
        lambda images: np.zeros((len(images), 4, 2), int),
        spec=TokenizerSpec("zeros", 17, 4, 2, vocab_size=50, code_dim=6, weights_sha256="0" * 64),
        codebooks=np.zeros((2, 50, 3), np.float32),
        log=len,
    )
    opened = features.TextFeatures(folder)
    options = dict(batch_size=2, timesteps=2, seed=5, features=opened)
    images = iter(pipeline.make_loader(dataset_dir, "train", **options))
    ids = iter(tokens.make_loader(tmp_path / "tokens", "train", **options))
    neutral = 0
    for _ in range(4):
        a, b = next(images), next(ids)
        assert b["text_features"].shape == (2, L, C) and b["text_ids"].shape == (2, L)
        for key in ("text_ids", "text_features", "clip"):
            np.testing.assert_array_equal(a[key], b[key])
        known = {
            tuple(opened(t)[0]): opened(t)[1] for t in [*captions(dataset_dir), NEUTRAL_PROMPT]
        }
        for row, values in zip(b["text_ids"], b["text_features"], strict=True):
            np.testing.assert_array_equal(values, known[tuple(row)])
            neutral += tuple(row) == tuple(opened(NEUTRAL_PROMPT)[0])
    assert 0 < neutral < 8
