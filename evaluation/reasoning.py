"""The two ways in which a model answers: chain of thought, and reasoning with tools (section 3).

    for i, reply in chain_of_thought(decoder, {0: ids}): ...
    for i, reply in with_tools(decoder, {0: "How many ...?"}, encode): ...

With tools, a call of the model ends with a code block. Its program is run, the output appended, and
the model goes on, for MAX_CALLS calls at most. Programs run beside the decoding.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from evaluation.sandbox import Result, Sandbox

MAX_CALLS = 4  # of the model, per problem
FAILED = re.compile(r"error|exception|no algorithms|cannot|nan|\.\.\.", re.IGNORECASE)
SHOWN = 200  # characters from each end of a long output


@dataclass
class Reply:
    """What was written about one problem, why it ended, and how many tokens were generated.

    finish_reason: that of the last call (generate.Output), or "calls": there were too many.
    """

    text: str
    finish_reason: str
    tokens: int


def chain_of_thought(decoder, prompts):
    """Yields (i, Reply) of `prompts` {i: ids} as they end."""
    for i, ids in prompts.items():
        decoder.add(i, ids)
    while decoder.busy:
        for i, output in decoder.step():
            yield i, Reply(output.text.strip(), output.reason, len(output.ids))


@dataclass
class Conversation:
    """What a model and the interpreter wrote so far about one problem."""

    prompt: str
    text: str = ""
    calls: int = 0  # of the model
    tokens: int = 0  # that it generated

    def hear_model(self, output):
        """Add a call's text. True where its program is to be run, False where it has answered."""
        new = output.text.rstrip()
        self.text += new
        self.calls += 1
        self.tokens += len(output.ids)
        return new.endswith("```") and "boxed" not in new

    def hear_interpreter(self, result):
        """Add a program's output. True where the model may be called again."""
        self.text += f"\n```output\n{result_text(result)}\n```\n"
        if self.calls < MAX_CALLS:
            return True
        self.text += "\nReach max function call limit."
        return False


def with_tools(decoder, prompts, encode, strict=False):
    """Yields (i, Reply) of `prompts` {i: text} as they end.

    encode: text -> ids of a whole prompt. strict: see Sandbox.
    """
    workers = min(8, os.cpu_count() or 1)
    talks = {i: Conversation(prompt) for i, prompt in prompts.items()}
    running = {}  # {future of a program: i}
    with Sandbox(workers, strict=strict) as sandbox, ThreadPoolExecutor(workers) as pool:
        for i, prompt in prompts.items():
            decoder.add(i, encode(prompt))
        while decoder.busy or running:
            # With nothing to decode there is nothing to do but wait for the programs.
            ready = [future for future in running if future.done() or not decoder.busy]
            for future in ready:
                i = running.pop(future)
                talk = talks[i]
                if talk.hear_interpreter(future.result()[0]):
                    decoder.add(i, encode(talk.prompt + talk.text))
                else:
                    yield i, Reply(talk.text, "calls", talk.tokens)
            if not decoder.busy:
                continue
            for i, output in decoder.step():
                talk = talks[i]
                if talk.hear_model(output):
                    running[pool.submit(sandbox.run, [program_of(talk.text)])] = i
                else:
                    yield i, Reply(talk.text.strip(), output.reason, talk.tokens)


# --------------------------------------------------------------------------------------------------
# text -> program, result -> text


def program_of(text: str) -> str:
    """The program to run next, rebuilt from all the text so far (Rho-1's harness).

    Earlier blocks that succeeded come first, without their lines that start with `print(`; of
    earlier blocks that failed only the import lines stay, at the very top; then the latest block.
    "" if there is no block.
    """
    blocks = code_blocks(text)
    if not blocks:
        return ""
    imports, kept = [], []
    for program, output in blocks[:-1]:
        if FAILED.search("\n".join(output)):
            imports += [line for line in program if line.startswith(("import ", "from "))]
        else:
            kept += [line for line in program if not line.startswith("print(")]
    return "\n".join(imports + kept + blocks[-1][0])


def code_blocks(text):
    """[(lines of the program, lines of its output)]"""
    blocks = []
    into = None  # the lines that the next one belongs to
    for line in text.split("\n"):
        if line.startswith("```python"):
            blocks.append(([], []))
            into = blocks[-1][0]
        elif line.startswith("```output") and blocks:
            into = blocks[-1][1]
        elif line.startswith("```"):
            into = None
        elif into is not None:
            into.append(line)
    return blocks


def result_text(result: Result) -> str:
    """What stands in the ```output block: the output, `Done`, or the last line of the error.

    A failed program's output is dropped. Of a long text the beginning and the end are shown.
    """
    if result.status == "ok":
        text = result.stdout.strip() or "Done"
    else:
        text = result.error.strip()
    if len(text) > 2 * SHOWN:
        return text[:SHOWN] + "..." + text[-SHOWN:]
    return text
