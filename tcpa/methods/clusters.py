"""Clusters of image features for DAM-VP: agglomerative, average linkage, Euclidean."""

import torch
from torch import Tensor

from ..checks import require


def cluster_features(
    features: Tensor, *, num_clusters: int | None = None, threshold: float | None = None
) -> Tensor:
    """Cluster features and return the mean of each cluster.

    Args:
        features: `[n, C]`.
        num_clusters: how many clusters; None: decided by `threshold`.
        threshold: mean distance between two clusters above which they are not merged.

    Returns:
        Prototypes `[J, C]` of the dtype and device of the features, in the order in which the
        clusters appear among them.

    Raises:
        ValueError: there are fewer images than clusters, a feature is not finite, or the threshold
            leaves fewer than two clusters.

    Source:
        DAM-VP (CVPR 2023), which calls scikit-learn's AgglomerativeClustering.
    """
    from scipy.cluster import hierarchy

    count = len(features)
    least = 2 if num_clusters is None else num_clusters
    bound, remedy = f"at least {least}, one for each cluster", "use more, or fewer clusters"
    require(count >= least, "images", count, bound, remedy)
    finite = bool(torch.isfinite(features).all())
    require(finite, "features", "NaN or infinity", "finite values", "check images and weights")
    exact = features.detach().double().cpu()
    tree = hierarchy.linkage(exact.numpy(), method="average")
    if num_clusters is not None:
        labels = hierarchy.cut_tree(tree, n_clusters=num_clusters)[:, 0].tolist()
    else:
        labels = hierarchy.fcluster(tree, threshold, criterion="distance").tolist()
    order = list(dict.fromkeys(labels))
    highest = float(tree[-1, 2])
    got = f"{threshold}, which leaves all {count} images in one cluster"
    remedy = f"choose less than {highest:.4g}"
    require(len(order) >= 2, "distance_threshold", got, "at least two clusters", remedy)
    numbers = torch.tensor([order.index(label) for label in labels])
    means = [exact[numbers == number].mean(0) for number in range(len(order))]
    return torch.stack(means).to(features)
