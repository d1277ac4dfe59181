"""All benchmarks, as one literal table."""

from __future__ import annotations

import difflib

from llavakit.errors import ConfigError
from llavakit.eval.ai2d import AI2D
from llavakit.eval.benchmark import Benchmark, Protocol
from llavakit.eval.documents import CHARTQA, DOCVQA, DOCVQA_TEST
from llavakit.eval.gqa import GQA
from llavakit.eval.llava_bench import COCO, IN_THE_WILD
from llavakit.eval.mathvista import MATHVISTA
from llavakit.eval.mm_vet import MM_VET
from llavakit.eval.mmbench import MMBENCH, MMBENCH_CN
from llavakit.eval.mme import MME
from llavakit.eval.mmmu import MMMU
from llavakit.eval.pope import POPE
from llavakit.eval.scenes import SCENES
from llavakit.eval.scenes_bench import SCENES_BENCH
from llavakit.eval.scienceqa import SCIENCEQA, SCIENCEQA_IMG
from llavakit.eval.seed import SEED
from llavakit.eval.vqa import TEXTVQA, VIZWIZ, VIZWIZ_VAL, VQAV2, VQAV2_VAL

ALL: tuple[Benchmark, ...] = (
    SCENES, SCENES_BENCH,  # drawn: at once, offline
    VQAV2, VQAV2_VAL, GQA, VIZWIZ, VIZWIZ_VAL, SCIENCEQA_IMG, TEXTVQA, POPE, MME, MMBENCH, MMBENCH_CN, SEED, IN_THE_WILD, MM_VET,  # of 1.5
    MMMU, MATHVISTA, AI2D, CHARTQA, DOCVQA, DOCVQA_TEST,  # and of 1.6
    SCIENCEQA, COCO,  # of v1
)  # fmt: skip


def find(name: str) -> Benchmark:
    """The benchmark of this name. Raises ConfigError, which guesses what was meant."""
    found = next((benchmark for benchmark in ALL if benchmark.name == name), None)
    if found is None:
        raise _unknown("benchmark", name, [benchmark.name for benchmark in ALL])
    return found


def protocol(benchmark: Benchmark, name: str | None) -> Protocol:
    """The protocol of this name, or the first one. Raises ConfigError."""
    if name is None:
        return benchmark.protocols[0]
    found = next((protocol for protocol in benchmark.protocols if protocol.name == name), None)
    if found is None:
        raise _unknown("protocol", name, [protocol.name for protocol in benchmark.protocols])
    return found


def _unknown(what: str, name: str, names: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, names, 1)
    remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}" if len(names) > 1 else f"there is {names[0]}"
    return ConfigError(f"no {what} {name!r}", code="bad_value", where="--protocol" if what == "protocol" else "NAME", remedy=remedy)
