"""What `llava eval` does to have questions answered: by our own model in the protocol's words, or by a server; what departs is said."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit import __version__
from llavakit.cli import asking, options
from llavakit.cli.border import one_line
from llavakit.errors import ConfigError

if TYPE_CHECKING:
    from llavakit.assistant import Assistant
    from llavakit.eval.benchmark import Benchmark, Protocol, Question
    from llavakit.eval.harness import Job, Outcome
    from llavakit.responder import Limits, ServerCompleter

LIBRARIES = ("torch", "transformers", "tokenizers", "pillow")  # whose versions may change an answer


@dataclass(frozen=True, kw_only=True)
class Asking:
    """A benchmark about to be asked."""

    benchmark: Benchmark
    protocol: Protocol
    questions: Sequence[Question]
    out: Path
    limit: int | None

    def of_model(self, loading: options.Loading, *, batch: int) -> tuple[Job, Outcome]:
        """Our own model answers, in batches, this process its share."""
        from llavakit.eval.harness import Model, by_model
        from llavakit.eval.two_pass import TwoPass

        assistant = fitting(_on_own_device(loading).assistant(), self.protocol, chosen=loading.template is not None)
        job = replace(self, protocol=_with_room(assistant, self.protocol))._job(
            model=asking.weights_name(loading),
            template=assistant.processor.template.name,
            aspect=aspect_of(assistant),
            arithmetic=str(assistant.model.dtype).removeprefix("torch."),
        )
        model: Model = TwoPass(assistant) if self.protocol.passes == 2 else assistant
        with asking.progress(self.benchmark.name, None) as tell:
            return job, by_model(job, model, batch=batch, size=lambda question: _length(assistant, question), tell=tell)

    def of_server(self, completer: ServerCompleter, limits: Limits) -> tuple[Job, Outcome]:
        """A server answers, many questions at once."""
        from llavakit.eval.harness import by_server

        if self.protocol.passes == 2:
            what = f"protocol {self.protocol.name} goes on with a reply that is begun, and a server cannot"
            raise ConfigError(what, code="bad_value", where="--protocol", remedy="ask a checkpoint (--model), or in one pass")
        for what, wanted in (("prompt format", self.protocol.template), ("aspect", self.protocol.aspect)):
            if wanted is not None:
                warn(f"protocol {self.protocol.name} wants the {what} {wanted}; what this server does is not known here")
        job = self._job(model=completer.name)
        with asking.progress(self.benchmark.name, None) as tell:
            return job, by_server(job, completer, limits=limits, tell=tell)

    def _job(self, **facts: Any) -> Job:
        """What is asked, with all that the answers will depend on."""
        from llavakit.eval.harness import Job
        from llavakit.eval.run_folder import Run, Share, digest

        run = Run(
            benchmark=self.benchmark.name,
            protocol=self.protocol,
            prompts_sha256=digest(self.questions),
            questions=len(self.questions),
            versions={"llavakit": __version__} | {name: metadata.version(name) for name in LIBRARIES},
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            **facts,
        )
        return Job(questions=self.questions, run=run, out=self.out, limit=self.limit, share=Share.of(os.environ))


def fitting(assistant: Assistant, protocol: Protocol, *, chosen: bool) -> Assistant:
    """The same model, asked in the protocol's prompt format unless the user has chosen one; every departure is said aloud."""
    from llavakit.assistant import Assistant

    own, wanted, aspect = assistant.processor.template.name, protocol.template, aspect_of(assistant)
    if wanted is not None and wanted != own:
        if chosen:
            warn(f"protocol {protocol.name} wants the prompt format {wanted}, and {own} is used: published numbers do not compare")
        else:
            warn(
                f"the checkpoint's prompt format is {own}, protocol {protocol.name} wants {wanted} and gets it (--template {own} keeps it)"
            )
            assistant = Assistant(assistant.model, assistant.processor.using(options.prompt_format(wanted)), commit=assistant.commit)
    if protocol.aspect is not None and protocol.aspect != aspect:
        what = f"protocol {protocol.name} wants the aspect {protocol.aspect}, and this checkpoint's processor has {aspect}"
        warn(f"{what}: published numbers do not compare")
    return assistant


def _with_room(assistant: Assistant, protocol: Protocol) -> Protocol:
    """A reply may take half of a small context at most: else every question would be refused for want of room."""
    from llavakit.model.generation import context_length

    most = context_length(assistant.model) // 2
    if protocol.max_new_tokens <= most:
        return protocol
    what = f"protocol {protocol.name} allows replies of {protocol.max_new_tokens} tokens, and this model's context is {2 * most}"
    warn(f"{what}: they get {most}, and published numbers do not compare")
    return replace(protocol, max_new_tokens=most)


def aspect_of(assistant: Assistant) -> str:
    """How the checkpoint's processor brings pictures to the tower, in LLaVA's words (image_aspect_ratio)."""
    processor = assistant.processor
    return "anyres" if processor.tiling.canvases else processor.preprocess.aspect


def _length(assistant: Assistant, question: Question) -> int:
    """About how many tokens a question has; of its picture no more than the header is read."""
    from llavakit.errors import ImageError
    from llavakit.images import image_size

    words, tiling = len(question.prompt) // 3, assistant.processor.tiling
    if question.image is None or not tiling.canvases:
        return words
    try:
        return words + tiling.grid(*image_size(question.image)).tokens
    except ImageError:
        return words  # it will fail when it is asked


def _on_own_device(loading: options.Loading) -> options.Loading:
    """Of several processes on a machine each has its own GPU."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or loading.device is not None:
        return loading
    import torch

    return replace(loading, device=f"cuda:{local}") if torch.cuda.is_available() else loading


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    say(f"warning: {one_line(text)}")
