"""A saved processor is one that transformers loads and that does the same; published folders are read as they are (spec 1.6, 8)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from transformers import AutoProcessor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llavakit.errors import CheckpointError
from llavakit.images import open_image
from llavakit.preprocess import Preprocess
from llavakit.processor import Processor
from llavakit.processor_files import to_hf_messages
from llavakit.prompts import TEMPLATES, spelled
from llavakit.tiling import Tiling
from llavakit.types import Conversation, Image, assistant, system, user
from picture_files import encoded, noise
from talks import conversations, ordinary
from tokenizers_for_tests import family

PICTURE = Image(encoded(noise(90, 60), "PNG"))
FAMILIES = ("legacy", "metaspace", "bytes")

# The prompt of the llava-hf checkpoints, in our words: pictures first, a blank after every text, no system sentence, no end token.
PUBLISHED_CHAT = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper }}: {% endif %}"
    "{% for p in m.content %}{% if p.type == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make(name: str, template: str, **changes: Any) -> Processor:
    fields: dict[str, Any] = {"preprocess": Preprocess(size=28), "tiling": Tiling(side=28), "max_length": 777}
    return Processor(tokenizer=family(name), template=TEMPLATES[template], **fields | changes)


def published(folder: Path, **changes: Any) -> Path:
    """A folder as the llava-hf checkpoints were uploaded; a value of None leaves the file out."""
    family("legacy").save_pretrained(folder)
    files: dict[str, Any] = {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "resample": 3,
            "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28},
        },
        "processor_config.json": {"processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": 14},
        "chat_template.json": {"chat_template": PUBLISHED_CHAT},
        "config.json": {"model_type": "llava", "text_config": {"model_type": "llama", "max_position_embeddings": 1234}},
    }  # fmt: skip
    for name, values in (files | changes).items():
        if values is not None:
            (folder / name).write_text(values if isinstance(values, str) else json.dumps(values), "utf-8")
    return folder


@pytest.fixture(scope="module", params=[(name, template) for name in FAMILIES for template in ("vicuna_v1", "llava_hf")], ids="-".join)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Processor, Processor, Any]:
    """A processor, the same loaded again, and the same in transformers."""
    folder = tmp_path_factory.mktemp("saved")
    processor = make(*request.param)
    processor.save(folder)
    return processor, Processor.load(folder), AutoProcessor.from_pretrained(folder)


def test_what_was_saved_is_what_is_loaded(saved: tuple[Processor, Processor, Any]) -> None:
    before, after, theirs = saved
    assert isinstance(theirs, LlavaProcessor)
    assert after.template == before.template
    assert after.preprocess == before.preprocess
    assert (after.tiling, after.max_length, after.stop_ids) == (before.tiling, 777, before.stop_ids)


@given(conversation=conversations(ordinary) | conversations(ordinary, closed=False))
@settings(max_examples=25, deadline=None)
def test_transformers_makes_the_same_ids_and_pixels(saved: tuple[Processor, Processor, Any], conversation: Conversation) -> None:
    before, after, theirs = saved
    learn = not conversation.open
    mine, again = before.encode(conversation, learn=learn), after.encode(conversation, learn=learn)
    text = theirs.apply_chat_template(to_hf_messages(conversation), add_generation_prompt=conversation.open)
    pictures = [open_image(image) for image in conversation.images]
    out = theirs(text=text, images=pictures or None, return_tensors="pt")
    assert text == spelled(before.template.render(conversation))
    assert out["input_ids"][0].tolist() == mine.input_ids.tolist() == again.input_ids.tolist()
    assert torch.equal(mine.views, again.views)
    if pictures:
        assert torch.equal(out["pixel_values"], mine.views)


def test_plain_and_the_class_feature_survive(tmp_path: Path) -> None:
    make("legacy", "plain", tiling=Tiling(side=28, class_token=True)).save(tmp_path)
    after, theirs = Processor.load(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert after.template == TEMPLATES["plain"]
    inputs = after.encode(Conversation((user(PICTURE, "Describe."), assistant("A cat."))), learn=True)
    text = theirs.apply_chat_template(to_hf_messages(Conversation((user(PICTURE, "Describe."), assistant("A cat.")))))
    assert text == "<image>A cat.\n"
    assert theirs(text=text, images=[open_image(PICTURE)])["input_ids"][0] == inputs.input_ids.tolist()
    assert inputs.grids[0].tokens == 5


@pytest.mark.parametrize("pads", [False, True])
def test_transformers_own_folders_are_read(pads: bool, tmp_path: Path) -> None:
    """Written by transformers 5: the image processor nested in processor_config.json."""
    shape = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    theirs = LlavaProcessor(
        image_processor=LlavaImageProcessorPil(do_pad=True, **shape) if pads else CLIPImageProcessorPil(**shape),
        tokenizer=family("metaspace"), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=PUBLISHED_CHAT,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    processor = Processor.load(tmp_path)
    assert processor.template.name == "llava_hf"
    assert processor.preprocess == Preprocess(size=28, aspect="pad" if pads else "square")
    conversation = Conversation((user(PICTURE, "What?"), assistant("A cat."), user("Why?")))
    inputs = processor.encode(conversation, learn=False)
    text = theirs.apply_chat_template(to_hf_messages(conversation), add_generation_prompt=True)
    out = theirs(text=text, images=[open_image(PICTURE)], return_tensors="np")
    assert out["input_ids"][0].tolist() == inputs.input_ids.tolist()
    np.testing.assert_array_equal(out["pixel_values"], inputs.views.numpy())


def test_published_folders_are_read(tmp_path: Path) -> None:
    processor = Processor.load(published(tmp_path))
    assert processor.template.name == "llava_hf"
    assert processor.preprocess == Preprocess(size=28, aspect="square")  # nothing says do_pad (spec 8, trap 2)
    assert (processor.tiling, processor.max_length) == (Tiling(side=28), 1234)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "processor_config.json"])
def test_the_template_is_known_by_what_it_renders(name: str, place: str, tmp_path: Path) -> None:
    folder = published(tmp_path, **{"chat_template.json": None})
    chat = TEMPLATES[name].jinja()
    file = folder / place
    if place.endswith("jinja"):
        file.write_text(chat, "utf-8")
    else:
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | {"chat_template": chat}), "utf-8")
    template = TEMPLATES[name]
    known = template if template.plain_end else template.ending("</s>")  # the only end that this tokenizer has
    assert Processor.load(folder).template == known


def test_a_folder_without_chat_template_uses_the_documented_prompt(tmp_path: Path) -> None:
    folder = published(tmp_path, **{"chat_template.json": None})
    assert Processor.load(folder).template == TEMPLATES["llava_hf"]
    assert Processor.load(folder, template=TEMPLATES["vicuna_v1"], max_length=99).max_length == 99


@pytest.mark.parametrize(
    "chat", ["{{ messages[0].content }}", "{% for", "{{ raise_exception('no') }}", "{{ messages[0].content[1].text }}"]
)
def test_a_chat_template_that_does_not_work_is_refused(chat: str, tmp_path: Path) -> None:
    folder = published(tmp_path, **{"chat_template.json": {"chat_template": chat}})
    with pytest.raises(CheckpointError) as caught:
        Processor.load(folder)
    assert caught.value.code == "unknown_chat_template"
    assert Processor.load(folder, template=TEMPLATES["llava_v1"]).template == TEMPLATES["llava_v1"]


def test_a_named_format_stands_for_a_chat_template_that_does_not_work(tiny_model_dir: Path, tmp_path: Path) -> None:
    import shutil

    from llavakit.assistant import Assistant

    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content[1].text }}")
    with pytest.raises(CheckpointError):
        Assistant.load(folder, device="cpu")
    assert Assistant.load(folder, device="cpu", template=TEMPLATES["llava_v1"]).processor.template.name == "llava_v1"


FOREIGN = (  # another family's: brackets, a blank before the end, the begin token spelled out
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content[0].text + eos_token + '\n' }}{% else %}"
    "<<{{ m.role }}>>{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}<</>>{% endif %}{% endfor %}"
)


def test_a_foreign_chat_template_is_used_as_it_is(tmp_path: Path) -> None:
    processor = Processor.load(published(tmp_path, **{"chat_template.json": {"chat_template": FOREIGN}}))
    talk = Conversation((user(PICTURE, "\nWhat? </s> {{ bos_token }}"), assistant("A cat."), user("Why?")))
    segments = processor.template.render(talk)
    assert spelled(segments) == "<<user>><image>\nWhat? </s> {{ bos_token }}<</>> A cat.</s>\n<<user>>Why?<</>>"
    assert [segment.text for segment in segments if segment.learned] == ["A cat.", "</s>"]
    ids = processor.encode(talk, learn=False).input_ids.tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert ids.count(processor.tokenizer.eos_token_id) == 1, "the reply's end; what a person typed is text"
    processor.save(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text((tmp_path / "config.json").read_text())
    assert Processor.load(tmp_path / "again").template == processor.template


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json", "chat_template.json", "config.json"])
@pytest.mark.parametrize("damage", ["{", "[]", "null", "\udcff"])
def test_damaged_files_are_named(name: str, damage: str, tmp_path: Path) -> None:
    folder = published(tmp_path)
    (folder / name).write_bytes(damage.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        Processor.load(folder)
    assert name in str(caught.value) or caught.value.code == "tokenizer_unreadable"


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Processor.load(published(tmp_path / "a", **{"preprocessor_config.json": None}))
    assert "preprocessor_config.json" in str(caught.value)
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError) as caught:
        Processor.load(tmp_path / "b")
    assert caught.value.code == "tokenizer_unreadable"


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:  # C5
    folder, trace = published(tmp_path), tmp_path / "this code ran"
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Own: pass\n", "utf-8")
    for name, values in (("tokenizer_config.json", {"tokenizer_class": "Own"}), ("processor_config.json", {"processor_class": "Own"})):
        entry = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"], "AutoProcessor": "own.Own"}}
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text("utf-8")) | values | entry), "utf-8")
    assert Processor.load(folder).template.name == "llava_hf"
    assert not trace.exists()


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    processor = make("legacy", "vicuna_v1")
    processor.save(tmp_path / "a")
    Processor.load(tmp_path / "a").save(tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        if file.name != "tokenizer_config.json":  # transformers notes there where it loaded from
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert Processor.load(tmp_path / "b").template == processor.template


def test_a_system_sentence_is_part_of_the_format(tmp_path: Path) -> None:
    make("legacy", "llava_v1").save(tmp_path)
    again = Processor.load(tmp_path)
    ours = spelled(again.template.render(Conversation((user("Hi"),))))
    assert ours.startswith("A chat between a curious human")
    assert spelled(again.template.render(Conversation((system("S"), user("Hi"))))) == "S USER: Hi ASSISTANT:"
