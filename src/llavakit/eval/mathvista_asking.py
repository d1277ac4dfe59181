"""How MathVista asks, and the examples that its judge is shown (ours, one for each kind of answer).

    Hint: Please answer ... at the end.        Which is longer? (Unit: cm)
    Question: Which is longer? (Unit: cm)      A. the red line
    Choices:                                   B. the blue line
    (A) the red line                           Answer with the option's letter from the given choices directly.
    (B) the blue line
      as MathVista hands it out                  short, as lmms-eval has it

A prompt of MathVista's own file is taken word by word; these are for files without.
"""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.eval.benchmark import LETTER
from llavakit.eval.choices import lettered

NO_ANSWER = "no answer"  # what a judge writes for a reply without one: an empty line would be asked for again
_HINTS = {  # answer type, precision -> the hint, its short form
    ("text", None): ("and provide the correct option letter, e.g., A, B, C, D, at the end.", LETTER),
    ("integer", None): (
        "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
        "Answer the question using a single integer number.",
    ),
    ("float", 1): (
        "requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.",
        "Answer the question using a single floating-point number with one decimal place.",
    ),
    ("float", 2): (
        "requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.",
        "Answer the question using a single floating-point number with two decimal places.",
    ),
    ("list", None): (
        "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
        "Answer the question using a Python list.",
    ),
}


def hint(answer_type: str, precision: int | None, *, short: bool = False) -> str | None:
    """What form the answer is to have; None for a type or a precision that MathVista does not know."""
    found = _HINTS.get((answer_type, precision if answer_type == "float" else None))
    return None if found is None else found[1] if short else f"Hint: Please answer the question {found[0]}"


def query(question: str, choices: Sequence[str], unit: str, hinted: str, *, short: bool = False) -> str:
    """The whole prompt."""
    asked = f"{question} (Unit: {unit})" if unit else question
    if short:
        return f"{lettered(asked, choices)}\n{hinted}"
    return f"{hinted}\nQuestion: {asked}" + (f"\n{lettered('Choices:', choices, form='({}) {}')}" if choices else "")


def _example(answer_type: str, precision: int | None, question: str, reply: str, answer: str, choices: Sequence[str] = ()) -> str:
    asked = query(question, choices, "", hint(answer_type, precision) or "")
    return f"{asked}\n\nModel response: {reply}\n\nExtracted answer: {answer}"


EXAMPLES = "\n\n".join(
    (
        "Below are questions, each with a model's response and the answer that the response comes to. Look at the examples, then do the"
        " same for the last one: write the answer alone, in the form that its hint asks for, and nothing else. If the response comes to no"
        f" answer, write {NO_ANSWER}.",
        _example("integer", None, "How many triangles are there?", "I count two small ones and one around them, so there are 3.", "3"),
        _example("float", 1, "Which share of the circle is shaded?", "Half of it is shaded, that is 0.5 of the circle.", "0.5"),
        _example("float", 2, "What do the pen and the ruler cost together?", "Together they cost $0.75 + $1.50 = $2.25.", "2.25"),
        _example("list", None, "In which two years were sales equal?", "Sales were the same in 2011 and in 2014.", "[2011, 2014]"),
        _example("text", None, "Which line is longer?", "The line on the right, (B), is longer.", "B", ("the left one", "the right one")),
    )
)
