"""AdamW, the learning-rate schedule, clipping."""

import math

import torch
from torch.optim.adamw import adamw

from common.errors import UserError


class LightAdamW(torch.optim.AdamW):
    """AdamW that keeps its two moments in bfloat16 between steps: 4 bytes a parameter instead of 8.

    The arithmetic is torch's own, in fp32, one parameter at a time; only what is kept is rounded. Rounding to the nearest
    would lose updates of the second moment that are smaller than 1/512 of it, as with beta2 = 0.999; not so with 0.95.
    """

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(
                        step=torch.zeros((), device=p.device),
                        exp_avg=torch.zeros_like(p),
                        exp_avg_sq=torch.zeros_like(p),
                    )
                moments = [state[name].float() for name in ("exp_avg", "exp_avg_sq")]
                adamw(
                    [p],
                    [p.grad],
                    [moments[0]],
                    [moments[1]],
                    [],
                    [state["step"]],
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    maximize=False,
                )
                state["exp_avg"], state["exp_avg_sq"] = (m.bfloat16() for m in moments)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)  # makes them the parameters' dtype
        for state in self.state.values():
            state.update({name: state[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")})


def make_optimizer(model, args):
    """AdamW, betas (0.9, 0.95), fused (8 times faster on CPU too); weight decay on matrices only."""
    params = [p for p in model.parameters() if p.requires_grad]
    return (LightAdamW if args.moments == "bfloat16" else torch.optim.AdamW)(
        [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": args.weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )


def lr_at(step, args):
    """Learning rate of step 0, 1, ..."""
    if step < args.warmup:  # 1. linear warm-up
        return args.lr * (step + 1) / args.warmup
    if args.schedule == "constant":  # 2. constant after it
        return args.lr
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    if args.schedule == "cosine":  # 3. down to min_lr, along a cosine or a line
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return args.lr + progress * (args.min_lr - args.lr)


def flops_per_token(model, seq_len):
    """Of forward and backward pass: 6 N + 12 L d T, for N parameters without an untied input embedding and L layers of
    width d; attention's share is not halved for causality (PaLM, appendix B). Selection does not change it: the
    utilisation then tells what a token that was read costs, whether or not it was learnt from."""
    c = model.config
    n = sum(p.numel() for p in model.parameters()) - (
        0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    )
    return 6 * n + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len


def clip_gradients(module, args, step):
    """Scale the gradients down to norm `--clip`; returns their norm before. Raises UserError where it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), args.clip or math.inf)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(norm):
        raise UserError(
            f"step {step + 1}: the gradient norm is {norm}; nothing was updated, the last saved state is "
            f"kept. Lower --lr {args.lr} or lengthen --warmup {args.warmup}"
        )
    return norm
