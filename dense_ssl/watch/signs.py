"""What a look means: one line for the console, and sentences where features collapse."""

from collections.abc import Mapping

POINT = 0.01  # spread below which all images are one point
LINE = 1.5  # effective rank below which all images lie on one line


def signs(record: Mapping[str, float]) -> dict[str, str]:
    """Return sentences about what is wrong in a look, by their kind; {} in health.

    The limits are measured: docs/watching.md has what healthy and collapsed runs show.
    """
    found: dict[str, str] = {}
    if record.get("finite") == 0:
        return {"finite": "features are not finite: training has diverged"}
    spread, rank = record.get("spread", 1.0), record.get("rankme", 2.0)
    if spread < POINT:
        found["collapse"] = (
            f"features collapse: all images look alike to the backbone (spread {spread:.1g}, 0 is one point)"
        )
    elif rank < LINE:
        found["rank"] = (
            "features collapse: all of them lie on one line (effective rank "
            f"{rank:.1f} of {record['most_rank']:.0f})"
        )
    return found


def console_line(record: Mapping[str, float]) -> str:
    """Return what a look found as one line."""
    parts = []
    if "match_one_cell" in record:
        parts.append(
            f"matches {record['match_one_cell']:.0f} % (chance {record['match_chance']:.0f})"
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
