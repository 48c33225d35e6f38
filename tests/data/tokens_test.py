"""A folder of tokens: written from a dataset, read back with the same clips, windows and rolls."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from fourdstar_jax.data import pipeline, tokens
from fourdstar_jax.types import TokenizerSpec

SPEC = TokenizerSpec("corners", 17, 4, 2, vocab_size=50, code_dim=6, weights_sha256="0" * 64)


def encode(images):
    """Four corners' pixels as two numbers each: what a tokenizer returns, without one."""
    corners = np.asarray(images)[:, [0, 0, 8, 8], [4, 8, 8, 4]]  # [N, 4, 3]
    return np.stack([corners[..., 0] * 20 + 20, corners[..., 1] * 20 + 25], -1).astype(int)


@pytest.fixture(scope="module")
def token_dir(dataset_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens") / "set"
    codebooks = np.random.default_rng(0).normal(size=(2, 50, 3)).astype(np.float32)
    tokens.tokenize(
        dataset_dir, out, encode, spec=SPEC, codebooks=codebooks, batch_images=7, log=len
    )
    return out


def test_tokens_and_images_of_one_seed_are_the_same_examples(dataset_dir, token_dir):
    options = dict(batch_size=2, timesteps=3, seed=11, max_len=9)
    images = iter(pipeline.make_loader(dataset_dir, "train", **options))
    ids = iter(tokens.make_loader(token_dir, "train", **options))
    for _ in range(4):
        a, b = next(images), next(ids)
        expected = encode(a["images"].reshape(-1, 17, 17, 3)).reshape(2, 3, 3, 4, 2)
        np.testing.assert_array_equal(b["tokens"], expected)
        for key in ("viewmats", "Ks", "times", "text_ids", "clip"):
            np.testing.assert_array_equal(a[key], b[key])
        assert b["tokens"].dtype == np.int32


def test_the_iterator_resumes(token_dir):
    loader = tokens.make_loader(token_dir, "train", batch_size=2, timesteps=2)
    iterator = iter(loader)
    next(iterator)
    state, expected = iterator.get_state(), next(iterator)
    fresh = iter(loader)
    fresh.set_state(state)
    np.testing.assert_array_equal(next(fresh)["tokens"], expected["tokens"])


def test_the_folder_knows_its_tokenizer_data_and_words(dataset_dir, token_dir):
    folder = tokens.TokenFolder(token_dir, spec=SPEC)
    assert folder.spec == SPEC and folder.splits == {"train": 3}
    assert folder.hashes == pipeline.provenance(dataset_dir)
    assert folder.codebooks.shape == (2, 50, 3)
    words = folder.word_tokenizer(9)
    assert words.to_dict() == pipeline.load_words(dataset_dir, 9).to_dict()


def test_another_tokenizer_is_refused_by_name_of_the_fields(token_dir):
    other = dataclasses.replace(SPEC, vocab_size=64, name="edges")
    with pytest.raises(ValueError, match="name 'corners' != 'edges', vocab_size 50 != 64") as e:
        tokens.TokenFolder(token_dir, spec=other)
    assert "num_tokens" not in str(e.value)


def test_wrong_calls_name_the_argument(dataset_dir, token_dir, tmp_path):
    books = np.zeros((2, 50, 3), np.float32)
    with pytest.raises(ValueError, match="not empty"):
        tokens.tokenize(dataset_dir, token_dir, encode, spec=SPEC, codebooks=books)
    with pytest.raises(ValueError, match="spec.json"):
        tokens.TokenFolder(tmp_path)
    with pytest.raises(ValueError, match="split='unseen_clip'"):
        tokens.make_loader(token_dir, "unseen_clip", batch_size=1, timesteps=1)
    with pytest.raises(ValueError, match="token .* of 3"):
        tokens.tokenize(dataset_dir, tmp_path / "a", encode, spec=SPEC, codebooks=books[:, :3])
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_records_of_another_split_are_found_out(token_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(token_dir, copy)
    content = json.loads((copy / "spec.json").read_text())
    content["splits"]["unseen_clip"] = 3
    (copy / "spec.json").write_text(json.dumps(content))
    shutil.copy(copy / "train.array_record", copy / "unseen_clip.array_record")
    loader = tokens.make_loader(copy, "unseen_clip", batch_size=1, timesteps=1)
    with pytest.raises(ValueError, match="belongs to 'train'"):
        next(iter(loader))
