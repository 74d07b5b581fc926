from __future__ import annotations

from tools.data.g2p import Word
from tools.data.g2p_kinds import LONG, SHORT, Spelling


def words(*spellings: str) -> list[Word]:
    return [Word(spelling, ("X",)) for spelling in spellings]


USUAL = words("paring", "caring", "daring", "baring", "faring", "raring", "waring", "taring", "caring's", "pairing")
UNUSUAL = words("zdrok", "xhosa")
LENGTHY = words("daringdaringdaring")
ALL = [*USUAL, *UNUSUAL, *LENGTHY]


def test_a_spelling_is_as_usual_as_its_parts() -> None:
    spelling = Spelling.of(ALL)
    usual, unusual = (min(map(spelling.usualness, USUAL)), max(map(spelling.usualness, UNUSUAL)))
    assert usual > unusual
    assert spelling.usualness(Word("qqq", ("X",))) == 0.0


def test_common_words_are_short_usual_and_no_possessives() -> None:
    common = Spelling.of(ALL).common(ALL)
    assert len(common) == 5  # half of the ten short ones
    assert all(len(word.spelling) <= SHORT and word in USUAL for word in common)


def test_rare_words_are_unusual_or_long() -> None:
    rare = Spelling.of(ALL).rare(ALL)
    assert rare[-1] == LENGTHY[0]
    assert len(LENGTHY[0].spelling) >= LONG
    assert len(rare) == 2
    assert rare[0] in UNUSUAL
    assert not set(rare) & set(Spelling.of(ALL).common(ALL))
