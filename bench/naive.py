"""The step of VPD as one would write it first: the fast one is tested against it and timed beside it.

Delta is formed, logits are held whole, the sources have a backward pass of their own. Masks, masked pass, divergence,
minimalities and the sources' Adam are its own; its random numbers come in the same order. For S = 1 in one process.
"""

import torch
from torch import Tensor, nn

import run
from ci_fn import lower_leaky, upper_leaky
from muon import Muon
from train_target import cosine


class Sources:
    state_dict = lambda self: vars(self)

    def __init__(self, r: Tensor) -> None:
        self.r, self.mom1, self.mom2, self.count = r, torch.zeros_like(r), torch.zeros_like(r), torch.zeros(())

    def ascend(self, grad_r: Tensor, lr: float, beta1: float = 0.5, beta2: float = 0.99) -> None:
        self.count, self.mom1 = self.count + 1, beta1 * self.mom1 + (1 - beta1) * grad_r
        self.mom2 = beta2 * self.mom2 + (1 - beta2) * grad_r**2
        mom1, mom2 = self.mom1 / (1 - beta1**self.count), self.mom2 / (1 - beta2**self.count)
        self.r = torch.clamp(self.r + lr * mom1 / (mom2.sqrt() + 1e-8), 0, 1)


class NaiveVPD:
    def __init__(self, decomposition: nn.Module, ci_fn: nn.Module, config, positions: tuple, device) -> None:
        self.f, self.ci_fn, self.config, self.step = decomposition, ci_fn, config, 0
        self.random = dict(generator=torch.Generator(device).manual_seed(config.seed), device=device)
        attacked = (positions[0] // (1 + config.halves), *positions[1:])
        self.adversary = Sources(torch.rand(1, *attacked, sum(self.f.C.values()) + self.f.L, **self.random))
        self.learning = [*self.f.subcomponents(), *ci_fn.parameters()]
        self.muon = Muon(self.f.subcomponents(), config.lr) if config.muon else None
        self.optimizer = torch.optim.AdamW(ci_fn.parameters() if config.muon else self.learning, weight_decay=0.0)

    def log_softmax(self, x: Tensor, y) -> Tensor:
        """Of the target's logits, where y(l, x, W^l x), unless None, takes the place of matrix l's W^l x."""
        hooks = [W.register_forward_hook(lambda _, x, Wx, l=l: y(l, *x, Wx)) for l, W in enumerate(self.f.layers)]
        logits = self.f.target(x)
        [hook.remove() for hook in hooks]
        return logits.float().log_softmax(-1)

    def reconstruction(self, x: Tensor, log_p: Tensor, g: Tensor, r: Tensor, routing: Tensor) -> Tensor:
        """KL(f(x | W) || f(x | W')), W' = U diag(m) V^T + m_Delta Delta where routing [B, T, L] is True, else W."""
        gs, (*rs, m_Delta) = g.split([*self.f.C.values()], -1), r.split([*self.f.C.values(), self.f.L], -1)

        def masked(l: int, x: Tensor, Wx: Tensor) -> Tensor:
            name, m = self.f.names[l], gs[l] + (1 - gs[l]) * rs[l]
            Ux, Deltax = (x @ self.f.V[name] * m) @ self.f.U[name].T, x @ self.f.Delta(name).T
            return torch.where(routing[..., [l]], Ux + m_Delta[..., [l]] * Deltax, Wx)

        return (log_p.exp() * (log_p - self.log_softmax(x, masked))).sum(-1).mean()

    def train_step(self, x: Tensor) -> dict[str, Tensor]:
        c, L, inputs = self.config, self.f.L, []
        first, second = (slice(0, None, 2), slice(1, None, 2)) if c.halves else (slice(None), slice(None))
        r_stoch = torch.rand(self.adversary.r.shape, **self.random)[0]
        k = torch.randint(1, L + 1, (*x[second].shape, 1), **self.random)
        routing = (
            torch.rand(*x[second].shape, L, **self.random).argsort(-1) < k
        )  # k matrices, of a random order the first
        self.optimizer.param_groups[0]["lr"] = lr = c.lr * cosine(self.step, c.steps, c.lr_warmup, c.lr_end)
        p = torch.tensor(c.p_start + (c.p_end - c.p_start) * self.step / max(1, c.steps - 1), device=x.device)
        adv_lr = c.adv_lr * min(1, (self.step + 1) / (c.adv_warmup * c.steps + 1))
        with run.autocast(x.device):
            log_p = self.log_softmax(x, lambda l, x, Wx: inputs.append(x))
            g = lower_leaky(z := self.ci_fn(inputs).float(), c.leak)
            for ascent in range(1, c.n_adv + 1):
                r, last = self.adversary.r.clone().requires_grad_(), ascent == c.n_adv
                of_g = (g if last else g.detach())[first]
                loss = self.reconstruction(x[first], log_p[first], of_g, r[0], routing | True)
                self.adversary.ascend(torch.autograd.grad(loss, r, retain_graph=last)[0], adv_lr)
            row = {
                "adversarial": loss,
                "stochastic": self.reconstruction(x[second], log_p[second], g[second], r_stoch, routing),
            }
        s, Deltas = ((upper_leaky(z, c.leak) + 1e-12) ** p).sum((0, 1)), map(self.f.Delta, self.f.names)
        row |= {"importance": s.sum() / x.numel(), "frequency": (s * (1 + s).log2()).sum() / x.numel()}
        row["faithfulness"] = torch.cat([Delta.flatten() for Delta in Deltas]).square().mean()
        betas = c.beta_adv, c.beta_stoch, c.beta_imp, c.beta_freq, c.beta_delta
        row["total"] = sum(beta * loss for beta, loss in zip(betas, row.values()))
        self.f.zero_grad(), self.ci_fn.zero_grad()
        row["total"].backward()
        nn.utils.clip_grad_norm_(self.f.subcomponents(), c.clip)
        self.optimizer.step()
        if self.muon:
            self.muon.param_groups[0]["lr"] = c.muon * lr
            self.muon.step()
        self.step += 1
        return {name: loss.detach() for name, loss in row.items()} | {"l0": (g > 0).float().sum(-1).mean(), "p": p}
