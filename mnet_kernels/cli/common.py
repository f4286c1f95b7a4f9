"""What the commands share: exit statuses, one-line errors, kinds of arguments, a progress bar."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

NOT_BUILT = "mnet_kernels is not built: run 'make install', or 'pip install .'"
ANSWERS_DIFFER, BAD_INPUT, INTERRUPTED = 1, 2, 130


def fail(message: str, status: int) -> int:
    """Say in one line what went wrong; the exit status to end with."""
    print(f"mnet-kernels: {' '.join(message.split())}", file=sys.stderr)
    return status


class Command(click.Command):
    """A command whose InputError becomes click's own kind of error."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ValueError as error:
            from mnet_kernels.inputs import InputError

            if isinstance(error, InputError):
                raise click.ClickException(str(error)) from None
            raise


class OutputPath(click.ParamType):
    """A file that can be written; checked before the work starts."""

    name = "file"

    def convert(self, value: Any, param: Any, context: Any) -> Path:
        path = Path(value)
        target = path if path.exists() else path.parent
        if path.is_dir():
            self.fail(f"expected a file to write, got the directory {path}", param, context)
        if not path.parent.is_dir():
            self.fail(f"expected a file to write, got {path}: no such directory", param, context)
        if not os.access(target, os.W_OK):
            self.fail(
                f"expected a file to write, got {path}: {target} is read-only", param, context
            )
        return path


def write(path: Path, content: str | bytes, what: str) -> None:
    """Write a file and say so; one that cannot be written after all is one line."""
    try:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from None
    click.echo(f"{what}: {path}")


def load_extension() -> None:
    """Import torch and the extension, which must be built.

    An exception from Ctrl-C inside their C++ start-up would abort the process, so until they
    are there Ctrl-C leaves at once.
    """

    def leave(*_: Any) -> None:
        os._exit(fail("interrupted", INTERRUPTED))

    previous = signal.signal(signal.SIGINT, leave)
    try:
        from mnet_kernels.timing import build_info

        build = build_info()
    finally:
        signal.signal(signal.SIGINT, previous)
    if build is None:
        raise click.ClickException(NOT_BUILT)


def device_of(backend: str | None) -> str:
    """Where the networks run: on the GPU for a GPU's backend. The backend must be able to serve."""
    if backend is None:
        return "cpu"
    from mnet_kernels import backends

    rows = {row.backend: row for row in backends.table()}
    if backend not in rows:
        expected = ", ".join(rows)
        raise click.BadParameter(f"expected {expected}, got {backend!r}", param_hint="--backend")
    if not rows[backend].available:
        raise click.BadParameter(
            f"{backend} cannot serve here: {rows[backend].reason}", param_hint="--backend"
        )
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def set_threads(threads: int | None) -> None:
    """One setting for every way to run."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr, gone when the work is done; nothing where nobody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(stderr=True)
    columns = BarColumn(), TaskProgressColumn(), TextColumn("{task.description}")
    watched = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not watched) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda text, fraction: bar.update(task, description=text, completed=fraction)
