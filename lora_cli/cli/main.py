"""The table of commands, and the one place where errors become exit codes. Nothing heavy is imported here."""

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from traceback import format_exc

import typer

from lora_cli import __version__
from lora_cli.cli.worker import end_with_launcher, error_file, is_worker
from lora_cli.errors import (
    DistributedError,
    OutOfMemoryError,
    Problem,
    StorageError,
    UserError,
    first_line,
    is_out_of_memory,
)
from lora_cli.signals import Interruption, raised

DEBUG = "--debug"
HELP = {"-h", "--help"}
ANY_VERSION = ("doctor", "schema")  # what reads no foreign files


# In the order of `lora --help`; each is a module of this package and a function in it
COMMANDS = (
    "train", "sweep", "check", "data", "eval", "generate", "report", "merge", "unmerge", "export", "inspect", "diff",
    "compose", "extract", "resize", "params", "plan", "schema", "doctor",
)  # fmt: skip


def app(arguments: Sequence[str]) -> typer.Typer:
    """The command that `arguments` name, else all: each that is imported costs milliseconds.

    Plain text instead of typer's boxes: it starts 0.15 seconds sooner, and long option names stay whole on narrow screens.
    """
    commands = typer.Typer(
        name="lora",
        help="LoRA fine-tuning from YAML recipes, with proof of what it did.",
        epilog=f"{DEBUG} on any command shows the traceback of an error.",
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": sorted(HELP)},
    )
    commands.callback()(_root)
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name in [named] if named in COMMANDS else COMMANDS:
        commands.command(name)(_function(name))
    return commands


def _function(name: str) -> Callable[..., None]:
    return getattr(import_module(f"lora_cli.cli.{name}"), "eval_" if name == "eval" else name)


def main() -> None:
    """Run a command; a user's error is one block on stderr and its class's exit code, never a traceback."""
    debug = DEBUG in sys.argv
    try:
        with raised():
            end_with_launcher()
            arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
            app(arguments)(arguments or ["--help"])
    except Interruption as signal:
        sys.exit(signal.code)
    except UserError as error:
        _report(error, debug)
        sys.exit(error.code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        known = _out_of_memory(error) or _storage(error) or _lost_workers(error) or _bug(error)
        _report(known, debug)
        sys.exit(known.code)


def _version(asked: bool) -> None:
    if asked:
        print(f"lora {__version__}")
        raise typer.Exit()


def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True, callback=_version),
) -> None:
    from lora_cli.cli.console import show_notices
    from lora_cli.cli.floors import check_versions

    show_notices()
    if context.invoked_subcommand not in ANY_VERSION and not HELP & set(sys.argv):
        check_versions()


MOST_LINES = 12


def _report(error: UserError, debug: bool) -> None:
    """On stderr; a worker of ours leaves it to the launcher, which shows one for all.

    With `debug`, the traceback of the exception that is being handled, in which foreign text is inert too.
    """
    from lora_cli.cli.console import err, inert, note

    text = inert(format_exc()) if debug else _block(error)
    if file := error_file():
        with suppress(OSError):
            file.write_text(text, encoding="utf-8")
            return
    err.file.flush()
    note(text)


def _block(error: UserError) -> str:
    """At most twelve lines; what doesn't fit is counted."""
    from lora_cli.cli.console import inert

    blocks = [inert(str(problem)) for problem in error.problems]
    shown = [blocks[0]]
    for block in blocks[1:]:
        if sum(text.count("\n") + 1 for text in [*shown, block]) > MOST_LINES - 1:
            break
        shown.append(block)
    if len(shown) < len(blocks):
        shown.append(f"… and {len(blocks) - len(shown)} more")
    return "\n".join(shown)


def _out_of_memory(error: Exception) -> UserError | None:
    if is_out_of_memory(error):
        return OutOfMemoryError(
            Problem(
                f"out of memory: {first_line(error)}",
                fix="lower `training.micro_batch_size` (the result stays the same), set `training.gradient_checkpointing: true`, "
                "shorten `data.max_length`, or use `model.quantize: nf4`",
            )
        )
    return None


def _storage(error: Exception) -> UserError | None:
    """The disk's refusals: full, read-only, not ours to write."""
    error = _of_the_system(error)
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.EFBIG,
        errno.ESTALE,
    ):
        return StorageError(
            Problem(
                f"the disk refuses: {error.strerror}",
                where=str(error.filename or ""),
                fix="free some space, or give another folder with `--out`",
            )
        )
    return None


def _of_the_system(error: Exception) -> Exception:
    """Libraries in Rust (tokenizers, safetensors) say `No space left on device (os error 28)` in exceptions of their own."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number and not isinstance(error, OSError) else error


LOST = ("gloo/", "nccl", "connection closed by peer", "connection reset by peer")


def _lost_workers(error: Exception) -> UserError | None:
    """What a worker sees where another has died or hangs: torch's own errors, and plain ones of gloo."""
    torch = sys.modules.get("torch")
    if not is_worker() or torch is None or not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, torch.distributed.DistError) and not any(text in str(error).lower() for text in LOST):
        return None
    return DistributedError(
        Problem(
            f"worker {os.environ['RANK']} lost the others: {first_line(error)}",
            fix="look at what the other workers say; continue with `--resume`",
        )
    )


def _bug(error: Exception) -> UserError:
    return UserError(
        Problem(
            f"a bug in lora: {type(error).__name__}: {first_line(error)}",
            fix=f"run it again with {DEBUG} and report what it prints",
        )
    )
