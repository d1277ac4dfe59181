"""The published tables are whole and agree with themselves: bounds, sums of parts, printed differences, rows that stand in two tables."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llavakit.errors import ConfigError
from llavakit.eval.benchmarks import ALL
from llavakit.eval.published import numbers, table, tables

SHAPES = {  # of the specification: columns, rows, cells that are printed
    "scienceqa": (9, 10, 90),
    "scienceqa-files": (3, 2, 6),
    "scienceqa-choices": (1, 5, 5),
    "scienceqa-order": (1, 2, 2),
    "coco": (4, 5, 20),
    "in-the-wild": (4, 10, 40),
    "in-the-wild-no-people": (4, 4, 16),
    "twelve": (18, 10, 137),
    "mmmu-mathvista": (2, 5, 10),
    "others": (6, 6, 21),
    "re-evaluation": (5, 4, 20),
    "build-up": (3, 11, 32),
    "hd-base-view": (3, 2, 6),
    "half-data": (1, 1, 1),
    "vizwiz-format": (1, 2, 2),
    "llm-choice": (1, 4, 1),
}
SPOTS = [
    ("scienceqa", "Human", "NAT", 90.23),
    ("scienceqa", "LLaVA-13B + GPT-4, judge", "Avg", 92.53),
    ("scienceqa", "MM-CoT large", "G7-12", 90.31),
    ("scienceqa-choices", "without stage 1", "scienceqa/Avg", 85.81),
    ("coco", "full data, 158K", "all", 85.1),
    ("coco", "no instruction tuning", "complex", 18.5),
    ("in-the-wild", "LLaVA, decoded three times", "detail", 52.5),
    ("in-the-wild", "LLaMA-2-7B-chat preview, LoRA", "all", 62.8),
    ("in-the-wild-no-people", "Bing-Chat-0629", "complex", 93.5),
    ("twelve", "1.5-7B", "textvqa", 58.2),
    ("twelve", "1.5-13B", "pope/adversarial", 84.5),
    ("twelve", "1.5-13B-HD, 448 px", "mm-vet", 39.4),
    ("twelve", "1.5-13B LoRA", "vizwiz", 58.9),
    ("twelve", "1.6-34B", "mme/cognition", 397),
    ("twelve", "LLaVA-7B", "seed/video", 23.8),
    ("mmmu-mathvista", "1.6-mistral-7B", "mathvista", 37.7),
    ("others", "Gemini Pro", "mmbench-cn", 74.3),
    ("others", "Yi-VL-34B", "mmmu", 45.9),
    ("re-evaluation", "1.6-mistral-7B", "chartqa", 38.8),
    ("build-up", "+ region VQA", "mme/perception", 1426.5),
    ("hd-base-view", "with base view", "mm-vet", 35.1),
    ("vizwiz-format", "with the prompt", "unanswerable", 67.8),
    ("half-data", "50 % of the mixture", "kept, more than", 98),
    ("llm-choice", "Vicuna v1.5", "rank", 1),
]
MAXIMUM = {"mme/perception": 2000, "mme/cognition": 800, "questions": 4241, "right": 4241}


def test_every_table_has_its_rows_columns_and_cells() -> None:
    found = {name: (len(t.columns), len(t.rows), sum(len(row.cells) for row in t.rows)) for name, t in tables().items()}
    assert found == SHAPES


@pytest.mark.parametrize(("name", "model", "column", "value"), SPOTS)
def test_spots(name: str, model: str, column: str, value: float) -> None:
    assert table(name).value(model, column) == value


@pytest.mark.parametrize("name", SHAPES)
def test_every_number_is_possible_and_has_a_source(name: str) -> None:
    for row in table(name).rows:
        assert row.source
        assert all(0 < cell.value <= MAXIMUM.get(column, 100) for column, cell in row.cells.items()), row


@pytest.mark.parametrize("name", SHAPES)
def test_models_of_a_table_are_different(name: str) -> None:
    models = [row.model for row in table(name).rows]
    assert len(set(models)) == len(models)


def test_spreads_are_those_of_repeated_runs() -> None:
    spread = {row.model: [cell.spread for cell in row.cells.values()] for row in table("in-the-wild").rows}
    assert spread["LLaVA, decoded three times"] == [1.9, 6.3, 1.8, 2.0]
    assert spread["LLaVA, decoded once, judged three times"] == [0.6, 0.8, 0.3, 0.3]
    assert spread["Bard-0718"] == [None] * 4


def test_printed_differences_are_those_to_the_best() -> None:
    best = table("scienceqa").value("LLaVA-13B", "Avg")
    assert best == table("scienceqa-choices").value("13B, reasoning first, with stage 1", "scienceqa/Avg")
    cells = [cell for row in table("scienceqa-choices").rows for cell in row.cells.values()]
    printed = [cell for cell in cells if cell.delta is not None]
    assert sorted(cell.delta for cell in printed if cell.delta) == [-5.11, -1.15, -1.08, -0.96]
    assert all(round(cell.value - best, 2) == cell.delta for cell in printed)


@pytest.mark.parametrize("parts", [("NAT", "SOC", "LAN"), ("G1-6", "G7-12")])
def test_an_average_lies_between_those_of_its_parts(parts: tuple[str, ...]) -> None:
    for row in table("scienceqa").rows:
        values = [row.cells[part].value for part in parts]
        assert min(values) <= row.cells["Avg"].value <= max(values)


@pytest.mark.parametrize("name", ["coco", "in-the-wild", "in-the-wild-no-people"])
def test_all_questions_lie_between_the_categories(name: str) -> None:
    for row in table(name).rows:
        values = [row.cells[part].value for part in ("conv", "detail", "complex")]
        assert min(values) <= row.cells["all"].value <= max(values), row


def test_the_files_score_what_they_hold() -> None:
    for row in table("scienceqa-files").rows:
        assert round(100 * row.cells["right"].value / row.cells["questions"].value, 2) == row.cells["scienceqa/Avg"].value


def test_pope_is_the_mean_of_its_three() -> None:
    for model in ("1.5-7B", "1.5-13B"):
        parts = [table("twelve").value(model, f"pope/{part}") for part in ("random", "popular", "adversarial")]
        whole = table("twelve").value(model, "pope")
        assert whole is not None
        assert abs(sum(part or 0 for part in parts) / 3 - whole) <= 0.05 + 1e-9


def test_seed_lies_between_image_and_video() -> None:
    rows = [row.cells for row in table("twelve").rows if "seed" in row.cells and "seed/video" in row.cells]
    assert len(rows) == 4
    assert all(cells["seed/video"].value < cells["seed"].value < cells["seed/image"].value for cells in rows)


@pytest.mark.parametrize(("step", "model"), [("LLaVA-7B, 224 px", "LLaVA-7B"), ("+ ShareGPT", "1.5-7B"), ("13B", "1.5-13B")])
def test_the_steps_to_1_5_begin_and_end_in_the_big_table(step: str, model: str) -> None:
    for column, cell in table("build-up").row(step).cells.items():
        assert table("twelve").value(model, column) == cell.value


def test_what_was_evaluated_again_is_near() -> None:
    """The same models and questions: MME within one hundredth; the judge is another, so LLaVA-Bench is another protocol."""
    for row in table("re-evaluation").rows:
        before = table("twelve").value(row.model, "mme/perception")
        assert before is not None
        assert abs(row.cells["mme/perception"].value - before) <= 3
    again = {number.model: number.value for number in numbers("llava-bench", "llava-1.6-0613", headline="all")}
    assert again == {"1.6-vicuna-7B": 72.3, "1.6-vicuna-13B": 72.3, "1.6-mistral-7B": 71.7, "1.6-34B": 88.8}


def test_numbers_of_a_protocol() -> None:
    shown = {number.model: number.value for number in numbers("textvqa", "llava-1.5", headline="accuracy")}
    assert shown == {"1.5-7B": 58.2, "1.5-13B": 61.3, "1.5-13B-HD, 448 px": 62.5, "1.5-7B LoRA": 58.2, "1.5-13B LoRA": 60.2}
    assert {n.metric for n in numbers("textvqa", "llava-1.6", headline="accuracy")} == {"accuracy"}
    assert {n.metric for n in numbers("mme", "llava-1.6", headline="perception")} == {"perception", "cognition"}
    assert numbers("textvqa", "no-ocr", headline="accuracy") == ()
    (wild,) = (n for n in numbers("llava-bench", "v0", headline="all") if (n.model, n.metric) == ("BLIP-2", "detail"))
    assert (wild.value, wild.tolerance) == (29.1, 1.2)


def test_an_unknown_table_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match="in-the-wild"):
        table("wild")


def test_what_protocols_expect_stands_in_the_tables() -> None:
    """Every expectation of a benchmark is a published cell, so that a number has one origin; of drawn scenes nothing was published."""
    printed = {(row.model, cell.value, row.source) for t in tables().values() for row in t.rows for cell in row.cells.values()}
    expected = [number for b in ALL if not b.name.startswith("scenes") for protocol in b.protocols for number in protocol.published]
    assert {(number.model, number.value, number.source) for number in expected} <= printed


def test_what_the_tables_print_is_expected() -> None:
    """Every cell that was made under a protocol of ours is among what that protocol expects: a number is added on the page alone."""
    told = {(b.name, protocol.name, n.model, n.value) for b in ALL for protocol in b.protocols for n in protocol.published}
    for row, column in ((row, column) for t in tables().values() for row in t.rows for column in t.columns):
        protocol = column.protocol or row.protocol
        if column.benchmark is not None and protocol is not None and column.name in row.cells:
            assert (column.benchmark, protocol, row.model, row.cells[column.name].value) in told, (column, row.model)


def test_every_compared_column_is_a_benchmark_of_ours() -> None:
    ours = {benchmark.name for benchmark in ALL}
    compared = {c.benchmark for t in tables().values() for c in t.columns if c.benchmark and any(row.protocol for row in t.rows)}
    assert compared <= ours


def test_help_reads_no_table() -> None:
    """The page is read with the families, which ``llava --help`` does not need."""
    code = "import sys, llavakit.cli as c; sys.argv = ['llava', '--help']\ntry: c.main()\nexcept SystemExit: pass\n"
    code += "sys.exit(any(name.startswith('llavakit.eval.') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
