"""A start at the known answer, for `--from_answer=True`: does the loss keep it?

If it does, and ends lower than an ordinary run, that run is in a local minimum. Else the loss prefers another answer.
"""

import torch
import torch.nn.functional as F

from decompose import VPD
from flags import UserError


def start_from_answer(vpd: VPD, B: int, generator: torch.Generator, steps: int = 400) -> None:
    """U and V become the known pieces, and Gamma is fitted to where they are wanted.

    What the pieces leave of W is shared among them as a least addition to V. Spare subcomponents become small. A piece
    is wanted where its mechanism is at work; that of a dense matrix where it reads anything.
    """
    f, target = vpd.decomposition, vpd.decomposition.target
    pieces = {name: (u.detach(), v.detach()) for name, (u, v) in target.canonical().items()}
    with torch.no_grad():
        for name, (u, v) in pieces.items():
            v = v + (torch.linalg.pinv(u) @ (f.W(name) - u @ v.T)).T
            if f.C[name] < u.shape[1]:
                raise UserError(f"C={f.C[name]}: the known answer has {u.shape[1]} subcomponents in {name}")
            even = (u.norm(dim=0) / v.norm(dim=0)).sqrt()  # U_c and V_c of one length
            n, spare = u.shape[1], 0.05
            f.U[name] *= spare
            f.V[name] *= spare
            f.U[name][:, :n], f.V[name][:, :n] = u / even, v * even

    optimizer = torch.optim.Adam(vpd.ci_fn.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        x = target.batch(B, generator)
        _, inputs = f.target_pass(x)
        active, wanted = target.active(x), []
        for name, a in zip(f.names, inputs):
            on = (a @ pieces[name][1]).abs() > 0.02 if name in target.dense else active
            wanted.append(F.pad(on.float(), (0, f.C[name] - on.shape[1])))
        wanted, z = torch.cat(wanted, -1), vpd.ci_fn(inputs)
        # z above 1 where wanted, which is rare and so weighs more, and below 0 elsewhere
        loss = 10 * wanted * F.relu(1.1 - z).square() + (1 - wanted) * F.relu(z + 0.1).square()
        optimizer.zero_grad()
        loss.sum(-1).mean().backward()
        optimizer.step()
    vpd.optimizer.zero_grad()
