"""Number words for 0..9999 in English and Chinese."""

from __future__ import annotations

LIMIT = 10_000

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen "
    "twenty thirty forty fifty sixty seventy eighty ninety"
)
_ONES = _WORDS.split()[:20]
_TENS = ["", "", *_WORDS.split()[20:]]
_HAN = "零一二三四五六七八九"
_HAN_UNITS = ("千", "百", "十", "")


def english(number: int) -> str:
    """`1005` -> `one thousand and five`."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    if number < 1000:
        head, rest = divmod(number, 100)
        return f"{_ONES[head]} hundred" + (f" and {english(rest)}" if rest else "")
    head, rest = divmod(number, 1000)
    join = " and " if rest < 100 else " "
    return f"{_ONES[head]} thousand" + (join + english(rest) if rest else "")


def chinese(number: int) -> str:
    """`1005` -> `一千零五`: one 零 for a run of zeros inside, none at the end."""
    if number < 10:
        return _HAN[number]
    if number < 20:
        return "十" + (_HAN[number - 10] if number > 10 else "")
    text, gap = "", False
    for figure, unit in zip(f"{number:04d}", _HAN_UNITS, strict=True):
        if figure == "0":
            gap = bool(text)
            continue
        text += ("零" if gap else "") + _HAN[int(figure)] + unit
        gap = False
    return text
