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


def model_card(args, record, command, ranks, step, tokens_seen, tokens_selected, val_loss):
    """The text of the card.

    args: {flag: value} of the stage; record: what args.json holds; command: sys.argv; ranks: how
    many trained it; val_loss: nats per token or None. The rest counts what was trained so far.
    """
    inputs = record["inputs"]
    scratch = args["init"] == "scratch"
    k = args.get("k", 1.0)
    base = "random weights" if scratch else args["init"]
    if not scratch and args["revision"]:
        base += f" at revision {args['revision']}"
    rows = {
        "base": base,
        "base, sha256 of its tensors": inputs["init"],
        "training data": args["data"],
        "training data, sha256": inputs["data"],
        "reference, sha256 of its tensors": reference_hash(inputs),
        "k": k,
        "score": args.get("score") if k < 1 else None,
        "scope": args.get("scope") if k < 1 else None,
        "windows ranked together": args.get("rank_windows") if k < 1 else None,
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
        metadata=metadata(args["init"], k).to_yaml(),
        title=Path(args["out"]).name,
        method=method(k, args.get("score")),
        rows="\n".join(
            f"| {name} | {value} |" for name, value in rows.items() if value is not None
        ),
        ranks=f", on {ranks} ranks" if ranks > 1 else "",
        command=shlex.join(["python", Path(command[0]).name, *command[1:]]),
        record=json.dumps(record, indent=1),
        licensed="the data" if scratch else "the base and of the data",
    )


def metadata(init, k):
    """What the hub reads; a base is named where it is a hub id."""
    from huggingface_hub import ModelCardData  # up to 0.2 s to import

    on_hub = init != "scratch" and not Path(init).exists()
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=init if on_hub else None,
        tags=["selective-language-modeling"] if k < 1 else None,
    )


def method(k, score):
    """One sentence on the loss."""
    if k >= 1:
        return "Plain causal language modelling: the loss was taken on every token."
    return (
        "Selective Language Modeling (Rho-1, arXiv:2404.07965): every token was read, the loss was "
        f"taken on the {k:.0%} of them that the score `{score}` ranks first."
    )


def reference_hash(inputs):
    """The reference's hash among a run's inputs, or None."""
    for name, sha in inputs.items():
        if name.startswith("ref_"):
            return sha
    return None
