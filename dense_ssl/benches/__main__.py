"""Run one arm and print its measurement: `python -m dense_ssl.benches '{"arm": ...}'`."""

import importlib
import json
import os
import sys
import time

from dense_ssl.benches.task import TICK_S, WARM_BATCHES, Task, cpu_seconds
from dense_ssl.config import UserError


def measure(task: Task) -> dict[str, float]:
    """Return images, seconds and processor seconds of a task, and how long its warm-up took."""
    start = time.perf_counter()
    batches = importlib.import_module(f"dense_ssl.benches.{task.arm}").batches(task)
    for _ in range(WARM_BATCHES):
        next(batches)
    warm_s = time.perf_counter() - start
    images, cpu, wall = 0, cpu_seconds(os.getpid()), time.perf_counter()
    while images < task.images:
        images += next(batches)
    result = {
        "images": images,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": max(cpu_seconds(os.getpid()) - cpu, TICK_S),
        "warm_s": warm_s,
    }
    batches.close()  # ends worker processes
    return result


if __name__ == "__main__":
    try:
        result = measure(Task(**json.loads(sys.argv[1])))
    except ModuleNotFoundError as error:
        result = {"absent": f"{(error.name or '?').partition('.')[0]} is not installed"}
    except UserError as error:
        result = {"absent": str(error)}
    print(json.dumps(result), flush=True)
    os._exit(0)  # threads in the middle of unwanted batches wind down slowly
