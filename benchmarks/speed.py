"""Speed and memory against transformers, both sides in one run: ``python benchmarks/speed.py [--quick] [--only PART ...]``.

    preprocessing   a JPEG's bytes to the tower's pixels, which must be equal          target: 1.4 times faster
    first           a JPEG's bytes and a question to the first token                   target: 1.1
    decoding        seconds a token after that, one conversation                       target: 1.6
    second          another question about the picture, to its first token             target: 10, against reading again
    batch           seconds a decoding step of 8 conversations
    fp16            a checkpoint stored in float16, first token, each side choosing its own dtype
    anyres          preprocessing for LLaVA-NeXT, also with --draft                    target: 1.4 and 3
    next            decoding behind the 2,144 tokens of a LLaVA-NeXT picture           target: 1.8
    loading         peak memory / size of the checkpoint                               target: 1.15, converting 1.3

The sides take turns (``measure.py``). A line gives each side's median and range and the ratio taken round by round. The bound is what
this machine needs at best, from its measured speed of reading memory and of multiplying; what share of that each side reaches stands
beside. Weights are random (``fixture.py``), so nothing here says anything about quality, and two tokens often score almost the same:
the line tells how many greedy tokens agree. Under load the ratios still mean something, the seconds do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from fixture import FULL, NEXT, QUICK, QUICK_NEXT, Shape, photograph, write_checkpoint
from measure import Ceilings, Times, ceilings, faster, take_turns
from sides import Ours, Theirs

from llavakit.preprocess import CLIP_STD

ROWS_IN_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the report. ``bound``: seconds this machine needs at best; ``target``: how many times faster we mean to be."""

    name: str
    theirs: Times
    ours: Times
    bound: float | None = None
    target: float | None = None
    note: str = ""

    def __str__(self) -> str:
        ratio = faster(self.theirs, self.ours)
        met = "" if self.target is None else f"target {self.target:g} {'met' if ratio.median >= self.target else 'MISSED'}"
        text = f"{self.name:32}{_shown(self.theirs)}{_shown(self.ours)}{ratio.median:6.2f} [{ratio.least:.2f}-{ratio.most:.2f}]  {met}"
        notes = [self.note] if self.note else []
        if self.bound is not None:
            theirs, ours = (100 * self.bound / side.median for side in (self.theirs, self.ours))
            notes.insert(0, f"bound {_ms(self.bound)} ms; transformers reach {theirs:.0f} % of it, llavakit {ours:.0f} %")
        return "\n".join([text, *(f"{'':32}{note}" for note in notes)])


def _shown(times: Times) -> str:
    return f"{_ms(times.median)} [{_ms(times.least)}-{_ms(times.most)}]".ljust(28)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the measurements share."""

    shape: Shape
    folder: Path
    ours: Ours
    theirs: Theirs
    machine: Ceilings
    rounds: int
    tokens: int

    def target(self, times: float) -> float | None:
        """What we mean to reach with the real shape; a toy has its own proportions."""
        return times if self.shape in (FULL, NEXT) else None

    def prompt(self) -> int:
        """Tokens of the question about one picture."""
        return len(self.ours.ids(photograph(0), 0))


def preprocessing(bench: Bench) -> Iterator[Line]:
    for size in ((1000, 667), (4000, 3000)):
        jpegs = [photograph(seed, size) for seed in range(2)]
        for jpeg in jpegs:
            distance = float(np.abs(bench.ours.preprocess(jpeg) - bench.theirs.preprocess(jpeg)).max())
            assert distance <= 1e-6, f"pixels differ by {distance}"
        theirs = _clocked(bench.theirs.preprocess, jpegs)
        ours = _clocked(bench.ours.preprocess, jpegs)
        times = take_turns({"theirs": theirs, "ours": ours}, 2 * bench.rounds + 3)
        name, note = f"preprocessing, {size[0]}x{size[1]} JPEG", f"pixels equal (largest difference {distance:.1g})"
        yield Line(name=name, **times, target=bench.target(1.4), note=note)


def _clocked(run: Callable[[bytes], object], jpegs: list[bytes]) -> Callable[[int], float]:
    def once(number: int) -> float:
        start = time.perf_counter()
        run(jpegs[number % len(jpegs)])
        return time.perf_counter() - start

    return once


def first(bench: Bench) -> Iterator[Line]:
    agreed = Agreement(bench)
    times = take_turns(
        {"theirs": lambda n: bench.theirs.first_token(photograph(n), n), "ours": lambda n: bench.ours.first_token(photograph(n), n)},
        bench.rounds,
        after=agreed.compare,
    )
    prompt = bench.prompt()
    bound = bench.shape.first_token_flops(prompt) / bench.machine.multiply
    cost = f"llavakit holds {bench.ours.packed_bytes() / 1e6:.0f} MB more than its weights: the tower's, laid out for oneDNN"
    name = f"first token, prompt of {prompt}"
    yield Line(name=name, **times, bound=bound, target=bench.target(1.1), note=f"{agreed}\n{'':32}{cost}")


def decoding(bench: Bench, target: float = 1.6) -> Iterator[Line]:
    agreed, count = Agreement(bench), bench.tokens
    times = take_turns(
        {
            "theirs": lambda n: bench.theirs.decode(photograph(n), n, count),
            "ours": lambda n: bench.ours.decode(photograph(n), n, count),
        },
        bench.rounds,
        after=agreed.compare,
    )
    read = bench.prompt() + count // 2
    bound = bench.shape.step_bytes(read) / bench.machine.read
    yield Line(name=f"decoding, a token behind {read}", **times, bound=bound, target=bench.target(target), note=str(agreed))


class Agreement:
    """Counts how many greedy tokens the sides have in common before they part; after that they read different texts."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._alike: list[int] = []
        self._of = 0

    def compare(self) -> None:
        pairs = list(zip(self._bench.ours.tokens, self._bench.theirs.tokens, strict=True))
        self._of = len(pairs)
        self._alike.append(next((at for at, (a, b) in enumerate(pairs) if a != b), self._of))

    def __str__(self) -> str:
        return f"greedy tokens alike before the first that differs, of {self._of}: {', '.join(map(str, self._alike))}"


def second(bench: Bench) -> Iterator[Line]:
    jpeg = photograph(0)
    reply = [100 + 7 * number for number in range(2 * bench.tokens)]
    bench.ours.begin(jpeg, reply)
    ids = [bench.ours.second_turn_ids(number) for number in range(bench.rounds + 1)]
    shared = int((ids[0] == ids[1]).int().cumprod(0).sum())
    bench.theirs.begin(jpeg, ids[0][:shared])
    times = take_turns(
        {
            "again": lambda n: bench.theirs.second_turn(ids[n]),
            "cached": lambda n: bench.theirs.second_turn_cached(ids[n]),
            "ours": bench.ours.second_turn,
        },
        bench.rounds,
    )
    new = len(ids[0]) - shared
    name = f"second turn, {new} new of {len(ids[0])}"
    yield Line(
        name=name,
        theirs=times["again"],
        ours=times["ours"],
        target=bench.target(10),
        note="transformers as documented: reads everything again",
    )
    yield Line(name=name, theirs=times["cached"], ours=times["ours"], note="transformers with its cache passed on by hand")


def batch(bench: Bench) -> Iterator[Line]:
    read = bench.prompt()
    prompt = torch.randn(1, read, bench.shape.width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    count = max(4, bench.tokens // 4)
    times = take_turns(
        {
            "theirs": lambda _: bench.theirs.batch_step(prompt, ROWS_IN_BATCH, count),
            "ours": lambda _: bench.ours.batch_step(prompt, ROWS_IN_BATCH, count),
        },
        bench.rounds,
    )
    bound = bench.shape.step_bytes(read + count // 2, ROWS_IN_BATCH) / bench.machine.read
    yield Line(
        name=f"batch of {ROWS_IN_BATCH}, a step behind {read}", **times, bound=bound, note="a bare loop over the model on either side"
    )


def fp16(bench: Bench) -> Iterator[Line]:
    folder = bench.folder.with_name("fp16")
    write_checkpoint(folder, bench.shape, torch.float16)
    ours, theirs = Ours(folder), Theirs(folder, "auto")
    times = take_turns(
        {"theirs": lambda n: theirs.first_token(photograph(n), n), "ours": lambda n: ours.first_token(photograph(n), n)}, 1, warm=0
    )
    chosen = f"transformers compute in {theirs.model.dtype}, llavakit in {ours.assistant.model.dtype}"
    yield Line(name="first token, fp16 checkpoint", **times, note=chosen)


def anyres(bench: Bench) -> Iterator[Line]:
    ours, theirs = _next(bench)
    for size in ((640, 480), (1000, 667), (1920, 1080), (4000, 3000)):
        jpegs = [photograph(seed, size) for seed in range(2)]
        distance = max(float(np.abs(ours.preprocess(jpeg) - theirs.preprocess(jpeg)).max()) for jpeg in jpegs)
        assert distance <= 1e-6, f"pixels differ by {distance}"
        times = take_turns({"theirs": _clocked(theirs.preprocess, jpegs), "ours": _clocked(ours.preprocess, jpegs)}, 2 * bench.rounds + 3)
        note = f"pixels equal (largest difference {distance:.1g})"
        yield Line(name=f"AnyRes, {size[0]}x{size[1]} JPEG", **times, target=bench.target(1.4), note=note)
    levels = np.abs(ours.draft(jpegs[0]) - ours.preprocess(jpegs[0])) * (255 * np.array(CLIP_STD)[:, None, None])
    times = take_turns({"theirs": _clocked(theirs.preprocess, jpegs), "ours": _clocked(ours.draft, jpegs)}, 2 * bench.rounds + 3)
    note = f"pixels differ by {levels.mean():.2f} levels of 255 on average, {levels.max():.0f} at most"
    yield Line(name=f"the same with --draft, {size[0]}x{size[1]}", **times, target=bench.target(3), note=note)


def decoding_next(bench: Bench) -> Iterator[Line]:
    ours, theirs = _next(bench)
    yield from decoding(replace(bench, ours=ours, theirs=theirs, shape=NEXT if bench.shape is FULL else QUICK_NEXT), target=1.8)


def _next(bench: Bench) -> tuple[Ours, Theirs]:
    """Both sides of a NeXT checkpoint, written once."""
    folder = bench.folder.with_name("next")
    if not folder.exists():
        write_checkpoint(folder, NEXT if bench.shape is FULL else QUICK_NEXT, torch.bfloat16)
    return Ours(folder), Theirs(folder)


def loading(bench: Bench) -> Iterator[str]:
    folder = bench.folder.with_name("fp16")
    if not folder.exists():
        write_checkpoint(folder, bench.shape, torch.float16)
    for name, source, dtype, target in (("bf16 as it is", bench.folder, "bfloat16", 1.15), ("fp16 to bf16", folder, "bfloat16", 1.3)):
        stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        for side in ("theirs", "ours"):
            found = [_loaded(side, source, dtype) for _ in range(3)]
            peak, anonymous = (min(one[kind] for one in found) / stored for kind in ("peak", "anonymous"))
            met = "" if side == "theirs" else f"  target {target} {'met' if peak <= target else 'MISSED'}"
            who = "transformers" if side == "theirs" else "llavakit"
            seconds = min(one["seconds"] for one in found)
            yield f"loading, {name:15} {who:13} {seconds:6.2f} s   peak {peak:.2f} x the checkpoint, anonymous {anonymous:.2f} x{met}"


def _loaded(side: str, folder: Path, dtype: str) -> Mapping[str, float]:
    script = Path(__file__).with_name("loading.py")
    done = subprocess.run([sys.executable, script, side, folder, dtype], capture_output=True, text=True, check=True)
    found: Mapping[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


PARTS: Mapping[str, Callable[[Bench], Iterator[Line | str]]] = {
    "preprocessing": preprocessing,
    "first": first,
    "decoding": decoding,
    "second": second,
    "batch": batch,
    "fp16": fp16,
    "anyres": anyres,
    "next": decoding_next,
    "loading": loading,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy model: shows that everything runs, in a minute")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side takes its turn")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in a turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of both sides")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"some of {', '.join(PARTS)}")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    shape = QUICK if chosen.quick else FULL
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "bf16"
        write_checkpoint(folder, shape, torch.bfloat16)
        machine = ceilings()
        _head(shape, machine)
        bench = Bench(
            shape=shape,
            folder=folder,
            ours=Ours(folder),
            theirs=Theirs(folder),
            machine=machine,
            rounds=chosen.rounds,
            tokens=chosen.tokens,
        )
        for name in chosen.only:
            for line in PARTS[name](bench):
                print(line, flush=True)


def _head(shape: Shape, machine: Ceilings) -> None:
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{shape.name}: {shape.weights / 1e6:.0f} M weights, random; torch {torch.__version__}, {threads} threads, load {load:.1f}")
    print(f"this machine reads {machine.read / 1e9:.1f} GB/s and multiplies {machine.multiply / 1e9:.0f} GFLOP/s in bfloat16\n")
    print(f"{'milliseconds, median [range]':32}{'transformers':28}{'llavakit':28}times faster")


if __name__ == "__main__":
    main()
