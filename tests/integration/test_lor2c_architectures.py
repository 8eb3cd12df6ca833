"""LoR2C on 24 architectures of transformers: encoders, decoders, encoder-decoders, state-space and mixture models."""

import copy

import pytest
import torch
from peft import PeftModel

from crosslayer.lor2c import AdaptedBlocks
from lor2c_cases import ARCHITECTURES, GENERATING, base_model, inputs_of, with_lor2c
from tolerances import assert_close, assert_far

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

INJECTABLE = [name for name in ARCHITECTURES if name != "mamba"]


def logits(model, name):
    with torch.no_grad():
        return model(**inputs_of(name)).logits


def changed_structure(model, name):
    """One fuse and, where there is attention, one injection; the names of the blocks they touch."""
    blocks = AdaptedBlocks(model)
    blocks.fuse(0, 1)
    if name in INJECTABLE:
        blocks.inject(2)
    return blocks


def adapted(name, **options):
    return with_lor2c(base_model(name), injectable=name in INJECTABLE, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
class TestEveryArchitecture:
    def test_starts_as_the_base_model_and_can_be_switched_off(self, name):
        expected = logits(base_model(name), name)
        torch.testing.assert_close(logits(adapted(name, moved=False), name), expected, rtol=0, atol=0)
        model = adapted(name)
        assert_far(logits(model, name), expected)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model, name), expected, rtol=0, atol=0)
        torch.testing.assert_close(logits(model.unload(), name), expected, rtol=0, atol=0)
        assert not any("lor2c" in key for key, _ in model.base_model.model.named_modules())

    def test_is_the_formula(self, name):
        """Against hooks written out here: every block's output plus scaling B A of its input."""
        model, plain = adapted(name), base_model(name)
        for layer in AdaptedBlocks(model).layers:
            A, B = layer.lor2c_A["default"].weight, layer.lor2c_B["default"].weight

            def add(block, args, kwargs, output, A=A, B=B):
                h = args[0] if args else kwargs["hidden_states"]
                delta = 2.0 * h @ A.T @ B.T  # alpha / r = 8 / 4
                return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

            plain.get_submodule(layer.name).register_forward_hook(add, with_kwargs=True)
        assert_close(logits(model, name), logits(plain, name))

    def test_gradients_reach_every_part_in_use_and_no_other(self, name):
        model = adapted(name)
        blocks = changed_structure(model, name)
        model(**inputs_of(name, labels=True)).loss.backward()
        in_use = {id(parameter) for parameter in blocks.parameters_in_use()}
        for key, parameter in model.named_parameters():
            if ".lor2c." in key:
                moved = parameter.grad is not None and parameter.grad.abs().max() > 0
                assert moved == (id(parameter) in in_use), key

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_changes_no_gradient(self, name, use_reentrant):
        found = []
        for checkpointing in (False, True):
            model = adapted(name)
            changed_structure(model, name)
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            if checkpointing:
                model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                model.base_model.model.enable_input_require_grads()
            torch.manual_seed(0)
            model(**inputs_of(name, labels=True)).loss.backward()
            found.append({k: p.grad for k, p in model.named_parameters() if ".lor2c." in k and p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for key, gradient in found[0].items():
            assert_close(found[1][key], gradient, what=key)

    def test_saved_and_loaded_is_equal_to_the_last_bit(self, name, tmp_path):
        model = adapted(name)
        blocks = changed_structure(model, name)
        expected = logits(model, name)
        model.save_pretrained(tmp_path)
        for options in ({}, {"low_cpu_mem_usage": True}):
            loaded = PeftModel.from_pretrained(base_model(name), tmp_path, **options).eval()
            assert AdaptedBlocks(loaded).structure == blocks.structure
            torch.testing.assert_close(logits(loaded, name), expected, rtol=0, atol=0)
        native = base_model(name)
        native.load_adapter(str(tmp_path))
        torch.testing.assert_close(logits(native.eval(), name), expected, rtol=0, atol=0)

    def test_recorded_hidden_states_hold_the_residuals(self, name):
        """Each recorded state is what the next block reads."""
        model, seen = adapted(name), {}
        changed_structure(model, name)
        for layer in AdaptedBlocks(model).layers:
            block = model.base_model.model.get_submodule(layer.name)

            def look(block, args, kwargs, key=layer.name):
                seen[key] = (args[0] if args else kwargs["hidden_states"]).clone()

            block.register_forward_pre_hook(look, with_kwargs=True)
        with torch.no_grad():
            outputs = model(**inputs_of(name), output_hidden_states=True)
        encoder_decoder = model.base_model.model.config.is_encoder_decoder
        lists = (
            [outputs.encoder_hidden_states, outputs.decoder_hidden_states]
            if encoder_decoder
            else [outputs.hidden_states]
        )
        if name == "mamba":  # records what its blocks put out, not the embeddings
            del seen["backbone.layers.0"]
        for key, value in seen.items():
            states = lists["decoder" in key.split(".")] if encoder_decoder else lists[0]
            assert any(torch.equal(state, value) for state in states), key

    def test_a_copy_stands_on_its_own(self, name):
        model = adapted(name)
        changed_structure(model, name)
        expected, twin = logits(model, name), copy.deepcopy(model)
        with torch.no_grad():
            for parameter in AdaptedBlocks(model).parameters():
                parameter.zero_()
        torch.testing.assert_close(logits(twin, name), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in GENERATING if name != "whisper"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_with_a_cache_is_generation_without(name, num_beams):
    model = adapted(name)
    changed_structure(model, name)
    prompt = {"input_ids": inputs_of(name)["input_ids"]}
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams, "eos_token_id": None}
    with_cache = model.generate(**prompt, **options, use_cache=True)
    torch.testing.assert_close(with_cache, model.generate(**prompt, **options, use_cache=False))
