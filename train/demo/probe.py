"""The best linear classifier on the frozen features, fitted to convergence."""

import statistics

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from .backbone import load_backbone
from .data import FOLDS, make_split

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Inverse weights of the L2 penalty to choose from."""


@torch.no_grad()
def class_token_features(images: Tensor) -> Tensor:
    """Return what the frozen backbone hands to its head, float32 `[N, 128]`."""
    backbone = load_backbone()
    return torch.cat([backbone(part) for part in images.split(256)])


def best_strength() -> float:
    """Return the inverse weight of the penalty that does best on the folds of the training images.

    About a minute; `tune-demo` records it.
    """
    return max(STRENGTHS, key=_measure_on_folds)


def converged_probe(part: str, strength: float) -> float:
    """Return the accuracy of logistic regression on the frozen features, in percent."""
    images, labels, test_images, test_labels = make_split(part)
    probe = LogisticRegression(C=strength, max_iter=10_000)
    probe.fit(class_token_features(images).numpy(), labels.numpy())
    features = class_token_features(test_images).numpy()
    return 100 * float(probe.score(features, test_labels.numpy()))


def _measure_on_folds(strength: float) -> float:
    return statistics.fmean(converged_probe(fold, strength) for fold in FOLDS)
