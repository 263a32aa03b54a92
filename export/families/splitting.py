"""How texts are split into pieces, in which tokens are looked for, where no file of a family's checkpoints says it.

KIMI, of Moonlight, Kimi-VL, Kimi-K2 and Kimi-K2.5. A piece is one of: Han characters; a word, perhaps with a character
before it that is neither a letter nor a digit, and with the end of an English contraction, where upper case after lower
case begins another word; up to three digits; other signs, with the ends of lines behind them; ends of lines; blanks,
the last of which goes to what follows.
"""

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

KIMI = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDING}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
