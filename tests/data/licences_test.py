"""Licences as people write them."""

import pytest

from fourdstar_jax.data import licences

pytestmark = pytest.mark.central

CC0 = "CC0-1.0 (License.txt in the pack)"
BY = "CC-BY-4.0 (Khronos, MorphStressTest)"


@pytest.mark.parametrize(
    "wanted",
    ["CC0", "cc0", "CC0-1.0", "cc0 1.0", "CC-0", "cc 0", "CC Zero", "cc_0", "CC0 v1.0", "cc0-1"]
    + ["Creative Commons Zero", "CC0 1.0 Universal", "cc0 license", "CC0-1.0 (whatever)"],
)  # fmt: skip
def test_cc0(wanted):
    assert licences.has(CC0, wanted) and licences.has("cc0", "CC0")
    assert not licences.has(BY, wanted) and not licences.has("MIT", wanted)
    assert not licences.has("Fox: CC0 model + CC-BY-4.0 rig", wanted)
    assert not licences.has(licences.UNKNOWN, wanted)


@pytest.mark.parametrize("wanted", ["CC-BY", "cc by 4.0", "ccby", "Creative Commons Attribution"])
def test_by_is_nothing_narrower(wanted):
    assert licences.has(BY, wanted) and licences.has("CC BY 4.0", wanted)
    for narrower in ("CC-BY-NC-4.0", "CC BY-SA 4.0", "cc-by-nd", "CC Attribution"):
        assert not licences.has(narrower, wanted)
    assert licences.has("CC-BY-NC-SA 4.0", "cc-by-nc-sa")
    assert not licences.has("CC-BY-NC-SA 4.0", "cc-by-nc")


def test_versions_count_where_they_are_named():
    assert not licences.has("CC-BY-3.0", "CC-BY-4.0") and licences.has("CC-BY-3.0", "CC-BY")
    assert licences.has("Apache License 2.0", "apache-2.0") and licences.has("Apache-2.0", "apache")


def test_none_is_wanted():
    with pytest.raises(ValueError, match="names none"):
        licences.has(CC0, " ")


def test_the_licences_there_are():
    assert licences.listed([CC0, BY, "CC0-1.0", ""]) == "CC0-1.0 (2), CC-BY-4.0 (1), unknown (1)"
    assert licences.listed(f"l{i}" for i in range(11)).endswith(" and 3 others")
