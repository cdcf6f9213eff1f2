"""The step of VPD as one would write it first: the reference that the fast one is tested against and timed beside.

Every masked pass forms W' from a materialised Delta, the sources get a backward pass of their own, and logits are held whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losses
from ci_fn import lower_leaky, upper_leaky
from decompose import VPD
from model import LinearsAnswered
from train_target import autocast


class NaiveVPD(VPD):
    """VPD with a step of its own; the decomposition's `hidden` is not used. One process, one part."""

    def masked(self, x: Tensor, m: Tensor, routing: Tensor) -> Tensor:
        """f(x | W'(m)) from W' = U diag(m) V^T + m_Delta Delta."""
        f = self.decomposition
        *ms, m_Deltas = m.split([*f.C.values(), f.L], dim=-1)

        def answer_of(i):
            U, V, Delta = f.U[f.names[i]], f.V[f.names[i]], f.Delta(f.names[i])

            def answer(x, Wx):
                y = F.linear((x @ V) * ms[i], U) + m_Deltas[..., i : i + 1] * F.linear(x, Delta)
                return torch.where(routing[..., i : i + 1], y, Wx)

            return answer

        with LinearsAnswered([layer.weight for layer in f.layers], [answer_of(i) for i in range(f.L)]):
            return f.target(x)

    def train_step(self, x: Tensor) -> dict[str, Tensor]:
        c, f = self.config, self.decomposition
        p, adv_lr = self.schedule()
        with autocast(self.device):
            target_output = f.target(x)
            _, inputs = f.target_pass(x)
            z = self.ci_fn(inputs).float()
            g, g_upper = lower_leaky(z, c.leak), upper_leaky(z, c.leak)
            all_of_them = torch.ones((*g.shape[:-1], f.L), dtype=torch.bool, device=self.device)

            def adversarial(g: Tensor, r: Tensor) -> Tensor:
                return losses.kl_divergence(target_output, self.masked(x, losses.mask(g, r), all_of_them))

            for _ in range(c.n_adv - 1):
                r = self.adversary.r[0].clone().requires_grad_()
                (grad_r,) = torch.autograd.grad(adversarial(g.detach(), r), r)
                self.adversary.ascend(grad_r[None], adv_lr)
            r = self.adversary.r[0].clone().requires_grad_()
            loss_adv = adversarial(g, r)
            r_stoch = losses.sample_sources((1, *r.shape), self.generator)[0]
            routing = losses.sample_routing((1, *g.shape[:-1]), f.L, self.generator)[0]
            loss_stoch = losses.kl_divergence(target_output, self.masked(x, losses.mask(g, r_stoch), routing))
            importance, frequency = losses.importance_minimality(g_upper, p), losses.frequency_minimality(g_upper, p)
        faithfulness = losses.faithfulness(f)
        total = (
            c.beta_adv * loss_adv
            + c.beta_stoch * loss_stoch
            + c.beta_imp * importance
            + c.beta_freq * frequency
            + c.beta_delta * faithfulness
        )
        (grad_r,) = torch.autograd.grad(loss_adv, r, retain_graph=True)
        self.optimizer.zero_grad()
        total.backward()
        self.adversary.ascend(grad_r[None], adv_lr)
        nn.utils.clip_grad_norm_(f.subcomponents(), c.clip)
        self.optimizer.step()
        self.step += 1
        terms = {
            "adversarial": loss_adv,
            "stochastic": loss_stoch,
            "importance": importance,
            "frequency": frequency,
            "faithfulness": faithfulness,
            "total": total,
        }
        return {name: loss.detach() for name, loss in terms.items()}
