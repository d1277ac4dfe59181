"""The runs: every arm is one baseline with something changed, and is named after the change.

tower + text-only decoder --stage 1--> projector --stage 2--> asked          start "joined"
the shipped tiny ----------------------------------stage 2--> asked          start "tiny"
the shipped tiny-next, shown as a model of one view--stage 2--> asked        start "flat"
the shipped models as they are -----------------------------> asked          no steps
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llavakit.model.presets import ProjectorKind

ALIGN, TUNE = 120, 100  # steps of stage 1 and of stage 2
BATCH = 16
SEEDS = (0, 1, 2)
MIXES: Mapping[str, tuple[float, float, float]] = {  # thousands of conversations, descriptions, reasonings (spec 4.5)
    "mix-all": (58, 23, 77),
    "mix-conversation": (58, 0, 0),
    "mix-detail": (58, 23, 0),
    "mix-reasoning": (58, 0, 77),
    "mix-no-conversation": (0, 23, 77),
    "mix-few": (58, 0.05 * 23, 0.1 * 77),
}
DECODERS: Mapping[str, tuple[str, ...] | None] = {
    "tiny": None,  # that of the finished tiny: it has seen pictures, though not through this projector
    "text": ("rate=0.003",),  # of the same shape, text alone
    "text-small": ("width=96", "layers=3", "heads=4", "feed_forward=256", "rate=0.003"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train and ask. ``words`` go to stage 2 behind all else."""

    name: str
    says: str
    "What is changed, for the table."
    start: Literal["joined", "tiny", "tiny-next", "flat"] = "joined"
    projector: ProjectorKind = "mlp2x_gelu"
    layer: int = -2
    "The hidden state of the tower that is read."
    decoder: str = "tiny"
    align: int = ALIGN
    data: str = "talk"
    tune: int = TUNE
    long_side: int | None = None
    "Pictures are drawn so large, in training and when asked; None: the scene's own 224 to 336 pixels."
    base_view: bool = True
    "False: the view of the whole is blank, and tiles alone show something."
    words: tuple[str, ...] = ()
    asks: tuple[str, ...] = ("short",)
    "Sets of questions (``measure.SETS``)."
    every: int = 0
    "Also ask each time after so many steps of stage 2."

    @property
    def series(self) -> Literal["parts", "mix", "whole"]:
        """Arms of one series and seed are trained one after the other and share what they have in common; others may run beside them."""
        return "whole" if self.start != "joined" else "mix" if self.data in MIXES else "parts"


_ANSWER_FIRST = Arm(
    name="answer-first", says="the letter, then lecture and solution", start="tiny", align=0, tune=120, every=30, data="science-ALE",
    asks=("science",),
)  # fmt: skip
_PAD = Arm(
    name="pad", says="one padded view", start="flat", align=0, data="print", tune=30, asks=("small", "short"), words=("lr=2e-3",)
)  # fmt: skip
_ANYRES = replace(
    _PAD, name="anyres", says="a squashed base and up to four tiles",
    words=("aspect=anyres", "tiles=1x2,2x1,2x2,3x1,1x3", "base=squash", "lr=2e-3"),
)  # fmt: skip
_TEXT = Arm(name="text-decoder", says="a decoder of text alone, tiny's shape", decoder="text", tune=3 * TUNE)


def _mix(name: str, says: str) -> Arm:
    """One epoch of its own samples, a step for every thousand of LLaVA's: less data is fewer steps."""
    return Arm(name=name, says=says, data=name, tune=round(sum(MIXES[name])), asks=("bench",))


_SHIPPED = Arm(name="tiny", says="the shipped tiny", start="tiny", align=0, tune=0, asks=("compound", "absent", "present"))

ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(name="base", says="both stages, two-layer projector, layer -2, conversations with descriptions"),
        Arm(name="linear", says="a linear projector", projector="linear"),
        Arm(name="unaligned", says="without stage 1", align=0),
        Arm(name="last-layer", says="the tower's last layer", layer=-1),
        _TEXT,
        replace(_TEXT, name="small-decoder", says="a decoder of text alone, 96 wide, 3 layers", decoder="text-small"),
        Arm(name="coarse", says="pictures of at most 56 pixels, enlarged", long_side=56),
        Arm(name="half", says="half of the steps, one epoch of half the samples", tune=TUNE // 2),
        _mix("mix-all", "conversation, detail and reasoning as 58 : 23 : 77"),
        _mix("mix-conversation", "conversations alone"),
        _mix("mix-detail", "conversation and detail"),
        _mix("mix-reasoning", "conversation and reasoning"),
        _mix("mix-no-conversation", "detail and reasoning alone"),
        _mix("mix-few", "conversations, 5 % of detail, 10 % of reasoning"),
        Arm(name="mix-none", says="stage 1 alone", tune=0, asks=("bench",)),
        Arm(name="format", says="half short answers, half sentences; the short ones asked for", data="format", asks=("short-asked",)),
        Arm(name="no-format", says="the same answers, nothing asked for", data="no-format", asks=("short",)),
        _ANSWER_FIRST,
        replace(_ANSWER_FIRST, name="reasoning-first", says="lecture and solution, then the letter", data="science-LEA"),
        _PAD,
        replace(_PAD, name="hd", says="a padded base and up to six tiles", words=("aspect=anyres", "tiles=hd", "base=pad", "lr=2e-3")),
        _ANYRES,
        replace(_ANYRES, name="tiles-only", says="as anyres, the base blank", base_view=False),
        _SHIPPED,
        replace(_SHIPPED, name="tiny-next", says="the shipped tiny-next", start="tiny-next"),
    )
}  # fmt: skip


def seeds_of(arm: Arm, seeds: Sequence[int]) -> Sequence[int]:
    """The seeds to run: what is not trained is the same with each."""
    return seeds if arm.align or arm.tune else seeds[:1]
