"""What a score reads of each token beside the student: stored values, documents, noise, memory."""

from pathlib import Path

from common.errors import UserError
from common.numerics import notice, numerics
from data import Stored, beside, score_command
from slm import OWN, STORED, Tokens, known
from training import arrays
from training.documents import Documents
from training.memory import Memory
from training.method_flags import arrays_of
from training.noise import noise

FLAGS = {"ref_entropy": "ref_loss"}  # whose file lies beside that of another flag
WHOSE = {
    "ref_loss": "the reference's losses",
    "base_loss": "the losses of the model that training starts from",
    "short_loss": "losses with a short context",
}


class Columns:
    """The fields of slm.Tokens that a method needs, but the student's.

    `references`: {name of the stored values: hash of the model that they come from, or of an array
    of one's own}. Raises UserError where the method needs values that are missing or do not fit.
    """

    def __init__(self, method, args, data, env):
        self.args = args
        self.data = data
        self.env = env
        self.now = numerics(args, env, args.micro_batch_size)
        self.needs = method.needs if method else ()
        self.stored = {}
        self.references = {}
        files = arrays_of(args)
        for name in self.needs:
            if name in STORED:
                self.stored[name] = self._open(name)
                self.references[name] = arrays.made_with(self.stored[name].meta)
            elif name in files:
                opened = arrays.opened(name, files[name], data, args.seq_len, self.now)
                self.stored[name], self.references[name] = opened
                self._say(files[name], getattr(self.stored[name], "meta", {}))
            elif name not in known():
                raise UserError(
                    f"--score {args.score} needs t.{name}, wanted one of {', '.join(known())}, "
                    f"{OWN.replace('NAME', name)}"
                )
        self.documents = Documents(data) if "document" in self.needs else None
        self.memory = Memory(data, args.seq_len) if "memory" in self.needs else None

    def _open(self, name):
        """Stored losses or entropies. Raises UserError with the command that makes them."""
        args = self.args
        flag = FLAGS.get(name, name)
        path = getattr(args, flag)
        if name == "base_loss" and args.init == "scratch":
            raise UserError(
                f"--score {args.score}: needs {WHOSE[flag]}, and --init scratch is none that can "
                f"be scored; wanted a model's folder or hub id"
            )
        if name == "short_loss" and args.seq_len < 3:
            raise UserError(
                f"--seq-len: got {args.seq_len} with --score {args.score}, wanted at least 3: a "
                f"context of two tokens has to be shorter than the window"
            )
        if not path:
            raise UserError(
                f"--{flag.replace('_', '-')}: --score {args.score} needs {WHOSE[flag]}; make them "
                f"with {self.command(name)}"
            )
        if arrays.is_array(path):
            raise UserError(
                f"--{flag.replace('_', '-')} {path}: is an array of arrays.save, wanted a file of "
                f"score.py; an array of your own is --stored NAME={path}, a score's t.NAME"
            )
        now = self.now
        wanted = self._wanted(name)
        entropy = name == "ref_entropy"
        stored = Stored(path, self.data, args.seq_len, entropy, now, wanted)
        if bool(stored.meta["context"]) != bool(wanted["context"]):
            got = stored.meta["context"]
            raise UserError(
                f"--{flag.replace('_', '-')} {path}: was scored with "
                f"{f'{got} tokens of context' if got else 'the whole window as context'}, --score "
                f"{args.score} needs {WHOSE[flag]}; name another file"
            )
        self._say(path, stored.meta)
        return stored

    def _say(self, path, meta):
        """Print where stored losses were computed in another way than the student's."""
        said = notice(path, meta, self.now)
        if said and self.env.main:
            print(said)

    def command(self, name):
        """How stored values are made, for a message."""
        file = Path(f"{FLAGS.get(name, name)}.bin")
        if file.exists():  # another model's
            file = beside(file)
        entropy = " --entropy" if name == "ref_entropy" else ""
        made = score_command(file, self.data, self.args.seq_len, self.now, self._wanted(name))
        return f"{made}{entropy}"

    def _wanted(self, name):
        """What stored values have to be made with."""
        models = {"base_loss": self.args.init, "short_loss": "MODEL"}
        short = max(2, self.args.seq_len // 8 * 2)
        context = short if name == "short_loss" else None
        revision = self.args.revision if name == "base_loss" else None
        return {"model": models.get(name), "revision": revision, "context": context}

    def tokens(self, step, windows, valid):
        """slm.Tokens of the windows' targets, before the forward pass; `valid` (B, T), numpy."""
        tokens = Tokens()
        for name, values in self.stored.items():
            setattr(tokens, name, self.env.tensor(values.batch(windows, valid)))
        if "noise" in self.needs:
            drawn = noise(self.args.seed, step, windows, self.args.seq_len)
            tokens.noise = self.env.tensor(drawn)
        if self.memory:
            tokens.memory = self.env.tensor(self.memory.batch(windows))
        if self.documents:
            tokens.document = self.env.tensor(self.documents.of(windows, self.args.seq_len))
        return tokens
