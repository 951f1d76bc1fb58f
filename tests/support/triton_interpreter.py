"""Whether Triton's interpreter can be used here, found out without importing Triton, which would settle how it runs."""

from importlib import metadata


def why_not() -> str | None:
    """The reason against it; None if there is none."""
    try:
        triton, numpy = (tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy"))
    except metadata.PackageNotFoundError:
        return "triton is not installed"
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of triton 3.6 does not work with numpy 2.4 and later"
    return None
