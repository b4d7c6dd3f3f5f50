"""Print errors that the user can correct in one line; show a traceback for all other errors."""

import errno
from types import TracebackType

from typer.core import TyperGroup

_FILE_ERRORS = {
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
    """A command group that prints expected errors as one line on stderr and exits with status 1.

    Attributes:
        packages: The top-level packages whose own ValueErrors are expected.
    """

    packages: tuple[str, ...] = ("peftkit", "peftkit_kernels")

    def invoke(self, ctx):
        """Run the command. Unexpected errors are raised with their traceback."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if not is_expected(error, self.packages):
                raise
            from rich.console import Console

            line = " ".join(str(error).split())
            Console(stderr=True, soft_wrap=True).print(f"error: {line}", style="red", markup=False)
            ctx.exit(1)


def is_expected(error: BaseException, packages: tuple[str, ...]) -> bool:
    """Whether the user can correct ``error``: a file is missing or cannot be written, or a value was refused.

    A ValueError (ContractError is one) counts only if one of ``packages`` raised it. A ValueError from another library is a
    defect in peftkit, and its traceback is needed to find the place.
    """
    if isinstance(error, FileNotFoundError):
        return True
    if isinstance(error, OSError):
        return error.errno in _FILE_ERRORS
    return isinstance(error, ValueError) and _raised_in(error.__traceback__) in packages


def _raised_in(traceback: TracebackType | None) -> str:
    """Return the name of the top-level package that raised the error."""
    module = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module.partition(".")[0]
