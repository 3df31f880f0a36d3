"""The model card: README.md of a trained model's folder, with the hub's metadata on top."""

import json
import shlex
from pathlib import Path

CARD = """---
{metadata}
---

# {title}

{method}

| | |
|---|---|
{rows}

Made by the command below{ranks}, with the settings below it.

```
{command}
```

```json
{record}
```

The licence of {licensed} holds for the weights.
"""


def model_card(
    args, record, command, ranks, step, tokens_seen, tokens_selected, val_loss, val_step=None
):
    """The text of the card.

    args: {flag: value} of the stage; record: what args.json holds; command: sys.argv; ranks: how
    many trained it; val_loss: nats per token or None, of the step val_step, where that is known.
    The rest counts what was trained so far.
    """
    inputs = record["inputs"]
    scratch = args["init"] == "scratch"
    k = args.get("k", 1.0)
    score = args.get("score") if k < 1 or record.get("source") else None
    base = f"random weights of seed {args['seed']}" if scratch else args["init"]
    if not scratch and args["revision"]:
        base += f" at revision {args['revision']}"
    share = tokens_selected / max(1, tokens_seen)
    weighs = score is not None and k == 1 and not args.get("k_schedule")
    if val_loss is not None:
        val_loss = f"{val_loss:.4f}"
        if val_step is not None and val_step != step:
            val_loss += f", after step {val_step}"
    rows = {
        "base": base,
        "base, sha256 of its tensors": None if scratch else inputs["init"],
        "training data": args["data"],
        "training data, sha256": inputs["data"],
        "reference, sha256 of its tensors": reference_hash(inputs),
        "k": None if weighs else args.get("k_schedule") or k,
        "score": score,
        "scope": args.get("scope") if score else None,
        "windows ranked together": args.get("rank_windows") if score else None,
        "window": f"{args['seq_len']} tokens",
        "batch": f"{args['batch_size']} windows",
        "steps": f"{step} of {args['steps']}",
        "tokens read": f"{tokens_seen:,}",
        "tokens that carried loss": f"{tokens_selected:,}",
        "validation data": ", ".join(args["val"]) if isinstance(args["val"], list) else args["val"],
        "validation loss, nats per token": val_loss,
        "type of the weights": "float32, as the optimiser held them",
    }
    return CARD.format(
        metadata=metadata(args["init"], score).to_yaml(),
        title=Path(args["out"]).name,
        method=method(
            score,
            weighs,
            args.get("k_schedule") or k,
            share,
            is_masked=bool(inputs.get("loss_mask")),
        ),
        rows="\n".join(
            f"| {name} | {value} |" for name, value in rows.items() if value is not None
        ),
        ranks=f", on {ranks} ranks" if ranks > 1 else "",
        command=shlex.join(["python", Path(command[0]).name, *command[1:]]),
        record=json.dumps(record, indent=1),
        licensed="the data" if scratch else "the base and of the data",
    )


def metadata(init, score):
    """What the hub reads; a base is named where it is a hub id."""
    from huggingface_hub import ModelCardData  # up to 0.2 s to import

    on_hub = init != "scratch" and not Path(init).exists()
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=init if on_hub else None,
        tags=["selective-language-modeling"] if score else None,
    )


def method(score, weighs, k, share, is_masked=False):
    """One sentence on the loss. k: as it was asked for; share: what was kept of what was read.

    is_masked: some tokens, as of prompts, may be no targets.
    """
    if score is None and is_masked:
        return (
            f"Causal language modelling: the loss was taken on every token that may be a target, "
            f"{share:.0%} of those that were read."
        )
    if score is None:
        return "Plain causal language modelling: the loss was taken on every token."
    if weighs:
        return (
            f"Every token was read; the loss of each was weighed, or kept or not, by `{score}` "
            f"(methods.py)."
        )
    return (
        "Selective Language Modeling (Rho-1, arXiv:2404.07965): every token was read, the loss was "
        f"taken on {share:.0%} of them, chosen by the score `{score}` with k = {k}."
    )


def reference_hash(inputs):
    """The reference's hash among a run's inputs, or None."""
    for name, sha in inputs.items():
        if name.startswith("ref_"):
            return sha
    return None
