"""Captions from names that artists gave."""

import pytest

from fourdstar_jax.text import captions


@pytest.mark.parametrize(
    "name, expected",
    [
        ("quaternius/animals_pack__Bull.glb", "a bull"),
        ("quaternius/animals_pack__Horse_White", "a horse white"),
        ("easy_enemies_pack__Snake_angry.glb", "a snake angry"),
        ("tanks_pack__Tank3.glb", "a tank"),
        ("cyberpunk_pack__Enemy_2Legs_Gun.glb", "an enemy 2 legs gun"),
        ("space__Astronaut_BarbaraTheBee-transformed.glb", "an astronaut barbara the bee"),
        ("mesh2motion/fox-animations.glb", "a fox"),
        ("Animated_FPS_Guns__P90.glb", "a p90"),
        ("khronos/AnimatedMorphCube.glb", "a morph cube"),
        ("Men__Smooth_Male_LongSleeve.glb", "a male long sleeve"),
        ("___.glb", "an object"),
        ("glbs/000-036/8476c4170df24cf5bbe6967222d1a42d.glb", "an object"),  # Objaverse's names
    ],
)
def test_appearance(name, expected):
    assert captions.appearance_caption(name) == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("AnimalArmature|Attack_Headbutt", "attack headbutt"),
        ("Fish_Armature|Swimming_Fast", "swimming fast"),
        ("MonsterArmature|HitRecieve", "hit receive"),
        ("1H_Melee_Attack_Slice_Horizontal", "1h melee attack slice horizontal"),
        ("Armature|ArmatureAction", "moving"),
        ("clip 3", "moving"),
        ("Armature|FireWOBullet", "fire wo bullet"),
        ("Walking_C", "walking c"),
    ],
)
def test_motion(name, expected):
    assert captions.motion_caption(name) == expected


def test_the_body_is_named_once():
    assert captions.caption("a wasp", "wasp death") == "a wasp, death"
    assert captions.caption("a bull", "eating") == "a bull, eating"
    assert captions.caption("a jump", "jump") == "a jump, jump"  # something is left to say


CAP3D = """8476c4170df24cf5bbe6967222d1a42d,A 3D model of a red bird.
beef,"A cow,
brown.  Or so"
"""


def test_a_table_gives_captions_of_the_ids_that_are_wanted(tmp_path):
    (tmp_path / "a.csv").write_text(CAP3D)
    (tmp_path / "b.csv").write_text("beef#2,walking\nother,not wanted\n")
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    assert captions.read(files, {"beef", "beef#2", "absent"}) == {
        "beef": "A cow, brown. Or so",
        "beef#2": "walking",
    }


@pytest.mark.parametrize(
    "rows, named",
    [
        ("a,b\nc\n", "line 2: 'c' is no id and caption"),
        ("a,b\nc,d,e\n", "line 2: 'c,d,e' is no id and caption"),
        ("a, .\n", "line 1: 'a, .' is no id and caption"),
        ('a,"b\n', "line 1: unexpected end of data"),
        (b"a,\xff\n", "cannot be read: it is no text in UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_row_that_is_not_right_is_named(tmp_path, rows, named):
    if rows is not None:
        (tmp_path / "a.csv").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    with pytest.raises(ValueError, match=f"a.csv,? {named}"):
        captions.read([tmp_path / "a.csv"], {"a"})
