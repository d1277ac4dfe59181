"""What commands share that ask a teacher many things: who it is, what it may cost, and how far it has come.

--teacher scenes            the built-in one, which knows drawn scenes
--teacher model             our own model: --model NAME, a folder or a Hub id, as everywhere
--teacher http://...        an OpenAI-compatible server, whose model --model NAME is; "openai" is short for OpenAI's
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Exit, Option

from llavakit.cli import options, terminal
from llavakit.errors import ConfigError, ResponderError

if TYPE_CHECKING:
    from llavakit.datagen.kinds import Prompts
    from llavakit.responder import Budget, Completer, Ledger, Limits, Outcome, Progress

SCENES, OWN, OPENAI = "scenes", "model", "openai"
EVERY = 5.0  # seconds between plain lines
WEIGHTS = (".json", ".safetensors", ".bin", ".jinja")
EDGE = 1 << 16  # bytes read at both ends of a file of weights to tell it from others

Teacher = Annotated[
    str | None, Option("--teacher", metavar="WHO", help="scenes, model (our own: --model), openai, or a server's address (http://host/v1).")
]
Concurrency = Annotated[int, Option("--concurrency", min=1, max=4096, help="Questions under way at once, at most.")]
KeyVariable = Annotated[str, Option("--key", metavar="VARIABLE", help="The environment variable that holds the server's key.")]
BudgetMoney = Annotated[float | None, Option("--budget", min=0, help="What all of it may cost, in the prices' currency.")]
BudgetTokens = Annotated[int | None, Option("--budget-tokens", min=1, help="How many tokens it may take, read and written.")]
PriceIn = Annotated[float | None, Option("--price-in", min=0, help="Price of a million tokens that the teacher reads.")]
PriceOut = Annotated[float | None, Option("--price-out", min=0, help="Price of a million tokens that it writes.")]


@dataclass(frozen=True, kw_only=True)
class Paying:
    """How much to ask, and what it may cost: as options."""

    key: KeyVariable = "OPENAI_API_KEY"
    concurrency: Concurrency = 16
    budget: BudgetMoney = None
    budget_tokens: BudgetTokens = None
    price_in: PriceIn = None
    price_out: PriceOut = None

    def purse(self) -> Budget:
        from llavakit.responder import Budget, Price

        if (self.price_in is None) != (self.price_out is None):
            raise ConfigError("one price without the other", code="bad_value", where="--price-in, --price-out", remedy="give both")
        price = Price(prompt=self.price_in, reply=self.price_out) if self.price_in is not None and self.price_out is not None else None
        return Budget(tokens=self.budget_tokens, money=self.budget, price=price)

    def limits(self, *, again: int) -> Limits:
        from llavakit.responder import Limits

        return Limits(concurrency=self.concurrency, budget=self.purse(), again=again)


@dataclass(frozen=True, kw_only=True)
class Asking(Paying):
    """Whom to ask, and how much: as options."""

    teacher: Teacher = None

    def completer(self, who: str, loading: options.Loading, prompts: Prompts) -> Completer:
        """The one who is asked. Raises ConfigError for an address without a model's name, ResponderError without a key."""
        from llavakit.responder import InTurn, ServerCompleter

        if who == SCENES:
            from llavakit.datagen.scenes_teacher import ScenesTeacher

            return InTurn(ScenesTeacher(prompts), SCENES)
        if who == OWN:
            return InTurn(loading.assistant(), weights_name(loading))
        if who != OPENAI and "://" not in who:
            remedy = f"say {SCENES}, {OWN}, {OPENAI} or a server's address, such as http://localhost:8000/v1"
            raise ConfigError(f"nobody is called {who!r}", code="bad_value", where="--teacher", remedy=remedy)
        if loading.model is None:
            raise ConfigError("the server's model is not named", code="bad_value", where="--model", remedy="add --model NAME")
        if who == OPENAI:
            return ServerCompleter(loading.model, key_variable=self.key)
        return ServerCompleter(loading.model, base_url=who, key_variable=self.key)


def weights_name(loading: options.Loading) -> str:
    """A model's name with a mark of its weights: after more training, the same folder is somebody else."""
    from llavakit.checkpoint import places

    folder = places.find(loading.model, revision=loading.revision, allow_pickle=loading.allow_pickle)
    mark = hashlib.sha256()
    inside = [folder] if folder.is_file() else sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS and path.is_file())
    for path in inside:
        mark.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as file:
            mark.update(file.read(EDGE))
            file.seek(max(0, path.stat().st_size - EDGE))
            mark.update(file.read())
    said = [loading.base, loading.tower, loading.template, loading.quantize, loading.draft]
    mark.update(repr([str(value) for value in said]).encode())
    return f"{Path(loading.model or 'tiny').name}@{mark.hexdigest()[:12]}"


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, a plain line now and then in a pipe; both on stderr."""
    if sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Bar(*columns, console=terminal.err(), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda now: bar.update(task, completed=now.done, total=now.total, description=line(now))
        return
    said = [time.monotonic(), 0.0]

    def tell(now: Progress) -> None:
        ended = now.total is not None and now.done >= now.total
        if time.monotonic() - said[0] >= EVERY or (ended and now.done != said[1]):
            said[:] = time.monotonic(), now.done
            print(f"{what}: {now.done:,}{f' of {now.total:,}' if now.total is not None else ''}  {line(now)}", file=sys.stderr, flush=True)

    yield tell


def line(now: Progress) -> str:
    """Rate, losses, cost and the time left, of what is known."""
    parts = [f"{now.rate:.1f}/s"]
    parts += [f"{count:,} {name}" for name, count in (("known", now.known), ("rejected", now.rejected), ("failed", now.failed)) if count]
    parts += [f"{now.spent.tokens:,} tokens"] if now.spent.tokens else []
    parts += [f"cost {now.money:,.2f}"] if now.money is not None else []
    if now.eta is not None and now.total is not None and now.done < now.total:
        parts.append(f"{now.eta:,.0f} s left" if now.eta < 600 else f"{now.eta / 60:,.0f} min left")
    return "  ".join(parts)


def ended(outcome: Outcome, ledger: Ledger, *, made: int, failed: int) -> None:
    """Leave with the run's exit code. A run of which nothing came because nobody answered has failed, and says what the last fault was."""
    if outcome.exit_code:
        raise Exit(outcome.exit_code)
    if failed and not made:
        last = [failure.what for failure in ledger.failures()][-1]
        raise ResponderError(
            f"no question got a reply; the last fault: {last}", code="nobody_answers", remedy="run again when it is mended"
        )
