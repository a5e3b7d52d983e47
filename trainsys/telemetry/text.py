"""Numbers as people read them. Shared by the console, the report and whatever else prints."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """``950 us``, ``12.3 ms``, ``4.56 s``, ``2 min 05 s``, ``3 h 07 min``, ``4 d 06 h``."""
    if seconds < 0:
        return "-" + duration(-seconds)
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.{0 if seconds >= 0.1 else 1}f} ms"
    if seconds < 59.95:
        return f"{seconds:.{1 if seconds >= 10 else 2}f} s"
    minutes, s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {s:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


def count(value: float) -> str:
    """``12,345``, from a million on ``1.23 M``, ``4.56 B``, ``7.89 T``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.{3 - len(str(int(abs(value) / size)))}f} {unit}".replace(". ", " ")
    return f"{value:,.0f}"


def size(n_bytes: float) -> str:
    """``640 KiB``, ``312 MiB``, ``61.4 GiB``."""
    if n_bytes >= 1 << 30:
        return f"{n_bytes / (1 << 30):.{1 if n_bytes >= 10 << 30 else 2}f} GiB"
    if 0 < n_bytes < 1 << 20:
        return f"{n_bytes / (1 << 10):.0f} KiB"
    return f"{n_bytes / (1 << 20):.0f} MiB"


def rate(flops_per_s: float) -> str:
    """``92.1 GFLOP/s``, ``1.98 PFLOP/s``."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops_per_s >= scale:
            value = flops_per_s / scale
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}FLOP/s"
    return f"{flops_per_s / 1e6:.1f} MFLOP/s"


def percents(parts: list[float], digits: int = 1) -> list[str]:
    """Shares of the parts' sum in percent, rounded so that they sum to exactly 100 (largest remainder)."""
    total = sum(parts)
    if total <= 0:
        return ["0"] * len(parts)
    scale = 10**digits
    exact = [100 * scale * p / total for p in parts]
    whole = [int(e // 1) for e in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: 100 * scale - sum(whole)]:
        whole[i] += 1
    return [f"{w / scale:.{digits}f}%" for w in whole]


_ASCII = str.maketrans({"·": "|", "×": "x", "→": "->", "–": "-", "█": "#", "━": "-"})


def ascii_only(text: str) -> str:
    """The same text for an output that may not show more than ASCII."""
    return text.translate(_ASCII).encode("ascii", "replace").decode()
