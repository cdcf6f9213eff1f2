"""Time and memory of one merge path on planted clusters, and whether they are found.

    python -m bench.clustering 2500 5000 10000    # about a minute; each in a process of its own, so that its memory can be read

100,000 positions; clusters of 10 subcomponents that are on together, each missing at 2 % of its cluster's positions; a share of
2 % of all subcomponents on at a position, so L0 = 50, 100, 200 here.
"""

import resource
import subprocess
import sys
import time

import numpy as np
import scipy.sparse as sp

from cluster import cluster
from studies.components import adjusted_rand


def planted(
    n: int, N: int, L0: float, size: int = 10, missing: float = 0.02, seed: int = 0
) -> tuple[sp.csr_matrix, np.ndarray]:
    """Binary firing [N, n] with about L0 on at a position, and the cluster of each of the n subcomponents."""
    rng = np.random.default_rng(seed)
    position, of = np.nonzero(rng.random((N, n // size)) < L0 / n / (1 - missing))
    on = rng.random((len(of), size)) > missing
    rows, columns = np.repeat(position, size).reshape(on.shape)[on], (of[:, None] * size + np.arange(size))[on]
    return sp.csr_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(N, n)), np.arange(n) // size


def measure(n: int, L0: float) -> None:
    X, truth = planted(n, 100_000, L0)
    L0 = X.nnz / X.shape[0]
    began = time.time()
    found = cluster(X, alpha=1.0)
    seconds, peak = time.time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, from KiB
    ari = adjusted_rand(found.label, truth)
    print(
        f"{n:6,} subcomponents, L0 {L0:5.1f}: {seconds:5.1f} s, peak {peak:.2f} GiB; {found.label.max() + 1} clusters of {n // 10} planted, adjusted Rand {ari:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        measure(int(sys.argv[2]), float(sys.argv[3]))
    else:
        for n in map(int, sys.argv[1:] or ["2500", "5000", "10000"]):
            subprocess.run([sys.executable, "-m", "bench.clustering", "one", str(n), str(0.02 * n)], check=True)
