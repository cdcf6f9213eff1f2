"""Time and memory of one merge path on planted clusters, and whether they are found.

    python -m bench.clustering 2500 5000 10000    # a line each, about a minute; adjusted Rand above 0.99

100,000 positions. Clusters of 10 subcomponents that are on together, each missing at 2 % of its cluster's positions.
2 % of all subcomponents are on at a position: L0 = 50, 100, 200 here. Each size has a process of its own, so that its
peak memory can be read (on Linux).
"""

import argparse
import multiprocessing
import resource
import time

import numpy as np
import scipy.sparse as sp

from cluster import cluster
from studies.components import adjusted_rand


def planted(n: int, N: int, L0: float, size: int = 10, missing: float = 0.02) -> tuple[sp.csr_matrix, np.ndarray]:
    """Binary firing [N, n] with about L0 on at a position, and the cluster of each of the n subcomponents."""
    rng = np.random.default_rng(0)
    position, of = np.nonzero(rng.random((N, n // size)) < L0 / n / (1 - missing))
    on = rng.random((len(of), size)) > missing
    rows, columns = np.repeat(position, size).reshape(on.shape)[on], (of[:, None] * size + np.arange(size))[on]
    return sp.csr_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(N, n)), np.arange(n) // size


def measure(n: int) -> None:
    X, truth = planted(n, 100_000, 0.02 * n)
    began = time.time()
    label = cluster(X, alpha=1.0).label
    seconds, peak = time.time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, from KiB
    cost = f"{n:6,} subcomponents, L0 {X.nnz / X.shape[0]:5.1f}: {seconds:5.1f} s, peak {peak:.2f} GiB"
    found = f"{label.max() + 1} clusters of {n // 10} planted, adjusted Rand {adjusted_rand(label, truth):.4f}"
    print(f"{cost}; {found}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("n", nargs="*", type=int, default=[2500, 5000, 10000], help="subcomponents")
    for n in parser.parse_args().n:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(measure, (n,))
