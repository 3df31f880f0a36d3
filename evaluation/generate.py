"""Batched greedy generation: a queue of prompts in, texts out, exactly what one prompt at a time would give.

    for key, output in generate(model, tokenizer, prompts, max_new_tokens=256, stop=stop_strings(["\\n\\nQuestion:"])):
        print(prompts[key], output.text)

Three things make it fast. Tokens that all prompts begin with (few-shot examples) are computed, stored and read once for
all rows (`Cache.prefix`). A row that ends makes room for the next prompt, so the batch stays full. And the memory is
counted in tokens: many short rows or few long ones, whatever `batch_tokens` holds.
"""

import re
from collections import deque
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F

from common.errors import UserError
from model import Cache

PREFILL_TOKENS = 4096  # of prompts that are read in one forward pass, padding included
STEP = 64  # slots that the rows of the cache grow by
MIN_SHARED = 16  # a shorter common prefix is not worth a cache of its own


@dataclass
class Output:
    """What one prompt gave. `text`: up to the stop, which is cut off; `ids`: all generated ids, those of the stop and
    EOS included; `reason`: "eos", "stop", "length" (`max_new_tokens`) or "context" (the model's own limit)."""

    text: str
    ids: list
    reason: str


@dataclass
class Row:
    """A prompt on its way: `ids` are the prompt and what was generated after it, `n_prompt` of them the prompt."""

    key: object
    ids: list
    n_prompt: int
    stream: object
    text: str = ""
    reason: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# prompts and stops


def encode_prompt(tokenizer, text):
    """The ids of a whole prompt as transformers gives them: special tokens parsed, BOS in front where the tokenizer
    adds one. Raises UserError where there are none."""
    ids = ([tokenizer.bos_id] if tokenizer.add_bos else []) + tokenizer.encode(
        text, specials=True
    ).tolist()
    if not ids:
        raise UserError(
            "prompt: got an empty one, wanted at least one token; this model adds no BOS by itself"
        )
    return ids


def common_prefix(prompts):
    """How many ids all prompts begin with, at least one id of each left over; 0 where it would not pay. Ids are
    compared, not text: a text may be cut in the middle of a token."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in dictionary order: what these two share, all share
    n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last)))
    n = min(n, min(map(len, prompts)) - 1)
    return n if n >= MIN_SHARED else 0


def stop_strings(strings):
    """A stop condition: text ends where the first of `strings` begins, also if it is spread over several tokens.

    A stop condition is called with the text so far and with the number of characters that are new in it, and returns
    where to cut the text, or None."""
    pattern, longest = (
        re.compile("|".join(map(re.escape, strings))),
        max(map(len, strings), default=0),
    )

    def stop(text, new):
        match = pattern.search(text, max(0, len(text) - new - longest + 1)) if strings else None
        return match and match.start()

    return stop


def end_ids(model, tokenizer, more=()):
    """The ids that end a text: the tokenizer's EOS, config.json's, and `more`."""
    ids = model.config.eos_token_id
    return {tokenizer.eos_id, *(ids if isinstance(ids, list) else [ids]), *more} - {None}


# ---------------------------------------------------------------------------------------------------------------------
# the loop


class Decoder:
    """Greedy decoding of a changing batch. `add` prompts at any time, call `step` while `busy`.

    prefix: ids that every prompt begins with; they are computed once, here. stop: see `stop_strings`. batch_tokens:
    slots in the cache, rows times the longest row (a single longer row is still taken). compiled: torch.compile the
    one-token step.
    """

    def __init__(
        self,
        model,
        tokenizer,
        max_new_tokens,
        stop=None,
        eos=(),
        prefix=(),
        batch_tokens=16384,
        compiled=False,
    ):
        self.model, self.tokenizer, self.stop, self.max_new_tokens = (
            model,
            tokenizer,
            stop,
            max_new_tokens,
        )
        self.batch_tokens, self.context = batch_tokens, model.config.max_position_embeddings
        self.eos = end_ids(model, tokenizer, eos)
        self.device, self.dtype = model.head_weight.device, model.head_weight.dtype
        self.queue, self.rows, self.finished = deque(), [], []
        self.decode = torch.compile(self.next_ids, dynamic=True) if compiled else self.next_ids
        self.prefix, self.n_prefix = None, len(prefix)
        with torch.inference_mode():
            if prefix:
                self.prefix = self.new_cache(1, len(prefix), None)
                model(torch.tensor([list(prefix)], device=self.device), self.prefix)
            self.cache = self.new_cache(0, 0, self.prefix)

    def new_cache(self, rows, length, prefix):
        return Cache(self.model.config, rows, length, self.device, self.dtype, prefix)

    @property
    def busy(self):
        return bool(self.queue or self.rows or self.finished)

    def add(self, key, ids):
        """Queue a prompt (ids, the prefix included); `key` comes back with its output."""
        assert len(ids) > self.n_prefix, (len(ids), self.n_prefix)
        stream = self.tokenizer.stream()
        for i in ids[-4:]:  # text in the middle of a document: no leading space is dropped
            stream.push(i)
        row = Row(key, list(ids), len(ids), stream)
        if len(ids) >= self.context:
            row.reason = "context"
            self.finished.append(row)
        else:
            self.queue.append(row)

    @torch.inference_mode()
    def step(self):
        """Admit what fits, generate one token for every row, and return [(key, Output)] of the rows that ended."""
        while self.queue and self.admit():
            pass
        if self.rows:
            self.make_room()
            ids = torch.tensor([row.ids[-1:] for row in self.rows], device=self.device)
            self.accept(self.rows, self.decode(ids, self.cache))
        ended, self.finished = self.finished, []
        return [(row.key, Output(row.text, row.ids[row.n_prompt :], row.reason)) for row in ended]

    def next_ids(self, ids, cache, tail=None):
        """The greedy next id of each row, (B,), after `ids` (B, T), of which `tail` (B,) are real."""
        hidden = self.model(ids, cache, tail)
        last = (
            hidden[:, -1]
            if tail is None
            else hidden[torch.arange(len(ids), device=ids.device), tail - 1]
        )
        return F.linear(last, self.model.head_weight).argmax(-1)

    def own(self, row):
        """Tokens of a row that stand in its own slots, once its newest one is in."""
        return len(row.ids) - self.n_prefix

    # ---- room in the cache

    def admit(self):
        """Take the next prompts of the queue into the batch, in one forward pass. False where there is no room yet."""
        length = round_up(
            max([self.own(self.queue[0]) + STEP, *(self.own(row) for row in self.rows)]), STEP
        )
        room = max(self.batch_tokens // length - len(self.rows), not self.rows)
        if room < min(
            len(self.queue), max(1, len(self.rows) // 8)
        ):  # a pass for a few rows costs as much as for many
            return False
        rows = [self.queue.popleft()]
        while (
            self.queue
            and len(rows) < room
            and self.own(self.queue[0]) + STEP <= length
            and (len(rows) + 1) * max(map(self.own, [*rows, self.queue[0]])) <= PREFILL_TOKENS
        ):
            rows.append(self.queue.popleft())
        n, k = len(self.rows), len(rows)
        if (
            n + k > len(self.cache.lengths)
            or not length <= self.cache.keys[0].shape[2] <= 2 * length
        ):
            self.resize(
                max(n + k, min(self.batch_tokens // length, n + k + len(self.queue))), length
            )
        tail = torch.tensor([self.own(row) for row in rows], device=self.device)
        T = int(tail.max())
        ids = torch.tensor(
            [row.ids[self.n_prefix :] + [0] * (T - self.own(row)) for row in rows],
            device=self.device,
        )
        fresh = self.new_cache(k, T, self.prefix)
        ids = self.next_ids(ids, fresh, tail)
        for mine, new in zip(self.cache.keys + self.cache.values, fresh.keys + fresh.values):
            mine[n : n + k, :, :T] = new
        self.cache.lengths[n : n + k] = tail
        self.rows += rows
        self.accept(rows, ids)
        return True

    def make_room(self):
        """A slot for one more token in each row. Where `batch_tokens` is exceeded, the last rows wait in the queue and
        are computed again later."""
        longest = max(map(self.own, self.rows))
        if longest > self.cache.keys[0].shape[2]:
            length = round_up(longest, STEP)
            limit = max(1, self.batch_tokens // length)
            self.queue.extendleft(reversed(self.rows[limit:]))
            del self.rows[limit:]
            self.resize(limit if self.queue else len(self.rows), length)
        self.cache.used = max(map(self.own, self.rows)) - 1

    def resize(self, rows, length):
        """Another shape for the cache; what the running rows hold is kept. Layer by layer, for the memory's sake."""
        new, n = self.new_cache(rows, 0, self.prefix), len(self.rows)
        shape = (rows, new.keys[0].shape[1], length, new.keys[0].shape[3])
        for mine, old in ((new.keys, self.cache.keys), (new.values, self.cache.values)):
            for layer, part in enumerate(old):
                mine[layer], old[layer] = part.new_zeros(shape), None
                mine[layer][:n, :, : part.shape[2]] = part[:n, :, :length]
        new.lengths[:n] = self.cache.lengths[:n]
        self.cache = new

    # ---- new tokens

    def accept(self, rows, ids):
        """Append one id to each row; rows that end by it leave the batch, and the last row moves into their place."""
        for row, i in zip(rows, ids.tolist()):
            row.ids.append(i)
            new = "" if i in self.eos else row.stream.push(i)
            row.text += new
            n_new = len(row.ids) - row.n_prompt
            row.reason = (
                "eos"
                if i in self.eos
                else "length"
                if n_new >= self.max_new_tokens
                else "context"
                if len(row.ids) >= self.context
                else ""
            )
            if row.reason:
                rest = row.stream.flush()
                row.text, new = row.text + rest, new + rest
            cut = self.stop(row.text, len(new)) if self.stop and new else None
            if cut is not None:
                row.text, row.reason = row.text[:cut], "stop"
        for b in reversed(range(len(self.rows))):
            if self.rows[b].reason:
                self.finished.append(self.rows[b])
                self.rows[b], last = self.rows[-1], len(self.rows) - 1
                del self.rows[-1]
                if b < last:
                    for part in (*self.cache.keys, *self.cache.values, self.cache.lengths):
                        part[b] = part[last]


def round_up(n, step):
    return -(-n // step) * step


def generate(model, tokenizer, prompts, max_new_tokens, share_prefix=True, **options):
    """Yields (i, Output) for a list of prompts (lists of ids, see `encode_prompt`) as they end; options: Decoder's."""
    n = common_prefix(prompts) if share_prefix else 0
    decoder = Decoder(
        model, tokenizer, max_new_tokens, prefix=prompts[0][:n] if n else (), **options
    )
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        decoder.add(i, prompts[i])
    while decoder.busy:
        yield from decoder.step()
