"""Measures of classification scores.

Legend: n pairs, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def measure(targets: NDArray[np.int64], scores: NDArray[np.float64]) -> dict[str, float] | None:
    """auroc and balanced_accuracy of scores (n, C) for targets (n,), -1 left out; None where only one class occurs.

    Binary: the AUROC of the margin scores[:, 1] − scores[:, 0]; else the mean over classes of one against the rest.
    """
    from sklearn.metrics import recall_score, roc_auc_score  # late: its import takes seconds

    known = targets >= 0
    targets, scores = targets[known], scores[known]
    present = np.unique(targets)
    if len(present) < 2:
        return None
    if scores.shape[1] == 2:
        auroc = float(roc_auc_score(targets, scores[:, 1] - scores[:, 0]))
    else:
        auroc = float(np.mean([roc_auc_score(targets == c, scores[:, c]) for c in present]))
    # balanced_accuracy_score is the same figure, but warns of every predicted class that does not occur
    accuracy = recall_score(targets, scores.argmax(1), labels=present, average="macro", zero_division=0)
    counts = {"n": float(len(targets))}
    if scores.shape[1] == 2:
        counts["positives"] = float((targets == 1).sum())
    return {"auroc": auroc, "balanced_accuracy": float(accuracy), **counts}
