"""Batched generation, greedy or sampled: prompts in, texts out, as from one prompt at a time.

    stop = stop_strings(["\\n\\nQuestion:"])
    for key, output in generate(model, tokenizer, prompts, max_new_tokens=256, stop=stop):
        print(prompts[key], output.text)

Three things make it fast. Tokens that all prompts begin with (few-shot examples) are computed,
stored and read once for all rows (`Cache.prefix`). A row that ends makes room for the next prompt,
so the batch stays full. And the memory is counted in tokens: many short rows or few long ones,
whatever `batch_tokens` holds.
"""

import re
from collections import deque
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F

from common.attention import of_many_shapes
from common.compiling import whole_graphs
from common.errors import UserError
from evaluation.sampling import NOT_FINITE, chance, draw, likeliest
from model import Cache

PREFILL_TOKENS = 4096  # of prompts that are read in one forward pass, padding included
STEP = 64  # slots that the rows of the cache grow by
MIN_SHARED = 16  # a shorter common prefix is not worth a cache of its own


@dataclass
class Output:
    """What one prompt gave."""

    text: str  # up to the stop, which is cut off
    ids: list  # all generated ids, those of the stop and EOS included
    reason: str  # "eos", "stop", "length" (max_new_tokens) or "context" (the model's own limit)


@dataclass
class Row:
    """A prompt on its way."""

    key: object
    ids: list  # of the prompt, then of what was generated
    n_prompt: int
    stream: object  # turns generated ids into text
    text: str = ""
    reason: str = ""  # why it ended, "" while it runs


# --------------------------------------------------------------------------------------------------
# prompts and stops


def encode_prompt(tokenizer, text):
    """The ids of a whole prompt as transformers gives them.

    Special tokens are parsed, and BOS stands in front where the tokenizer adds one.
    Raises UserError where there are no ids.
    """
    ids = tokenizer.encode(text, specials=True).tolist()
    if tokenizer.add_bos:
        ids.insert(0, tokenizer.bos_id)
    if not ids:
        raise UserError(
            "prompt: got an empty one, wanted at least one token; this model adds no BOS by itself"
        )
    return ids


def common_prefix(prompts):
    """How many ids all prompts begin with; 0 where sharing them would not pay.

    Of each prompt at least one id is left over. Ids are compared, not text: a text may be cut in
    the middle of a token.
    """
    if len(prompts) < 2:
        return 0
    # What the first and the last in dictionary order share, all share.
    pairs = zip(min(prompts), max(prompts))
    n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    n = min(n, min(map(len, prompts)) - 1)
    return n if n >= MIN_SHARED else 0


def stop_strings(strings):
    """A stop condition: text ends where the first of `strings` begins.

    A stop condition is called with the text so far and with the number of characters that are new
    in it. It returns where to cut the text, or None.
    """
    pattern = re.compile("|".join(map(re.escape, strings)))
    longest = max(map(len, strings), default=0)

    def stop(text, new):
        if not strings:
            return None
        begin = len(text) - new - longest + 1  # a stop may be spread over several tokens
        match = pattern.search(text, max(0, begin))
        return match and match.start()

    return stop


def end_ids(model, tokenizer, more=()):
    """The ids that end a text: the tokenizer's EOS, config.json's, and `more`."""
    ids = model.config.eos_token_id
    if not isinstance(ids, list):
        ids = [ids]
    return {tokenizer.eos_id, *ids, *more} - {None}


# --------------------------------------------------------------------------------------------------
# the loop


class Decoder:
    """Decoding of a changing batch. `add` prompts at any time, call `step` while `busy`.

    stop: see `stop_strings`. eos: more ids that end a text.
    prefix: ids that every prompt begins with; they are computed once, here.
    batch_tokens: slots in the cache, rows times the longest row. A single longer row is taken.
    compiled: torch.compile the one-token step.
    temperature: 0 is greedy; else ids are drawn by numbers that follow from `seed`, the row's key
    (its repr) and the place in the text alone.
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
        temperature=0.0,
        seed=0,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.stop = stop
        self.eos = end_ids(model, tokenizer, eos)
        self.batch_tokens = batch_tokens
        self.temperature = temperature
        self.seed = seed
        self.context = model.config.max_position_embeddings
        self.device = model.head_weight.device
        self.dtype = model.head_weight.dtype
        self.decode = self.next_ids
        if compiled:
            self.decode = whole_graphs(self.next_ids, dynamic=True)

        self.queue = deque()  # rows that wait
        self.rows = []  # rows in the batch; row b's keys and values are the cache's row b
        self.finished = []  # rows that ended and were not handed out yet

        self.prefix_ids = list(prefix)
        self.prefix = None
        with torch.inference_mode():
            if prefix:
                self.prefix = self.new_cache(1, len(prefix), None)
                with of_many_shapes():
                    model(torch.tensor([self.prefix_ids], device=self.device), self.prefix)
            self.cache = self.new_cache(0, 0, self.prefix)

    def new_cache(self, rows, slots, prefix):
        return Cache(self.model.config, rows, slots, self.device, self.dtype, prefix)

    @property
    def busy(self):
        return bool(self.queue or self.rows or self.finished)

    def add(self, key, ids):
        """Queue a prompt (ids, the prefix included); `key` comes back with its output."""
        n = len(self.prefix_ids)
        assert len(ids) > n and list(ids[:n]) == self.prefix_ids, "no prompt with the prefix"
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
        """Admit what fits, then generate one token for every row.

        Returns [(key, Output)] of the rows that ended.
        """
        self.admit()
        if self.rows:
            self.make_room()
            ids = torch.tensor([row.ids[-1:] for row in self.rows], device=self.device)
            new = self.decode(ids, self.cache, chances=self.chances(self.rows))
            self.accept(self.rows, new)
        ended = self.finished
        self.finished = []
        return [(row.key, Output(row.text, row.ids[row.n_prompt :], row.reason)) for row in ended]

    def chances(self, rows):
        """The numbers that the rows' next ids are drawn by, (B,) fp64; None where greedy."""
        if self.temperature == 0:
            return None
        numbers = [chance(self.seed, row.key, len(row.ids)) for row in rows]
        return torch.tensor(numbers, dtype=torch.float64, device=self.device)

    def next_ids(self, ids, cache, tail=None, chances=None):
        """The next id of each row, (B,): the likeliest, or drawn by its number in `chances`.

        ids: (B, T), of which the first `tail` (B,) are real; None: all of them.
        """
        hidden = self.model(ids, cache, tail)  # (B, T, d)
        if tail is None:
            last = hidden[:, -1]
        else:
            last = hidden[torch.arange(len(ids), device=ids.device), tail - 1]
        logits = F.linear(last, self.model.head_weight)
        if chances is None:
            return likeliest(logits)
        return draw(logits, self.temperature, chances)

    def own(self, row):
        """Tokens of a row in its own slots, once its newest one is in: all but the prefix's."""
        return len(row.ids) - len(self.prefix_ids)

    # ---- prompts enter

    def admit(self):
        """Read waiting prompts, many in one forward pass, until there is no room."""
        while self.queue:
            longest = max([self.own(self.queue[0]) + STEP, *map(self.own, self.rows)])
            slots = round_up(longest, STEP)
            room = self.batch_tokens // slots - len(self.rows)
            if not self.rows:
                room = max(room, 1)
            # A pass for a few rows costs as much as for many, so it waits until an eighth is free.
            worth = max(1, len(self.rows) // 8)
            if room < min(len(self.queue), worth):
                return
            self.prefill(self.take(room, slots), slots)

    def take(self, room, slots):
        """The next rows of the queue, at least one, that fit into one forward pass."""
        rows = [self.queue.popleft()]
        longest = self.own(rows[0])
        while self.queue and len(rows) < room:
            n = self.own(self.queue[0])
            longest = max(longest, n)
            padded = (len(rows) + 1) * longest
            if n + STEP > slots or padded > PREFILL_TOKENS:
                break
            rows.append(self.queue.popleft())
        return rows

    def prefill(self, rows, slots):
        """Read the prompts of `rows` into the cache, and generate their first tokens."""
        n, n_new = len(self.rows), len(rows)
        needed = n + n_new
        now = self.cache.keys[0].shape[2]
        if needed > len(self.cache.lengths) or not slots <= now <= 2 * slots:
            wanted = min(self.batch_tokens // slots, needed + len(self.queue))
            self.resize(max(needed, wanted), slots)

        tail = torch.tensor([self.own(row) for row in rows], device=self.device)
        T = int(tail.max())
        padded = [row.ids[len(self.prefix_ids) :] + [0] * (T - self.own(row)) for row in rows]
        fresh = self.new_cache(n_new, T, self.prefix)
        ids = torch.tensor(padded, device=self.device)
        with of_many_shapes():
            first = self.next_ids(ids, fresh, tail, self.chances(rows))
        for mine, new in zip(self.cache.keys + self.cache.values, fresh.keys + fresh.values):
            mine[n:needed, :, :T] = new
        self.cache.lengths[n:needed] = tail
        self.rows += rows
        self.accept(rows, first)

    # ---- room in the cache

    def make_room(self):
        """A slot for one more token in each row.

        Where `batch_tokens` is exceeded, the last rows go back to the front of the queue and are
        computed again later.
        """
        longest = max(map(self.own, self.rows))
        # Never filled to the last slot: that would be a graph of its own (`compiled`).
        if longest >= self.cache.keys[0].shape[2]:
            slots = round_up(longest + 1, STEP)
            limit = max(1, self.batch_tokens // slots)
            self.queue.extendleft(reversed(self.rows[limit:]))
            del self.rows[limit:]
            self.resize(limit if self.queue else len(self.rows), slots)
        self.cache.used = max(map(self.own, self.rows)) - 1

    def resize(self, rows, slots):
        """Another shape for the cache; what the running rows hold is kept.

        Layer by layer, each old one freed at once: two whole caches may not fit.
        """
        n = len(self.rows)
        new = self.new_cache(rows, 0, self.prefix)
        _, heads, _, width = new.keys[0].shape
        for mine, old in ((new.keys, self.cache.keys), (new.values, self.cache.values)):
            for layer, part in enumerate(old):
                old[layer] = None
                mine[layer] = part.new_zeros(rows, heads, slots, width)
                mine[layer][:n, :, : part.shape[2]] = part[:n, :, :slots]
        new.lengths[:n] = self.cache.lengths[:n]
        self.cache = new

    # ---- new tokens

    def accept(self, rows, ids):
        """Append one id to each row; rows that end by it leave the batch.

        Raises UserError where the model's logits are not finite.
        """
        for row, i in zip(rows, ids.tolist()):
            if i == NOT_FINITE:
                raise UserError(
                    "model: its logits are not finite; look at its weights, or try --dtype float32"
                )
            self.append(row, i)
        for b in reversed(range(len(self.rows))):
            if self.rows[b].reason:
                self.finished.append(self.rows[b])
                self.remove(b)

    def append(self, row, i):
        """Append an id and its text to a row; `row.reason` says whether it ends by it."""
        row.ids.append(i)
        new = "" if i in self.eos else row.stream.push(i)
        row.reason = self.end_of(row)
        if row.reason:
            new += row.stream.flush()
        row.text += new
        if self.stop and new:
            cut = self.stop(row.text, len(new))
            if cut is not None:
                row.text = row.text[:cut]
                row.reason = "stop"

    def end_of(self, row):
        """Why a row ends with its newest id, "" if it goes on."""
        if row.ids[-1] in self.eos:
            return "eos"
        if len(row.ids) - row.n_prompt >= self.max_new_tokens:
            return "length"
        if len(row.ids) >= self.context:
            return "context"
        return ""

    def remove(self, b):
        """Take row b out of the batch; the last row moves into its place."""
        last = len(self.rows) - 1
        self.rows[b] = self.rows[last]
        del self.rows[last]
        if b < last:
            for part in (*self.cache.keys, *self.cache.values, self.cache.lengths):
                part[b] = part[last]


def round_up(n, step):
    return -(-n // step) * step


def generate(model, tokenizer, prompts, max_new_tokens, share_prefix=True, **options):
    """Yields (i, Output) for a list of prompts as they end.

    prompts: lists of ids, see `encode_prompt`. options: Decoder's.
    """
    n = common_prefix(prompts) if share_prefix else 0
    prefix = prompts[0][:n] if n else ()
    decoder = Decoder(model, tokenizer, max_new_tokens, prefix=prefix, **options)
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        decoder.add(i, prompts[i])
    while decoder.busy:
        yield from decoder.step()
