"""transformers' common tests of a model, once for each family of ours and once for the model that it is made from.

Run by run.py, which puts transformers' own `tests` package on the path. Both sides get the same tiny shape and inputs,
so that a test which ours fails and theirs passes is a difference between the two.
"""

import os
import unittest

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers.models.auto import modeling_auto

import crosslayer  # noqa: F401
from family_cases import FAMILY_CASES, VOCABULARY

FAMILIES = os.environ["TRANSFORMERS_SUITE_FAMILIES"].split(",")
SHAPE = {"num_hidden_layers": 2, "initializer_range": 0.02, "hidden_size": 32}

# Torch's grouped products want rows of 16 bytes.
OF_MIXTURES = {"moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16}


class Tester:
    """Shape and inputs, under the names that transformers' tests look for."""

    batch_size, seq_length = 3, 7
    is_training = True
    num_hidden_layers, hidden_size = SHAPE["num_hidden_layers"], SHAPE["hidden_size"]

    def __init__(self, case, is_ours: bool) -> None:
        self.case, self.is_ours = case, is_ours
        self.num_attention_heads = self.get_config().num_attention_heads

    def get_config(self):
        shape = SHAPE | (OF_MIXTURES if self.case.has_experts else {})
        return self.case.config(**shape) if self.is_ours else self.case.their_config(**self.case.all_fields(**shape))

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], VOCABULARY)
        mask = torch.tril(torch.ones_like(ids))
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Suite(ModelTesterMixin, GenerationTesterMixin):
    """What is the same for all families, and what transformers' suites of its own models set."""

    test_can_init_all_missing_weights_before_2023 = True  # whatever year a file says

    def setUp(self) -> None:
        self.model_tester = Tester(self.case, self.is_ours)


def suite(family: str, is_ours: bool) -> type:
    case = FAMILY_CASES[family]
    body_of = type(case.their_model(Tester(case, False).get_config()).base_model)
    if is_ours:
        classes = [case.cls("Model"), case.causal_class, case.cls("ForSequenceClassification")]
    else:
        head_of = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(case.their_config, None)
        classes = [body_of, case.their_model, *([head_of] if head_of else [])]
    # The tests tell by these tables which labels a class takes, and know no class from outside the library.
    modeling_auto.MODEL_MAPPING_NAMES[f"suite_{family}"] = classes[0].__name__
    for head in classes[2:]:
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[f"suite_{family}"] = head.__name__
    fields = {"case": case, "is_ours": is_ours, "all_model_classes": tuple(classes)}
    return type(name_of(family, is_ours), (Suite, unittest.TestCase), fields)


def name_of(family: str, is_ours: bool) -> str:
    return f"{'ours' if is_ours else 'theirs'}_{family}"


for _family in FAMILIES:
    for _is_ours in (False, True):
        globals()[name_of(_family, _is_ours)] = suite(_family, _is_ours)
