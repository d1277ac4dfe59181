"""Which parameters learn, and at which rate: one ordered table a stage (spec 4.1).

pattern (whole name)     pretrain   finetune
vision_tower.*           frozen     frozen
multi_modal_projector.*  1          1            rates multiply the run's lr; the first match wins;
image_newline            frozen     1            a name that no row matches is an error
language_model.*         frozen     1

With LoRA the matrices learn at 1, projector and image_newline at 0.1 (2e-5 of 2e-4, spec 4.2), all else is frozen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from llavakit.errors import ConfigError, TrainingError

Row = tuple[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the training recipe: a name, and (pattern, rate or None) in order."""

    name: str
    table: tuple[Row, ...]

    def rate(self, parameter: str) -> float | None:
        """The rate of a parameter, None when it is frozen. Raises TrainingError ``unmatched_parameter``."""
        for pattern, rate in self.table:
            if re.fullmatch(pattern, parameter):
                return rate
        raise TrainingError(
            f"no row of stage '{self.name}' matches it",
            code="unmatched_parameter",
            where=parameter,
            remedy='add a row, e.g. rates=[["' + re.escape(parameter.split(".")[0]) + '.*", null]]',
        )

    def with_rows(self, rows: tuple[Row, ...]) -> Stage:
        """The same stage with rows put before its own. Raises ConfigError for a pattern that is no regular expression."""
        for pattern, _ in rows:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r}: {error}", code="bad_value", where="rates", remedy="write a regular expression") from error
        return Stage(name=self.name, table=(*rows, *self.table))

    def apply(self, model: nn.Module) -> dict[str, float]:
        """Freeze and unfreeze ``model`` as the table says; the rates of the parameters that learn, in the model's order.

        Raises TrainingError when a name is unmatched or nothing learns.
        """
        rates = {name: self.rate(name) for name, _ in model.named_parameters()}
        learned = {name: rate for name, rate in rates.items() if rate is not None}
        if not learned:
            raise TrainingError("every parameter is frozen", code="nothing_learns", where=self.name, remedy="give a row a rate")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learned)
        return learned


PRETRAIN = Stage(
    name="pretrain",
    table=((r"vision_tower\..*", None), (r"multi_modal_projector\..*", 1.0), (r"image_newline", None), (r"language_model\..*", None)),
)
FINETUNE = Stage(
    name="finetune",
    table=((r"vision_tower\..*", None), (r"multi_modal_projector\..*", 1.0), (r"image_newline", 1.0), (r"language_model\..*", 1.0)),
)
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in (PRETRAIN, FINETUNE)}
LORA = Stage(
    name="lora",
    table=(
        (r".*\.lora_[AB]\.default\.weight", 1.0),
        (r"vision_tower\..*", None),
        (r"multi_modal_projector\..*", 0.1),
        (r"image_newline", 0.1),
        (r"language_model\..*", None),
    ),
)
