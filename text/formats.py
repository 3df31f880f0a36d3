"""What a record says: the known formats of published data sets, and a document's texts.

A document is a list of texts, taken in turns: not to be learnt, to be learnt, not to be learnt, ...
A plain text is a list of one, to be learnt. A pair is [prompt + newline, response]; a prompt may
have two fields. A chat is written as ToRA and Tulu write it,

    <|user|>
    What is 2 + 3?
    <|assistant|>
    It is 5.

and only what the assistant says is to be learnt. Of that what a tool answered is not: the lines
after "```output" up to and with the closing fence. (The marker "```output" itself is: the model
must write it, for there its generation stops.)
"""

import re

NAMED, LETTERS = 12, 60  # fields that a message lists, and how much of each one's name
# Of a chat: its characters times its turns. At each turn all before it is tokenised once more.
MOST = 1 << 32
JOIN = "\n"  # between prompt and response; it belongs to the prompt

# (form, fields); the first that a record has counts. Beside each: data sets that are published so.
FORMATS = (
    ("chat", ("messages",)),  # Tulu-v2, ToRA-style trajectories
    ("chat", ("conversations",)),  # OpenHermes-2.5
    ("chat", ("prompt", "completion")),  # ToRA-style trajectories
    ("pair", ("query", "response")),  # MetaMathQA
    ("pair", ("instruction", "input", "output")),  # Alpaca; the input belongs to the prompt
    ("pair", ("instruction", "output")),  # MAmmoTH's MathInstruct
    ("pair", ("question", "answer")),  # GSM8K
    ("text", ("text",)),  # OpenWebMath, SlimPajama
    ("text", ("content",)),  # StarCoderData
)
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
OUTPUT = re.compile(r"(?<=```output\n).*?(?:^```[ \t]*\n?|\Z)", re.S | re.M)


def guess(fields):
    """(form, fields) of a record that has these fields, or None."""
    for form, names in FORMATS:
        if set(names) <= set(fields):
            return form, list(names)
    return None


def listed(fields):
    """The end of a message about a field that is not there."""
    fields = [str(field) for field in fields]
    names = ", ".join(repr(field[:LETTERS]) for field in fields[:NAMED]) or "none"
    if len(fields) > NAMED:
        names += f", ... of {len(fields)}"
    return f"its fields are {names}; name one with --text-field or --prompt-field"


def document(form, fields, values):
    """The texts of one record, by turns. Raises ValueError for a value of the wrong kind."""
    if form == "chat":
        return chat(fields[0], turns_of(values))
    values = [as_text(value) for value in values]
    for field, value in zip(fields, values):
        if not isinstance(value, str):
            raise ValueError(f"field {field!r} is {type(value).__name__}, wanted a string")
        value.encode()  # a lone surrogate has no UTF-8
    if form == "text":
        return values
    *prompt, response = values
    return ["\n".join(filter(str.strip, prompt)) + JOIN, response]


def as_text(value):
    """Parquet's strings come as bytes. Raises UnicodeDecodeError."""
    return value.decode() if isinstance(value, bytes) else value


def turns_of(values):
    """A chat's turns, where it is one field of turns or two fields of texts."""
    if len(values) == 1:
        return values[0]
    prompt, completion = values
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]


def chat(field, turns):
    """The texts of a chat, by turns. Raises ValueError."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field {field!r} is {type(turns).__name__}, wanted a list of turns")
    parts = [[]]  # of each text; even places: not to be learnt

    def add(text, learnt):
        if len(parts) % 2 == learnt:
            parts.append([])
        parts[-1].append(text)

    for turn in turns:
        role, content = role_and_content(field, turn)
        add(f"<|{role}|>\n", False)
        if role != "assistant":
            add(content + "\n", False)
            continue
        at = 0
        # In what an assistant says turns of its own and a tool's answers take turns.
        for tool in OUTPUT.finditer(content):
            add(content[at : tool.start()], True)
            add(tool.group(), False)
            at = tool.end()
        last = turn is turns[-1]
        add(content[at:] if last else content[at:] + "\n", True)
    if len(parts) < 2:
        raise ValueError(f"field {field!r}: holds no turn of an assistant")
    texts = ["".join(part) for part in parts]
    size = sum(map(len, texts))
    if len(texts) * size > MOST:
        raise ValueError(
            f"field {field!r}: {size:,} characters in {len(texts):,} turns would take hours; "
            f"cut the chat into several"
        )
    return texts


def role_and_content(field, turn):
    """Who says what, as the known data sets name it. Raises ValueError."""
    role = as_text(turn.get("role", turn.get("from")))
    content = as_text(turn.get("content", turn.get("value")))
    if not isinstance(role, str) or not isinstance(content, str):
        got = ", ".join(map(repr, turn)) or "nothing"
        raise ValueError(
            f"field {field!r}: got a turn with {got}, wanted strings role and content, or from "
            f"and value"
        )
    content.encode()  # a lone surrogate has no UTF-8
    return ROLES.get(role, role), content
