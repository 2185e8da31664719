"""What a user can get wrong: problems with a place and a fix, and the exit code of their class.

Standard library only: every floor raises these, and `cli/console.py` prints them.
"""

import errno
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake: what is wrong, where (`file:line:column`, or a path), the line as it stands, how to put it right."""

    what: str
    where: str = ""
    line: str = ""
    fix: str = ""

    def __str__(self) -> str:
        parts = [f"error: {self.what}"]
        if self.where:
            parts.append(f"  --> {self.where}")
        if self.line:
            parts.append(f"     | {self.line}")
        if self.fix:
            parts.append(f"  fix: {self.fix}")
        return "\n".join(parts)


def first_line(error: BaseException) -> str:
    """What a library's exception says, in one line; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# Exceptions whose message is a sentence; that of others says little without their name
SENTENCES = (OSError, ValueError, ImportError, RuntimeError)


def said(error: BaseException) -> str:
    """What a library's exception says of a foreign file, in one line."""
    line = first_line(error)
    return line if isinstance(error, SENTENCES) or line == type(error).__name__ else f"{type(error).__name__}: {line}"


class UserError(Exception):
    """An error the user can put right. Subclasses carry the exit code; all problems are reported at once."""

    code = 1

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n\n".join(map(str, problems)))
        self.problems = problems


class RecipeError(UserError):
    """Usage or recipe."""

    code = 2


class DataError(UserError):
    """Rows, files or formats."""

    code = 3


class ModelError(UserError):
    """Model, tokenizer, adapter or checkpoint."""

    code = 4


class StorageError(UserError):
    """The output exists, is locked, read-only or full; or I/O failed."""

    code = 5


class DivergedError(UserError):
    """Non-finite values, or an adapter that does nothing."""

    code = 6


class OutOfMemoryError(UserError):
    """Device or host memory."""

    code = 7


# What every other worker says where the first could not write, which says why
FIRST_FAILED = "worker 0 failed to write"


class DistributedError(UserError):
    """A worker died, timed out, or ranks disagree."""

    code = 8


class SafetyError(UserError):
    """Refused for safety: pickles, foreign code, paths that lead out of a folder."""

    code = 9


# How plain RuntimeErrors of torch's allocators and of cuBLAS say it
NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether device or host memory ran out, in any of the ways that Python, torch and the system say it."""
    torch = sys.modules.get("torch")  # where it is not imported, the error is not its own
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
