"""An optimizer of matrices over a model, as a run makes it, without a run."""

from types import SimpleNamespace

from crosslayer.train.optimizers import MatrixOptimizer, matrix_groups
from crosslayer.train.parameter_groups import ParameterGroups, divide_groups, optimizer_groups

FACTORS = ParameterGroups(embedding_lr_factor=2.0, full_rank_lr_factor=0.1, low_rank_lr_factor=3.0, beta_lr_factor=0.5)


def optimizer_of(model, name, learning_rate=1e-2, weight_decay=0.1):
    arguments = SimpleNamespace(optim_args=None, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8)
    ours = optimizer_groups(model, FACTORS, learning_rate, weight_decay)
    return MatrixOptimizer(divide_groups(matrix_groups(model, name, arguments), ours))
