"""How tokens are shown: as text that hides nothing, whatever their bytes are."""

import unicodedata

SHOWN = {0x0A: "↵\n", 0x0D: "␍", 0x09: "⇥\t", 0x7F: "␡"}


def spell(tokens):
    """What to show for each of a row of tokens (bytes): its characters.

    A character that is spread over several tokens stands at the last of them. The others, like
    bytes that are no text, show their bytes as ⟨E2⟩.
    """
    shown = [""] * len(tokens)
    raw = b"".join(tokens)
    owner = [i for i, token in enumerate(tokens) for _ in token]  # of each byte
    at = 0
    while at < len(raw):
        n, char = first_character(raw[at : at + 4])
        last = owner[at + n - 1]
        for i in range(at, at + n):
            if not char or owner[i] != last:
                shown[owner[i]] += f"⟨{raw[i]:02X}⟩"
        shown[last] += visible(char)
        at += n
    return shown


def first_character(raw):
    """(number of bytes, character) at the start of `raw`; (1, "") where there is no UTF-8."""
    for n in range(1, len(raw) + 1):
        try:
            return n, raw[:n].decode()
        except UnicodeDecodeError:
            pass
    return 1, ""


def visible(char):
    """A character as it is; one that could reorder or hide text by name."""
    if not char:
        return ""
    code = ord(char)
    if code in SHOWN:
        return SHOWN[code]
    if code < 32:
        return chr(0x2400 + code)
    category = unicodedata.category(char)
    part_of_a_letter = code in (0x200C, 0x200D)  # joiners, in scripts and in emoji
    part_of_a_flag = 0xE0020 <= code <= 0xE007F
    hides = category == "Cf" and not part_of_a_letter and not part_of_a_flag
    if hides or category in ("Cc", "Zl", "Zp"):
        return f"⟨U+{code:04X}⟩"
    return char
