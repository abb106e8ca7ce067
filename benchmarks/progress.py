"""How far a long run is, on a terminal; elsewhere nothing, for logs have lines of their own."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def bar(what: str, console: Console) -> Progress:
    """``what`` is done, how many of how many, for how long, and the task's description."""
    return Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}"), console=console, disable=not console.is_terminal,
    )  # fmt: skip
