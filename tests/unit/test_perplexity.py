"""Perplexity and bits per byte: one definition, whatever the batches."""

import math

import pytest
import torch

from crosslayer.evaluate import measure_perplexity
from model_cases import model_of, tokens


def batches_of(ids, labels, size):
    return [{"input_ids": ids[i : i + size], "labels": labels[i : i + size]} for i in range(0, len(ids), size)]


@pytest.fixture
def split():
    ids = tokens(rows=7)
    labels = ids.clone()
    labels[2, 5:] = -100  # a short row weighs less: a mean of batch means would be wrong
    labels[4, 1:] = -100  # a row without any label
    return ids, labels


def reference(model, ids, labels):
    """Sum over single predictions, one at a time."""
    nats, count = 0.0, 0
    with torch.no_grad():
        for row, row_labels in zip(ids, labels, strict=True):
            probabilities = model(row[None]).logits[0].double().softmax(-1)
            for position in range(1, len(row)):
                if row_labels[position] != -100:
                    nats -= math.log(probabilities[position - 1, row_labels[position]])
                    count += 1
    return nats, count


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_equals_a_sum_over_single_predictions(split, size):
    model = model_of("cross_layer")
    nats, count = reference(model, *split)
    result = measure_perplexity(model, batches_of(*split, size), utf8_bytes=200)
    assert result.tokens == count
    assert result.loss == pytest.approx(nats / count, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / count), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 200, rel=1e-6)
    assert result.batches == math.ceil(7 / size)


def test_published_way_divides_by_one_too_many(split):
    model = model_of("cross_layer")
    ids, labels = split
    means = [reference(model, ids[i : i + 2], labels[i : i + 2]) for i in range(0, 7, 2)]
    expected = sum(nats / count for nats, count in means) / (len(means) + 1)
    result = measure_perplexity(model, batches_of(ids, labels, 2))
    assert result.published_loss == pytest.approx(expected, rel=1e-6)
    assert result.published_perplexity < result.perplexity
    assert result.bits_per_byte is None


def test_training_mode_comes_back(split):
    model = model_of("cross_layer").train()
    measure_perplexity(model, batches_of(*split, 2))
    assert model.training


def test_nothing_to_predict_is_an_error(split):
    ids, labels = split
    with pytest.raises(ValueError, match="nothing to predict"):
        measure_perplexity(model_of("cross_layer"), batches_of(ids, torch.full_like(labels, -100), 2))


def test_overflow_is_infinite():
    from crosslayer.evaluate import Perplexity

    result = Perplexity(loss=1e4, tokens=1, utf8_bytes=1, batches=1, published_loss=1.0)
    assert result.perplexity == math.inf
