"""What a record says: the known formats of published data sets, by their field names, and their text.

A document is a list of texts, taken in turns: not to be learnt, to be learnt, not to be learnt, ... A plain text is a
list of one, to be learnt. A pair is [prompt + newline, response]; a prompt may have two fields. A chat is written as ToRA and Tulu write it,

    <|user|>
    What is 2 + 3?
    <|assistant|>
    It is 5.

and only what the assistant says is to be learnt, of that not what a tool answered: the lines after "```output" up to and
with the closing fence. (The marker "```output" itself is: the model must write it, for there its generation stops.)
"""

import re

JOIN = "\n"  # between prompt and response; it belongs to the prompt
FORMATS = (  # (form, fields), the first that a record has; the data sets that are published so
    ("chat", ("messages",)),  # Tulu-v2, ToRA-style trajectories
    ("chat", ("conversations",)),  # OpenHermes-2.5
    ("chat", ("prompt", "completion")),  # ToRA-style trajectories
    ("pair", ("query", "response")),  # MetaMathQA
    (
        "pair",
        ("instruction", "input", "output"),
    ),  # Alpaca's: the input belongs to the prompt, where there is one
    ("pair", ("instruction", "output")),  # MAmmoTH's MathInstruct
    ("pair", ("question", "answer")),  # GSM8K
    ("text", ("text",)),  # OpenWebMath, SlimPajama
    ("text", ("content",)),
)  # StarCoderData
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
OUTPUT = re.compile(r"(?<=```output\n).*?(?:^```[ \t]*\n?|\Z)", re.S | re.M)


def guess(fields):
    """(form, fields) of a record that has these fields, or None."""
    return next(((form, list(names)) for form, names in FORMATS if set(names) <= set(fields)), None)


def document(form, fields, values):
    """The texts of one record, by turns. Raises ValueError where a value is not what the form wants."""
    if form == "chat":
        turns = (
            values[0]
            if len(fields) == 1
            else [
                {"role": "user", "content": values[0]},
                {"role": "assistant", "content": values[1]},
            ]
        )
        return chat(fields[0], turns)
    values = [value.decode() if isinstance(value, bytes) else value for value in values]
    for field, value in zip(fields, values):
        if not isinstance(value, str):
            raise ValueError(f"field {field!r} is {type(value).__name__}, wanted a string")
        value.encode()  # a lone surrogate has no UTF-8
    *prompt, response = values
    return ["\n".join(filter(str.strip, prompt)) + JOIN, response] if form == "pair" else values


def chat(field, turns):
    texts = [""]  # even places: not to be learnt

    def add(text, learnt):
        if len(texts) % 2 == learnt:
            texts.append("")
        texts[-1] += text

    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field {field!r} is {type(turns).__name__}, wanted a list of turns")
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role, content = (v.decode() if isinstance(v, bytes) else v for v in (role, content))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f"field {field!r}: got a turn with {', '.join(map(repr, turn)) or 'nothing'}, wanted "
                f"strings role and content, or from and value"
            )
        role, at = ROLES.get(role, role), 0
        content.encode()
        add(f"<|{role}|>\n", False)
        if role == "assistant":
            for tool in OUTPUT.finditer(content):
                add(content[at : tool.start()], True)
                add(tool.group(), False)
                at = tool.end()
            add(content[at:] + "\n" if turn is not turns[-1] else content[at:], True)
        else:
            add(content + "\n", False)
    if len(texts) < 2:
        raise ValueError(f"field {field!r}: holds no turn of an assistant")
    return texts
