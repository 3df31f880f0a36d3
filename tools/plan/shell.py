"""The stages' commands that stand in anyone's shell file. Nothing of it runs.

Each command counts once, whatever loop or branch it stands in. Variables are replaced by what the
file itself assigns in plain words, by their `${NAME:-default}`, or by the environment.
"""

import os
import re
import shlex

from common.errors import UserError

VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^{}]*))?\}|\$(\w+)")
ASSIGNMENT = re.compile(r"(?:export\s+|local\s+|readonly\s+)?([A-Za-z_]\w*)=(.*)")
REDIRECTION = re.compile(r"\s[\d&]?(?:>>?|<)\s*(?:&\d|[^\s;|&]+)")
SEPARATORS = set("();<>|&")


def commands_in(path, text, scripts):
    """The commands of a shell file that name one of `scripts`, [[word, ...]].

    Raises UserError where such a command holds what only running the file would tell.
    """
    known = dict(os.environ)
    commands = []
    for number, line in lines_of(text):
        named = any(re.search(rf"(^|[\s/\"']){re.escape(script)}\b", line) for script in scripts)
        assigned = ASSIGNMENT.fullmatch(line)
        if named:
            commands += commands_of_line(f"{path}, line {number}", replaced(line, known), scripts)
        elif assigned:
            assign(known, *assigned.groups())
    return commands


def lines_of(text):
    r"""(number, line) of each line that is no comment; one that ends in \ goes on with the next."""
    begun = ""
    for number, line in enumerate(text.splitlines(), 1):
        if not begun:
            first = number
        if line.endswith("\\"):
            begun += line[:-1] + " "
            continue
        whole = (begun + line).strip()
        begun = ""
        if whole and not whole.startswith("#"):
            yield first, whole


def replaced(text, known):
    """Variables replaced by their values; one that is not known stays as it stands."""

    def value(match):
        name = match[1] or match[3]
        found = known.get(name, match[2])
        return match[0] if found is None or "$" in found else found

    before = None
    while text != before:  # ${A:-$B}: from the inside
        before = text
        text = VARIABLE.sub(value, text)
    return text


def assign(known, name, value):
    """NAME=value, where the value is one plain word."""
    value = replaced(value, known)
    try:
        words = shlex.split(value, comments=True)
    except ValueError:  # a quotation that goes on in the next line
        return
    if len(words) <= 1 and not re.search(r"[$`(]", value):
        known[name] = "".join(words)


def commands_of_line(where, line, scripts):
    """The commands of one line, [[word, ...]]; && and the like stand between them."""
    try:
        words = list(splitter(REDIRECTION.sub(" ", line)))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    commands = [[]]
    for word in words:
        if set(word) <= SEPARATORS:
            commands.append([])
        else:
            commands[-1].append(word)
    commands = [words for words in commands if has_stage(words, scripts)]
    unknown = re.search(r"\$\{?\w*|`", " ".join(word for words in commands for word in words))
    if unknown:
        raise UserError(
            f"{where}: {unknown[0].replace('{', '')} is known only when the file runs; set the "
            f"variable in front of this command (NAME=VALUE python ...), or give the stage's "
            f"whole command with --command"
        )
    return commands


def has_stage(words, scripts):
    """Does a stage stand there with flags after it? (`cp train_slm.py old/` is none.)"""
    return any(
        os.path.basename(word) in scripts and after.startswith(("-", "$"))
        for word, after in zip(words, words[1:])
    )


def splitter(line):
    """The line's words, as a shell would split them; `&&`, `|` and the like are words, too."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    return words
