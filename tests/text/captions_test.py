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
