"""`make bench`: every kernel beside the published operations, torch.compile and public rivals.

    python -m kernels.bench [KERNEL ...] [--out runs/bench] [--write-results]

On CUDA the real shapes are measured; on a CPU the references behind the operators at reduced shapes, and
what the kernels will take from a GPU is compiled and counted. Prints a table per case, appends the same
rows to kernels.csv and draws speed.png and memory.png in the folder; `--write-results` puts the tables
into kernels/RESULTS.md.
"""

import argparse
import difflib
import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kernels import bench_charts, bench_files
from kernels.bench_measure import Bound, Measured, arguments, exact, measure
from kernels.bench_paper import flops_of, moved_by, reduced, resources, traffic
from kernels.bench_place import CARDS, Place, here
from kernels.bench_report import (
    Case,
    Counted,
    Row,
    case_table,
    counted_table,
    prediction_table,
    resource_table,
)
from kernels.bench_rivals import RIVALS
from kernels.catalogue import ALL
from kernels.language import INTERPRETED
from kernels.spec import Arguments, KernelSpec, Shape

PAPER = "On paper"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the kernels named, all if none is; return 0, 1 if one of ours failed, 2 for bad words."""
    parser = argparse.ArgumentParser(prog="make bench", description="Measure the kernels.")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="all if none is named")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for CSV, PNG")
    parser.add_argument("--write-results", action="store_true", help="update kernels/RESULTS.md")
    args = parser.parse_args(argv)
    for name in args.kernels:
        if name not in ALL:
            near = difflib.get_close_matches(name, ALL, 1, 0)[0]
            return _refuse(f"no kernel is called {name}; did you mean {near}?")
    if INTERPRETED:
        return _refuse("TRITON_INTERPRET=1 is set; unset it, the interpreter's times mean nothing")
    specs = [ALL[name] for name in dict.fromkeys(args.kernels)] or list(ALL.values())
    # What compilers and rivals remark does not belong in a table.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _bench(specs, args.out, write=args.write_results)


def _bench(specs: Sequence[KernelSpec], out: Path, *, write: bool) -> int:
    start = time.monotonic()
    if not torch.cuda.is_available():
        torch.set_num_threads(
            1
        )  # several wait for each other wherever a machine does something else
    place = here()
    _say(place.heading)
    rows: list[Row] = []
    blocks: dict[tuple[str, str], str] = {}
    for spec in specs:
        texts: list[str] = []
        mine: list[Row] = []
        for case in _cases(spec, place):
            measured = list(_measured(spec, case, place, first=not texts))
            mine += measured
            texts.append(case_table(case, measured, place.card))
            _say(f"\n{texts[-1]}")
        if place.card:
            texts.append(prediction_table(spec.name, place.section, mine))
            _say(f"\n{texts[-1]}")
        rows += mine
        blocks[place.section, spec.name] = _fenced(place.heading, *texts)
    if not place.card:
        blocks |= _on_paper(specs, place)
    bench_files.append_csv(out / "kernels.csv", rows, place)
    try:
        bench_charts.draw(rows, place, out)
        _say(f"\nrows in {out}/kernels.csv, charts in {out}/speed.png and {out}/memory.png")
    except ModuleNotFoundError as error:
        _say(f"\nrows in {out}/kernels.csv; no charts: {error.name} is not installed")
    if write:
        bench_files.write_results(_not_measured() | blocks)
        _say("tables in kernels/RESULTS.md")
    failed = [row for row in rows if row.provider == "ours" and row.measured.absent]
    _say(
        f"{time.monotonic() - start:.0f} s" + (f", {len(failed)} of ours failed" if failed else "")
    )
    return 1 if failed else 0


# Cases and providers


def _cases(spec: KernelSpec, place: Place) -> Iterator[Case]:
    """Yield the real shapes; on a CPU reduced ones, once each where several become the same."""
    floating = spec.bench_dtype.is_floating_point
    dtype = torch.float32 if floating and not place.card else spec.bench_dtype
    groups: list[tuple[Shape, list[str]]] = []
    for title, whole in spec.real.items():
        shape = whole if place.card else reduced(spec, whole, dtype)
        same = next((titles for other, titles in groups if other == shape), None)
        if same is None:
            groups.append((shape, [title]))
        else:
            same.append(title)
    for shape, titles in groups:
        yield Case(
            kernel=spec.name,
            titles=tuple(titles),
            shape=shape,
            wholes=tuple(spec.real[title] for title in titles),
            dtype=str(dtype).removeprefix("torch."),
            moved=moved_by(spec, shape, dtype),
            flops=flops_of(spec, shape),
        )


class _Provider(NamedTuple):
    """One implementation of a kernel."""

    name: str
    bind: Callable[[Arguments], Bound]
    note: str = ""
    needs_cuda: bool = False
    result: str = "kernel"  # what it returns: the kernel's result, that of "eager", or "" another


def _providers(spec: KernelSpec) -> list[_Provider]:
    # What looks at values is no graph. Of a sequence that does the reference may be compiled instead.
    shape = next(iter(spec.real.values()))
    graphs = [f for f in (spec.eager, spec.reference) if traffic(spec, shape, spec.bench_dtype, f)]

    def compiled(given: Arguments) -> Bound:
        if not graphs:
            raise NotImplementedError("torch-eager and the reference look at values: no graph")
        torch._dynamo.reset()  # every shape is compiled as if it were the only one
        function = torch.compile(graphs[0], dynamic=False, fullgraph=True)
        return lambda: function(**given)

    instead = bool(graphs) and graphs[0] is spec.reference
    other = "the reference: torch-eager looks at values, which is no graph" if instead else ""
    compiles_to = "kernel" if instead else "eager"
    ours = [
        _Provider("torch-eager", lambda given: lambda: spec.eager(**given), result="eager"),
        _Provider("torch-compile", compiled, other, result=compiles_to),
        _Provider("ours", lambda given: lambda: spec.call(**given)),
        _Provider("reference", lambda given: lambda: spec.reference(**given)),
    ]
    rivals = [
        _Provider(rival.name, rival.bind, rival.note, rival.needs_cuda, rival.result)
        for rival in RIVALS
        if rival.kernel == spec.name
    ]
    return ours + rivals


def _measured(spec: KernelSpec, case: Case, place: Place, *, first: bool) -> Iterator[Row]:
    dtype = getattr(torch, case.dtype)
    want = exact(spec, arguments(spec, case.shape, dtype, place.device))
    for provider in _providers(spec):
        absent = ""
        if provider.needs_cuda and not place.card:
            absent = "not measured: it needs a CUDA device"
        elif provider.name == "torch-compile" and not (place.card or first):
            absent = "not measured: on a CPU only the first shape is compiled"
        if absent:
            found = Measured(absent=absent)
        else:
            given = arguments(spec, case.shape, dtype, place.device)
            found = _attempt(spec, provider, given, want.get(provider.result))
            del given
            gc.collect()
            if place.card:
                torch.cuda.empty_cache()
        yield Row(case, provider.name, found, provider.note)


def _attempt(
    spec: KernelSpec, provider: _Provider, given: Arguments, want: list[torch.Tensor] | None
) -> Measured:
    graded = [given[name] for name in spec.grads]
    try:
        return measure(provider.bind(given), graded, want)
    except ModuleNotFoundError as error:
        return Measured(absent=f"not measured: {error.name or error} is not installed")
    except NotImplementedError as error:
        return Measured(absent=f"not measured: {error}")
    except torch.OutOfMemoryError:
        return Measured(absent="out of memory")
    except Exception as error:  # a rival's failure is a row of the table, not the end of the run
        first = (str(error).strip() or "no message").splitlines()[0]
        return Measured(absent=f"failed: {type(error).__name__}: {first}")


# Without a GPU


def _on_paper(specs: Sequence[KernelSpec], place: Place) -> dict[tuple[str, str], str]:
    """Print what is known of the kernels on cards that are not there; return it by kernel."""
    counted: list[Counted] = []
    for spec in specs:
        for title, shape in spec.real.items():
            eager = traffic(spec, shape, spec.bench_dtype)
            moved, flops = moved_by(spec, shape, spec.bench_dtype), flops_of(spec, shape)
            counted.append(Counted(spec.name, title, eager, moved, flops))
    found = resources(specs)
    moves = (
        "bytes moved, counted, forward and backward, and the time they imply at a card's peaks "
        "(-: the sequence looks at values)"
    )
    takes = "what every launch takes, compiled ahead of time for all real shapes"
    _say(f"\n{moves}\n{counted_table(counted)}")
    _say(f"\n{takes}\n{resource_table(specs, found)}" if found else "\ntriton is not installed")
    blocks: dict[tuple[str, str], str] = {}
    for spec in specs:
        of_kernel = [row for row in counted if row.kernel == spec.name]
        launches = [launch for launch in found if launch[0] == spec.name]
        texts = [f"{moves}\n{counted_table(of_kernel)}"]
        texts += [f"{takes}\n{resource_table([spec], launches)}"] if launches else []
        blocks[PAPER, spec.name] = _fenced(f"{place.versions}; commit {place.commit}", *texts)
    return blocks


def _not_measured() -> dict[tuple[str, str], str]:
    """Return the blocks of the cards that have not run a kernel yet, with what is predicted."""
    done = bench_files.measured_blocks()
    return {
        (card.name, name): _fenced(bench_files.NOT_YET, prediction_table(name, card.name, []))
        for card in CARDS
        for name in ALL
        if (card.name, name) not in done
    }


def _fenced(*texts: str) -> str:
    return "```\n" + "\n\n".join(text for text in texts if text) + "\n```"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _refuse(text: str) -> int:
    sys.stderr.write(f"make bench: {text}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
