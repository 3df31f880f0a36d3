"""train_slm.py's flags of the method: what they are, and what they mean together."""

import argparse
import inspect
import math

import methods  # noqa: F401  more scores, by name
import slm
from common.command_line import SHOWN, share, whole
from common.errors import UserError
from training.loss import BACKWARD

K = 0.6  # where --k says nothing, and the method has one


def add_method(parser):
    """Add the flags that train_slm.py has and train_ref.py has not."""
    add = parser.add_argument_group("selection").add_argument
    add(
        "--k",
        type=share_or_schedule,
        help=f"share of the tokens that is kept (default {K}); 1.0:0.6@0.3: 1.0 for the first "
        f"30 %% of the steps, then 0.6",
    )
    add("--score", default="excess", choices=[*slm.SCORES], help="what tokens are ranked by")
    add("--set", action="append", metavar="NAME=VALUE", help="a number of the score's function")
    add("--scope", choices=slm.SCOPES, help="what they are ranked within; default: the score's own")
    add(
        "--rank-windows",
        type=whole(1),
        help="micro: windows ranked together; default: those of a forward pass",
    )
    add(
        "--backward",
        default="exact",
        choices=BACKWARD,
        help="pruned is approximate (training/pruned.py)",
    )
    add = parser.add_argument_group("what it reads").add_argument
    add("--ref-loss", metavar="FILE", help="the reference's stored losses, from score.py")
    add("--base-loss", metavar="FILE", help="those of the model that --init names")
    add("--short-loss", metavar="FILE", help="with a short context, from score.py --context")
    add(
        "--stored",
        action="append",
        metavar="NAME=FILE",
        help="an array of the corpus' length, a score's t.NAME",
    )


def share_or_schedule(text):
    """An argument type: a share, a float; or a schedule, a str, one for all that mean the same."""
    if ":" not in text:
        return share(text)
    (_, k), *later = steps_of(text)
    return ":".join([f"{k}", *(f"{k}@{start}" for start, k in later)])


def shortest(number):
    """The shortest text of a number: 2 and not 2.0."""
    text = f"{number:g}"
    return text if float(text) == number else repr(number)


def steps_of(schedule):
    """[(share of the steps, the k from there on)] of a text such as "1.0:0.6@0.3".

    It is a switch and no line: what was published ranks with one k at a time.
    """
    found = []
    for part in schedule.split(":"):
        k, _, start = part.partition("@")
        found.append((share(start) if start else 0.0, share(k)))
    starts = [start for start, _ in found]
    if starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] == 1:
        raise argparse.ArgumentTypeError(
            f"got {schedule[:SHOWN]}, wanted K:K@SHARE with shares of the steps that rise and are "
            f"below 1, such as 1.0:0.6@0.3"
        )
    return found


def drop_what_followed(saved, given):
    """Of an earlier run's arguments, take out what does not go with the flags that are `given`:
    those of its score where `--score` names another, and what another `--scope` cannot have."""
    if given("--scope") not in (None, "micro"):
        saved.pop("rank_windows", None)
    if isinstance(slm.SCORES.get(given("--score") or saved.get("score")), slm.Weight):
        saved.pop("k", None)  # it has none; 1.0 stands there
    if given("--score") in (None, saved.get("score")):
        return
    saved.pop("set", None)
    method = slm.SCORES.get(given("--score"))
    read = [
        text for text in saved.get("stored") or () if named(text) in getattr(method, "needs", ())
    ]
    saved["stored"] = read or None
    before = slm.SCORES.get(saved.get("score"))
    if before and saved.get("scope") == before.scope:
        saved.pop("scope")
    if saved.get("k") in (K, 1.0):  # as where --k says nothing
        saved.pop("k", None)
    scope = given("--scope") or saved.get("scope", getattr(method, "scope", "micro"))
    if scope != "micro":
        saved.pop("rank_windows", None)


def settle_method(args):
    """Fill in what follows from the method, and refuse what does not fit it. Returns `args`."""
    method = slm.SCORES[args.score]
    weight = isinstance(method, slm.Weight)
    args.set, args.stored = by_name(args.set), by_name(args.stored)
    args.k_schedule = None
    if isinstance(args.k, str):
        args.k_schedule = args.k
        args.k = min(k for _, k in steps_of(args.k))  # what is read follows from it
    if weight and args.k is not None:
        raise UserError(
            f"--k: got {args.k_schedule or args.k} with --score {args.score}, which weighs each "
            f"token and has no k; leave it out, or for plain training give --score excess --k 1.0"
        )
    if args.k is None:
        args.k = 1.0 if weight else K
    args.scope = args.scope or method.scope
    if args.scope == "set" and (weight or not method.static):
        fixed = [name for name, other in slm.SCORES.items() if other.static]
        raise UserError(
            f"--scope set: --score {args.score} looks at the student, wanted one that is the same "
            f"throughout: {', '.join(fixed)}"
        )
    args.set = set_to(method, settings_of(args))
    refuse_what_does_nothing(args, method)
    return args


def named(text):
    """The NAME of NAME=VALUE."""
    return text.partition("=")[0]


def by_name(texts):
    """NAME=VALUE texts in the order of their names, the last one of each; None for none."""
    latest = {named(text): text for text in texts or ()}
    return [latest[name] for name in sorted(latest)] or None


def refuse_what_does_nothing(args, method):
    """Raises UserError for flags, and parts of a method, that would be ignored in silence.

    Losses that the score does not read are let pass: so one command serves every `--score`.
    """
    for name in set(arrays_of(args)).difference(method.needs):
        raise UserError(
            f"--stored: got {name}, which --score {args.score} does not read: "
            f'needs=(..., "{name}") in its slm.Score says so'
        )
    if bool(method.remember) != ("memory" in method.needs):
        got = "remembers, and does not need" if method.remember else "needs, and does not remember,"
        raise UserError(
            f"--score {args.score}: {got} t.memory; wanted both: "
            f'slm.Score(..., needs=(..., "memory"), remember=function)'
        )
    selection = slm.Selection(args.k, args.score, args.scope)
    told_late = selection.counted == "losses" and args.scope != "batch"
    if args.backward == "pruned" and (isinstance(method, slm.Weight) or told_late):
        raise UserError(
            f"--backward pruned: got it with --score {args.score}, of which no number of kept "
            f"tokens is known before the losses; wanted --backward exact"
        )
    if method.remember and args.k_schedule and any(k == 1 for _, k in steps_of(args.k_schedule)):
        raise UserError(
            f"--k: got {args.k_schedule} with --score {args.score}, which remembers what it has "
            f"seen, and while k is 1 sees nothing; wanted shares below 1"
        )


def refuse_ranking(args):
    """Raises UserError where `--rank-windows` does not divide what is ranked; call it settled."""
    together = args.rank_windows
    fits = together is None or (args.scope == "micro" and args.micro_batch_size % together == 0)
    if not fits and slm.Selection(args.k, args.score, args.scope).method:
        raise UserError(
            f"--rank-windows: got {together} with --scope {args.scope} and --micro-batch-size "
            f"{args.micro_batch_size}, wanted --scope micro and a divisor of the micro-batch"
        )


def settings_of(args):
    """{name: value} of --set. Raises UserError for what none of the score's functions takes."""
    defaults = defaults_of(slm.SCORES[args.score])
    found = {}
    for text in args.set or ():
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UserError(f"--set: got {text[:SHOWN]}, wanted NAME=NUMBER") from None
        if not math.isfinite(found[name]):
            raise UserError(f"--set: got {text[:SHOWN]}, wanted a finite number")
        if name not in defaults:
            known = f"wanted one of {', '.join(defaults)}" if defaults else "which takes none"
            raise UserError(f"--set: got {text[:SHOWN]} with --score {args.score}, {known}")
        whole = any(type(default) is int for default in defaults[name])
        if whole and found[name] == int(found[name]):
            found[name] = int(found[name])
    return found


def set_to(method, settings):
    """`--set` as it is noted: NAME=VALUE texts of what is not the default; None for none."""
    defaults = defaults_of(method)
    changed = {}
    for name, value in settings.items():
        if any(default != value for default in defaults.get(name, [None])):
            changed[name] = value
    return [f"{name}={shortest(value)}" for name, value in sorted(changed.items())] or None


def defaults_of(method):
    """{name: its defaults, of each function that takes it} of what can be set of a method."""
    found = {}
    own = {method.function: 1, method.choose: 4, method.remember: 1}  # what the kit passes
    for function, n_own in own.items():
        try:
            parameters = inspect.signature(function).parameters if function else {}
        except ValueError:  # of a function of PyTorch's own nobody can tell
            continue
        for name, parameter in [*parameters.items()][n_own:]:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(name, []).append(parameter.default)
    return found


def arrays_of(args):
    """{name: file} of --stored. Raises UserError."""
    found = {}
    for text in args.stored or ():
        name, _, path = text.partition("=")
        if not name.isidentifier() or not path:
            raise UserError(f"--stored: got {text[:SHOWN]}, wanted NAME=FILE, a score's t.NAME")
        if name in (*slm.known(), "valid", "together") or name in found:
            raise UserError(f"--stored: got {text[:SHOWN]}, but t.{name} is something else already")
        found[name] = path
    return found


def selection_of(args):
    """The slm.Selection that the flags mean, with the smallest k of a schedule."""
    settings = tuple(sorted(settings_of(args).items()))
    return slm.Selection(args.k, args.score, args.scope, args.rank_windows, settings)


def k_at(step, args):
    """The k of step 0, 1, ..."""
    if not args.k_schedule:
        return args.k
    # A product such as .07 * 100 is a little above 7.
    passed = [k for start, k in steps_of(args.k_schedule) if step >= start * args.steps - 1e-6]
    return passed[-1]
