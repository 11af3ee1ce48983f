"""What the command says when something goes wrong, and the exit status it ends with.

Four parts on stderr: what, why, what would work, where it is documented. Never a traceback, unless UNICOM_DEBUG=1.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable

from unicom_dist.config.errors import ConfigError, UnicomError
from unicom_dist.config.storage import DOCS, storage_error

INTERRUPTED = 130
UNEXPECTED = 1


def guarded(command: Callable[[], object]) -> int:
    """Run `command` and turn whatever ends it into text on stderr and an exit status."""
    try:
        answer = command()
    except UnicomError as error:
        return _say(error)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        return _nobody_reads()
    except SystemExit as stop:  # what Typer makes of a broken pipe
        if isinstance(stop.__context__, BrokenPipeError):
            return _nobody_reads()
        raise
    except Exception as error:
        if type(error).__name__ == "Abort":
            return _interrupted()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.ctx.get_help())  # type: ignore[attr-defined]
            return 0
        if hasattr(error, "format_message"):  # Typer's usage errors; the class moved between versions
            return _say(usage_error(error))
        if os.environ.get("UNICOM_DEBUG") == "1":
            raise
        refused = storage_error(error)
        return _say(refused) if refused else _unexpected(error)
    if answer == INTERRUPTED:  # Typer's own translation of Ctrl-C
        return _interrupted()
    return answer if isinstance(answer, int) else 0


def usage_error(error: Exception) -> ConfigError:
    """A mistyped command or option as a ConfigError that names the nearest one."""
    message = error.format_message().strip().replace("Value error, ", "")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "unicom"
    what, _, hint = message.partition(" Did you mean ")
    near = list(getattr(error, "possibilities", None) or [])
    if near:
        what, hint = what.partition(" (Possible")[0], " or ".join(near) + "?"
    fix = f"did you mean {hint}" if hint else ""
    remedy = " ".join(part for part in (fix, f"`{path} --help` lists what there is") if part)
    return ConfigError(what.rstrip("."), f"`{path}` does not take it" if hint else "", remedy, DOCS)


def _say(error: UnicomError) -> int:
    sys.stdout.flush()
    print(error, file=sys.stderr, flush=True)
    return error.exit_code


def _interrupted() -> int:
    print("interrupted; run the same command again to go on", file=sys.stderr, flush=True)
    return INTERRUPTED


def _nobody_reads() -> int:
    """The reader of our output has gone, as in `unicom config show ... | head`: no reason to complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _unexpected(error: Exception) -> int:
    with tempfile.NamedTemporaryFile("w", prefix="unicom-", suffix=".log", delete=False, encoding="utf-8") as log:
        traceback.print_exception(error, file=log)
    first = str(error).splitlines()[0] if str(error) else "no message"
    unexpected = UnicomError(
        f"unexpected {type(error).__name__}: {first}",
        "this is a defect of unicom, or of the machine",
        f"the traceback is in {log.name}; UNICOM_DEBUG=1 shows it here",
        DOCS,
    )
    _say(unexpected)
    return UNEXPECTED
