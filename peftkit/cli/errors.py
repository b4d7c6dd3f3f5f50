"""Which errors are a message to the user, and which are a defect to be shown in full."""

import errno
from types import TracebackType

from typer.core import TyperGroup

_OF_THE_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


class OneLineErrors(TyperGroup):
    """A command group that prints expected errors as one line on stderr and exits with status 1."""

    def invoke(self, ctx):
        """Run the command; unexpected errors pass through with their traceback."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if not is_expected(error):
                raise
            from rich.console import Console

            line = " ".join(str(error).split())
            Console(stderr=True, soft_wrap=True).print(f"error: {line}", style="red", markup=False)
            ctx.exit(1)


def is_expected(error: BaseException) -> bool:
    """Whether ``error`` tells the user something to correct: a file that is missing or cannot be written, or a refused value.

    A ValueError counts if our own code raised it (ContractError is one); one that a library underneath raised is a defect of
    ours, and only its traceback says where.
    """
    if isinstance(error, FileNotFoundError):
        return True
    if isinstance(error, OSError):
        return error.errno in _OF_THE_DISK
    return isinstance(error, ValueError) and _raised_in(error.__traceback__).startswith("peftkit")


def _raised_in(traceback: TracebackType | None) -> str:
    module = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module
