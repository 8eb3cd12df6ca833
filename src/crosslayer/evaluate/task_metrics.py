"""Metrics of classification and regression tasks, by scikit-learn and scipy (extra `eval`)."""

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import ConfigError

METRICS = ("accuracy", "f1", "matthews_correlation", "pearson", "spearman")


def measure_task(metrics: Sequence[str], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """{metric: value} of predicted against true labels, [N] each: class ids, or scores for the two correlations.

    F1 is of class 1 where there are two classes and the mean over the classes where there are more. A correlation with
    constant predictions is 0 (nothing was told apart). Raises ConfigError for an unknown metric and where the extra is
    missing.
    """
    return {metric: _one(metric, np.asarray(predictions), np.asarray(labels)) for metric in metrics}


def check_metrics_available() -> None:
    """Raises ConfigError when scikit-learn or scipy is missing, before anything is trained."""
    try:
        import scipy.stats  # noqa: F401
        import sklearn.metrics  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"task metrics need {error.name}: pip install 'crosslayer[eval]'") from None


def _one(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy import stats
    from sklearn import metrics as sk

    functions: dict[str, Callable[[], float]] = {
        "accuracy": lambda: sk.accuracy_score(labels, predictions),
        "f1": lambda: sk.f1_score(labels, predictions, average=_average(labels, predictions), zero_division=0),
        "matthews_correlation": lambda: sk.matthews_corrcoef(labels, predictions),
        "pearson": lambda: stats.pearsonr(predictions, labels).statistic,
        "spearman": lambda: stats.spearmanr(predictions, labels).statistic,
    }
    if metric not in functions:
        raise ConfigError(f"metric {metric!r} is none of {', '.join(METRICS)}")
    is_correlation = metric in ("pearson", "spearman")
    if is_correlation and (len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0):
        return 0.0
    return float(functions[metric]())


def _average(labels: np.ndarray, predictions: np.ndarray) -> str:
    return "binary" if max(labels.max(initial=0), predictions.max(initial=0)) <= 1 else "macro"
