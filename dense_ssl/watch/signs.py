"""What a look means: one line for the console, and sentences where features collapse."""

from collections.abc import Mapping

# Measured (docs/watching.md): healthy networks, untrained ones too, against runs that were made to collapse.
POINT = 0.03  # spread; healthy 0.11 and more
LINE = (
    4.0  # effective rank, or an eighth of the most possible; healthy 10 of 64, collapsed 1.6 to 3.4
)
ONE = 1.5  # prototypes in use; healthy 86 and more, collapsed 1.0
ALIKE = 0.95  # of those in use, that one image hesitates between; healthy 0.5


def signs(record: Mapping[str, float]) -> dict[str, str]:
    """Return sentences about what is wrong in a look, by their kind; {} in health."""
    found: dict[str, str] = {}
    if record.get("finite") == 0:
        return {"finite": "features are not finite: training has diverged"}
    spread, rank = record.get("spread", 1.0), record.get("rankme", LINE)
    most = record.get("most_rank", 8 * LINE)
    if spread < POINT:
        found["point"] = (
            f"features collapse: all images look alike to the backbone (spread {spread:.1g}, 0 is one point)"
        )
    elif rank < min(LINE, most / 8):
        found["line"] = (
            f"features collapse: almost all of them lie on a line (effective rank {rank:.1f} of {most:.0f})"
        )
    for kind, of in (("", "images"), ("patch_", "patches")):
        used, each = (record.get(f"{kind}prototypes_{name}") for name in ("used", "each"))
        if used is None or each is None:
            continue
        if used < ONE:
            found[f"{kind}prototype"] = (
                f"all {of} fall to one prototype: the teacher's answers collapse"
            )
        elif each > ALIKE * used:
            found[f"{kind}prototype"] = (
                f"all {of} are answered alike: the teacher's answers collapse"
            )
    return found


def console_line(record: Mapping[str, float]) -> str:
    """Return what a look found as one line."""
    parts = []
    if "match_one_cell" in record:
        parts.append(
            f"matches {record['match_one_cell']:.0f} % (by place {record['match_chance']:.0f})"
        )
    if "knn" in record:
        parts.append(f"k-NN {record['knn']:.1f} %")
    if "linear" in record:
        parts.append(f"linear {record['linear']:.1f} %")
    if "class_chance" in record:
        parts[-1] += f" (chance {record['class_chance']:.0f})"
    if "rankme" in record:
        parts.append(f"rank {record['rankme']:.0f} of {record['most_rank']:.0f}")
        parts.append(f"spread {record['spread']:.2f}")
    if "prototypes_used" in record:
        parts.append(
            f"{record['prototypes_used']:.0f} of {record['prototypes']:.0f} prototypes used"
        )
    if "queue_similarity" in record:
        parts.append(f"queue similarity {record['queue_similarity']:.2f}")
    return f"watch {record['step']}  {'  '.join(parts)}  ({record['seconds']:.1f} s)"
