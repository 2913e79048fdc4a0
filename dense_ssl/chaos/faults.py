"""The faults, the places they strike, and which of the two make sense together. Data, nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

EPOCH, MIDDLE, WRITE = "epoch boundary", "mid-epoch", "checkpoint write"
CONVERSION, EVALUATION = "conversion", "evaluation"
TRAINING = (EPOCH, MIDDLE, WRITE)
PLACES = (*TRAINING, CONVERSION, EVALUATION)
LOADERS = ("ffcv", "dali", "folder")
NO_LOADER = "-"  # conversion and evaluation read images by themselves
NO_FAULT = "none"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    name: str  # for --only
    title: str
    ranks: int = 1  # of the training it strikes
    loaders: Sequence[str] = LOADERS  # fewer where the loader plays no part
    otherwise: Mapping[str, str] = field(
        default_factory=dict, hash=False
    )  # place -> why it does not apply


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the matrix."""

    fault: Fault
    place: str
    loader: str

    @property
    def name(self) -> str:
        """The cell in one word, for folders and --only."""
        words = (self.fault.name, self.place.replace(" ", "-"), self.loader)
        return "/".join(word for word in words if word != NO_LOADER)


_NO_GRADIENT = {CONVERSION: "no number is learned", EVALUATION: "no gradient, and no float input"}
_NO_NAME = {WRITE: "a checkpoint has no name before it is whole: SIGKILL there"}
_NO_READING = {WRITE: "no record is read there"}
_ONE_PROCESS = {
    CONVERSION: "no ranks; its workers: SIGKILL of one rank",
    EVALUATION: "one process",
}

FAULTS = (
    Fault("sigterm", "SIGTERM"),
    Fault(
        "kill-one", "SIGKILL of one rank", ranks=2, otherwise={EVALUATION: "one process: the next"}
    ),
    Fault("kill-all", "SIGKILL of all ranks", ranks=2),
    Fault(
        "restarted", "SIGKILL of one rank, torchrun --max-restarts", ranks=2, otherwise=_ONE_PROCESS
    ),
    Fault("hung", "hung rank", ranks=2, loaders=LOADERS[-1:], otherwise=_ONE_PROCESS),
    Fault("disk-full", "disk full"),
    Fault("truncated", "truncated checkpoint", otherwise=_NO_NAME),
    Fault("flipped", "bit-flipped checkpoint", otherwise=_NO_NAME),
    Fault("corrupt", "corrupt shard record", otherwise=_NO_READING),
    Fault("vanished", "vanished shard file", otherwise=_NO_READING),
    Fault("nan-loss", "NaN in the loss", otherwise=_NO_GRADIENT),
    Fault("nan-gradient", "NaN in the gradient", otherwise=_NO_GRADIENT),
    Fault("nan-input", "NaN in the input", otherwise=_NO_GRADIENT),
    Fault(
        "memory",
        "out of memory raised",
        otherwise={CONVERSION: "the kernel ends a worker: SIGKILL of one rank"},
    ),
    Fault("memory-ranks", "out of memory on one of two ranks", ranks=2, otherwise=_ONE_PROCESS),
    Fault(
        "stalled",
        "stalled loader worker",
        otherwise={
            WRITE: "the loader takes no part in it",
            CONVERSION: "no loader; its progress is seen, and it can be stopped and continued",
            EVALUATION: "no loader; it writes nothing before its end, and can be repeated",
        },
    ),
    Fault("clock", "clock jump"),
    Fault("read-only", "read-only run folder"),
)


def cases(loaders: Sequence[str] = LOADERS, only: Sequence[str] = ()) -> list[Case]:
    """Return the cells that make sense, of some loaders, of which the name begins with one of `only`.

    Several words of a name are joined by "/": `nan-loss`, `sigterm/mid-epoch`, `memory/mid-epoch/dali`.
    """
    chosen = [case for case in _cells(loaders) if case.place not in case.fault.otherwise]
    return [case for case in chosen if not only or case.name.startswith(tuple(only))]


def left_out() -> list[tuple[Fault, str, str]]:
    """Return (fault, place, reason) of what does not apply."""
    return [(fault, place, why) for fault in FAULTS for place, why in fault.otherwise.items()]


def _cells(loaders: Sequence[str]) -> Iterator[Case]:
    for fault in FAULTS:
        for place in PLACES:
            for loader in loaders if place in TRAINING else (NO_LOADER,):
                if loader in (NO_LOADER, *fault.loaders):
                    yield Case(fault, place, loader)
