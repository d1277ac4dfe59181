"""How the official scorers of short answers make two spellings one: step by step as the originals do it, slips included.

    evalai       lower case; no , and ?; 's -> " 's"; trim     \\
                                                                > blanks -> punctuation -> full stops -> words
    vqa_eval     (straight into the steps that both share)     /

``evalai`` is the answer processor of Pythia's M4C, with which LLaVA scores TextVQA and prepares its uploads for VQAv2 and VizWiz.
``vqa_eval`` is what the VQA server's script does to a prediction; of the people's answers it changes the punctuation only. What differs:
with it a comma between digits ("1,000 - 2") lives long enough to be seen, ``men's`` stays one word, and case is lost last.

Slips that both share, and that a score depends on:

- One place in a text where a mark has a blank beside it takes all of that mark away without a trace; otherwise each becomes a blank.
- Full stops go unless a digit *follows*: the look-behind for a digit before it is mistyped and always true ("5." -> "5", ".5" stays).
- At most 32 full stops go: a flag of the pattern is passed where the number of replacements stands.
"""

from __future__ import annotations

import re
from functools import lru_cache

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COUNTING = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_COUNTING)}
ARTICLES = ("a", "an", "the")

# Spelt right. The table of the originals holds each of these with any one apostrophe left out; what it has with a capital I is never met,
# because words are lower case by then, and two entries (let's, she's) change nothing.
_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
    'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've
"""
CONTRACTIONS = {form[:at] + form[at + 1 :]: form for form in _APOSTROPHES.split() for at, character in enumerate(form) if character == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the originals

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32
_KEPT = 1 << 16  # people's answers repeat: most are yes, no or a small number


@lru_cache(maxsize=_KEPT)
def evalai(text: str) -> str:
    """The answer processor of M4C (and of LLaVA's uploads)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return words(punctuation(_one_line(text)))


@lru_cache(maxsize=_KEPT)
def vqa_eval(text: str) -> str:
    """What the VQA server's script makes of a prediction."""
    return words(punctuation(_one_line(text)))


@lru_cache(maxsize=_KEPT)
def punctuation(text: str) -> str:
    """Marks and full stops. All that the VQA server's script does to an answer of people who did not all say the same."""
    number = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        loose = number or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if loose else " ")
    return _FULL_STOP.sub("", stripped, count=_FULL_STOPS)


def words(text: str) -> str:
    """Number words to digits, articles out, apostrophes in."""
    said = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in said if word not in ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
