"""Training in processes of its own, one or many, to be killed and compared."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
#: What no two runs have in common.
TIMES = ("images_per_second", "seconds")


def metrics(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def start(code, *arguments, **environment):
    """A Python process that runs ``code``."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "train")))
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
    )


def together(code, *arguments, world=2):
    """``world`` processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    return [
        start(code, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(world)
    ]
