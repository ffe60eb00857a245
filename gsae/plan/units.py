"""Numbers as a plan shows them. In: bytes, hours, counts. Out: short texts."""


def gib(count: int) -> str:
    """Bytes, in MiB below a tenth of a GiB: `369.1 MiB`, `1.08 GiB`."""
    return f"{count / 2**30:,.2f} GiB" if count >= 0.1 * 2**30 else f"{count / 2**20:,.1f} MiB"


def hours(value: float) -> str:
    """Hours, in minutes below two: `24 min`, `11.3 h`."""
    return f"{value:,.1f} h" if value >= 2 else f"{60 * value:,.1f} min"


def counted(number: int, noun: str) -> str:
    """A count with its noun: `1 rank`, `8 ranks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
