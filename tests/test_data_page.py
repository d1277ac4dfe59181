"""docs/data.md is true: its examples are read, its codes are the rules', the mixtures it names are the shipped ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

from llavakit.data import rules
from llavakit.data.manifest import SHIPPED, read_manifest
from llavakit.data.sources import read_llava

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_examples_are_samples(tmp_path: Path) -> None:
    found = []
    for number, block in enumerate(blocks("json")):
        path = tmp_path / f"{number}.json"
        path.write_text(block, encoding="utf-8")
        source = read_llava(path, image_root=tmp_path, check_images=False)
        assert len(source) == len(json.loads(block))
        assert not source.report.faults
        assert not source.report.remarks
        found.append(source[0].conversation)
    assert found[0] == found[1]  # the same conversation in both ways of writing


def test_the_mixture_is_a_manifest(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "mixture.yaml").write_text(block, encoding="utf-8")
    manifest = read_manifest(tmp_path / "mixture.yaml")
    assert [(spec.name, spec.share, spec.take) for spec in manifest.sources] == [("talks", 0.5, None), ("words", 1.0, 5000)]
    assert all(f"`{name}`" in PAGE for name in SHIPPED)


def test_the_codes_are_the_rules() -> None:
    told = {kind: set(re.findall(rf"^\| `(\w+)` \| {kind} \|", PAGE, re.MULTILINE)) for kind in ("fault", "remark")}
    assert rules.__doc__
    fault, remark = rules.__doc__.split("\n    remark")
    assert told == {
        "fault": set(re.findall(r"\w+_\w+", fault.split("cannot be used")[1])),
        "remark": set(re.findall(r"\w+_\w+", remark.split("``examine``")[0])),
    }
