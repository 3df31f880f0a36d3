"""AdamW, the learning-rate schedule, clipping, and what a token costs."""

import math

import torch
from torch.optim.adamw import adamw

from common.errors import UserError
from common.numerics import is_compiled
from training.moments import MOMENTS, refuse_missing


class LightAdamW(torch.optim.AdamW):
    """AdamW whose two moments rest in bfloat16 between steps: 4 bytes a parameter instead of 8.

    The arithmetic is torch's own, in fp32, one parameter at a time; only what is kept is rounded.
    Rounding to the nearest would lose updates of the second moment that are smaller than 1/512 of
    it, as with beta2 = 0.999; not so with 0.95.
    """

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p, group):
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(p)
        first, second = (state[name].float() for name in MOMENTS)
        beta1, beta2 = group["betas"]
        adamw(
            [p],
            [p.grad],
            [first],
            [second],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=False,
        )
        state["exp_avg"] = first.bfloat16()
        state["exp_avg_sq"] = second.bfloat16()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)  # makes them the parameters' dtype
        for state in self.state.values():
            for name in MOMENTS:
                state[name] = state[name].bfloat16()


def make_optimizer(model, args):
    """AdamW, betas (0.9, 0.95), weight decay on matrices only. Fused: 8 times faster on CPU too."""
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in params if p.dim() >= 2]
    vectors = [p for p in params if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    common = {"lr": args.lr, "betas": (0.9, 0.95)}
    if args.moments == "int8":
        refuse_missing("int8")
        from training.int8 import Int8AdamW  # seconds

        return Int8AdamW(groups, **common, compiled=is_compiled(args, params[0].device))
    kind = LightAdamW if args.moments == "bfloat16" else torch.optim.AdamW
    return kind(groups, **common, fused=True)


def lr_at(step, args):
    """Learning rate of step 0, 1, ..."""
    # 1. linear warm-up
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    # 2. constant after it
    if args.schedule == "constant":
        return args.lr
    # 3. down to min_lr, along a cosine or a line
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    if args.schedule == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return args.lr + progress * (args.min_lr - args.lr)


def flops_per_token(model, seq_len):
    """Of forward and backward pass."""
    return flops_of(model.config, sum(p.numel() for p in model.parameters()), seq_len)


def flops_of(config, parameters, seq_len):
    """FLOPs of a token of training: 6 N + 12 L d T (PaLM, appendix B).

    N parameters without an untied input embedding, L layers of width d; T is the context, no longer
    than a sliding window. Attention's share is not halved for causality. Selection does not change
    it: the utilisation then tells what a token that was read costs, whether or not it carried loss.
    """
    n = parameters
    if not config.tie_word_embeddings:
        n -= config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.head_dim
    attended = min(seq_len, config.sliding_window or seq_len)
    return 6.0 * n + 12.0 * config.num_hidden_layers * width * attended


def clip_gradients(module, args):
    """Scale the gradients down to norm `--clip`; returns their norm before, a scalar tensor.

    It stays on the device: to read it here would leave a GPU idle until the optimiser's step.
    """
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), args.clip or math.inf)
    if hasattr(norm, "full_tensor"):  # FSDP's
        norm = norm.full_tensor()
    return norm


def finite_norm(norm, args, step):
    """What `clip_gradients` returned, as a number; call it behind the optimiser's step.

    Raises UserError where it is not finite: the run ends, and with it the weights of this step.
    """
    norm = norm.item()
    if not math.isfinite(norm):
        raise UserError(
            f"step {step + 1}: the gradient norm is {norm}; nothing of this step is saved, the "
            f"last saved state is kept. Lower --lr {args.lr} or lengthen --warmup {args.warmup}, "
            f"with another --out or with --overwrite"
        )
    return norm
