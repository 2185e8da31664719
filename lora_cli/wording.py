"""How figures and foreign text are written wherever they are shown: console, page, card. Standard library only."""

import unicodedata

CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of characters that act instead of being seen


def inert(text: str) -> str:
    """Foreign text with every control and invisible format character written out, but for line ends and tabs."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in CONTROLS else _escaped(c) for c in text)


def number(count: float) -> str:
    return f"{count:,.0f}"


def compact(value: float) -> str:
    """Three digits: `0.0123`, `4.19`, `207`, `12.4k`; `2e-05` where it is small."""
    if value and abs(value) < 0.001:
        return power(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = {"G": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{value / scale:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def power(value: float) -> str:
    """Two digits and an exponent: `2e-4`, `2.5e-5`; a plain 0."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}" if value else "0"


def bytes_text(count: float) -> str:
    """`16.8 MB`: decimal units, as disks and download pages count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """`3 min 20 s`, `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()
