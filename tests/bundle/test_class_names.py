"""Classes by the names that people type."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ccam_deploy.bundle.class_names import named_class
from ccam_deploy.errors import TargetError
from tests.helpers import RECIPES

IMAGENET = (RECIPES / "imagenet.txt").read_text(encoding="utf-8").splitlines()
SEVERAL = ("tabby, tabby cat", "tiger cat", "maillot", "maillot, tank suit", "café, coffeehouse")
NUMBERS = ("zero", "1", "class 7", "two")
SPELLED = ("top hat", "Top Hat", "tophat")


@pytest.mark.parametrize(
    ("labels", "name", "index"),
    [
        (IMAGENET, "tabby", 281),
        (IMAGENET, "Tabby", 281),
        (IMAGENET, "tabby cat", 281),
        (IMAGENET, "cat, tabby", 281),
        (IMAGENET, "TIGER_CAT", 282),
        (IMAGENET, "tiger", 292),
        (IMAGENET, "siamese", 284),
        (IMAGENET, "german-shepherd", 235),
        (IMAGENET, "German shepherd dog", 235),
        (IMAGENET, "golden  retriever", 207),
        (IMAGENET, "golfball", 574),
        (IMAGENET, "jack o'lantern", 607),
        (IMAGENET, "crane bird", 134),
        (IMAGENET, "Crane (machine)", 517),
        (IMAGENET, "hen_of_the_woods", 996),
        (IMAGENET, "281", 281),
        (IMAGENET, "-1", -1),
        (SEVERAL, "tabby, tabby cat", 0),
        (SEVERAL, "Tabby cat", 0),
        (SEVERAL, "tank suit", 3),
        (SEVERAL, "maillot", 2),
        (SEVERAL, "CAFÉ", 4),
        (SEVERAL, "coffee house", 4),
        (NUMBERS, "1", 1),
        (NUMBERS, "2", 2),
        (NUMBERS, "+3", 3),
        (NUMBERS, "7", 7),
        (SPELLED, "top hat", 0),
        (SPELLED, "Top Hat", 1),
        (SPELLED, "tophat", 2),
    ],
)
def test_a_class_has_more_names_than_its_label(
    labels: tuple[str, ...], name: str, index: int
) -> None:
    assert named_class(name, labels) == index


@pytest.mark.parametrize(
    ("labels", "name", "message"),
    [
        (IMAGENET, "crane", 'stands for 134 "crane (bird)", 517 "crane (machine)"; give a number'),
        (IMAGENET, "espresso cup", 'stands for 967 "espresso", 968 "cup"; give a number'),
        (IMAGENET, "terrier", "and 13 more; give a number"),
        (SPELLED, "TOP_HAT", 'stands for 0 "top hat", 1 "Top Hat", 2 "tophat"; give a number'),
        (("dog", "dog"), "dog", 'stands for 0 "dog", 1 "dog"; give a number'),
        (IMAGENET, "espreso", 'is not in the bundle; it has 967 "espresso"'),
        (IMAGENET, "tabi", 'is not in the bundle; it has 281 "tabby"'),
        (IMAGENET, "qqq", ", and none of its 1000 names is like it; give a number"),
        (IMAGENET, "---", ", and none of its 1000 names is like it; give a number"),
        (IMAGENET, "", ", and none of its 1000 names is like it; give a number"),
        (("ant", "bee"), "cow", 'class "cow" is not in the bundle; it has ant, bee'),
        ((), "ant", 'class "ant" is not in the bundle, which has no class names; give a number'),
    ],
)
def test_what_a_name_may_mean_is_said(labels: tuple[str, ...], name: str, message: str) -> None:
    with pytest.raises(TargetError) as raised:
        named_class(name, labels)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("name", ["tabby cat", "siamese", "crane"])
def test_a_part_of_a_name_does_only_where_people_type(name: str) -> None:
    """A folder "hot" of a data set is no folder of hot dogs."""
    with pytest.raises(TargetError, match="is not in the bundle; it has"):
        named_class(name, IMAGENET, partial=False)
    assert named_class("Tiger_cat", IMAGENET, partial=False) == 282


@pytest.mark.parametrize(
    "spelling", [str, str.upper, lambda name: name.replace(" ", "_")], ids=["own", "upper", "words"]
)
def test_classes_of_imagenet_answer_to_their_names(spelling: Callable[[str], str]) -> None:
    for index in range(0, 1000, 9):
        assert named_class(spelling(IMAGENET[index]), IMAGENET) == index
