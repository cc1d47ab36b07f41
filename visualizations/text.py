"""What a model or a user wrote, made safe and visible; numbers as people read them."""

import html

# Written as numeric entities, so that no template engine between here and the page can find
# `${x}` or `{{x}}` in the value.
_ENTITIES = {ord(char): f"&#{ord(char)};" for char in "`${}"}
_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)}
# Left as they are, these would turn or hide the text around them.
_BIDI = {
    0x200E: "⇢", 0x200F: "⇠", 0x061C: "⇠",  # marks: left-to-right, right-to-left, Arabic
    0x202A: "↱", 0x202B: "↰", 0x202C: "↥",  # embeddings, and the end of one
    0x202D: "⇒", 0x202E: "⇐",  # overrides
    0x2066: "⇉", 0x2067: "⇇", 0x2068: "⇄", 0x2069: "⇅",  # isolates, and the end of one
}  # fmt: skip
_ODD = {
    0x7F: "\u2421",
    0x2028: "↵",
    0x2029: "¶",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),  # lone surrogates cannot be sent as UTF-8
}
_SHOWN = _PICTURES | _BIDI | _ODD
_TABLE = _SHOWN | _ENTITIES


def escape(text: str) -> str:
    """`text` for an HTML body or a quoted attribute; controls become visible signs.

    New lines and tabs stay. Right-to-left letters stay as they are; only the invisible
    characters that steer direction are replaced.
    """
    return html.escape(text, quote=True).translate(_TABLE)


def visible(text: str) -> str:
    """`text` with every control shown, new lines and tabs included; NOT escaped for HTML."""
    return text.translate(_SHOWN).replace("\n", "⏎").replace("\t", "⇥")


def clipped(text: str, limit: int) -> str:
    """At most `limit` characters of `text`, and how many there were when some are left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text):,} characters)"


def quoted(text: str, limit: int = 40) -> str:
    """A token's text as HTML between quotation marks, its spaces kept visible."""
    return f'<q class="w">{spaced(text, limit)}</q>'


def spaced(text: str, limit: int = 40) -> str:
    """A token's text as HTML; spaces at its ends carry a quiet dot (drawn by the style sheet)."""
    shown = visible(text[:limit]) + ("…" if len(text) > limit else "")
    core = shown.strip(" ")
    lead = len(shown) - len(shown.lstrip(" "))
    tail = len(shown) - lead - len(core)
    dot = '<i class="sp"> </i>'
    return dot * lead + escape(core) + dot * tail


def percent(p: float) -> str:
    """A probability in percent; never rounded to certainty or impossibility."""
    if p >= 0.9995:
        return "100 %" if p >= 1.0 else "> 99.9 %"
    if p < 0.001:
        return "< 0.1 %" if p > 0 else "0 %"
    return f"{100 * p:.0f} %" if 0.095 <= p < 0.985 else f"{100 * p:.1f} %"


def number(value: float, digits: int = 2) -> str:
    """Fixed decimals with a real minus sign, and no minus before zero."""
    written = f"{value:,.{digits}f}"
    return written.lstrip("-") if not written.strip("-0.,") else written.replace("-", "−")


def counted(n: int, thing: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def human_size(size: int) -> str:
    """Bytes in units of 1000: 512 B, 1.2 kB, 34 MB."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.1f} {unit}" if unit != "B" and value < 9.95 else f"{value:.0f} {unit}"


def duration(seconds: float) -> str:
    """0.74 s, 12.5 s, 3 min 20 s, 1 h 05 min."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
