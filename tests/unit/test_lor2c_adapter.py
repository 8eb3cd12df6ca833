"""LoR2C as a PEFT adapter: what users of `LoraConfig` do, done with `LoR2CConfig`; and all that must be refused."""

import copy

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinForImageClassification,
)

from crosslayer import LoR2CConfig, LoR2CModel
from crosslayer.crnet import CRNetForCausalLM
from crosslayer.errors import CheckpointError, ConfigError
from crosslayer.lor2c import SETTINGS, AdaptedBlocks, LoR2CStructureCallback, lor2c_settings
from lor2c_cases import DECODER, base_model, crnet_config, inputs_of, move, with_lor2c
from tolerances import assert_close, assert_far

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

IDS = inputs_of("llama")["input_ids"]


def llama(**options):
    return with_lor2c(base_model("llama"), **options)


def logits(model, **options):
    with torch.no_grad():
        return model(IDS, **options).logits


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def set_zero(model, adapter_name):
    with torch.no_grad():
        for parameter in AdaptedBlocks(model, adapter_name).parameters():
            parameter.zero_()


class TestInitialisation:
    def test_A_kaiming_uniform_B_zero(self):
        model = with_lor2c(base_model("llama"), moved=False, r=8, injectable=True)
        for name, parameter in model.named_parameters():
            if "lor2c_B" in name or "lor2c_inject_B" in name:
                assert (parameter == 0).all(), name
            elif "lor2c_A" in name:
                assert parameter.abs().max() <= 32**-0.5
                assert parameter.std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.15), name

    @pytest.mark.parametrize(
        ("options", "scaling"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lor2c_alpha": 2}, 0.5)]
    )
    def test_scaling(self, options, scaling):
        layer = AdaptedBlocks(llama(**options)).layers[0]
        assert layer.scaling == {"default": scaling}

    def test_dropout_is_on_the_input_of_A(self):
        layer = AdaptedBlocks(llama(lor2c_dropout=0.5)).layers[0].train()
        torch.manual_seed(3)
        out = layer(torch.ones(1, 1, 32))
        torch.manual_seed(3)
        x = nn.functional.dropout(torch.ones(1, 1, 32), 0.5)
        assert_close(out, 2.0 * x @ layer.lor2c_A["default"].weight.T @ layer.lor2c_B["default"].weight.T)

    def test_share_A(self):
        model = llama(share_A=True)
        shared = {id(layer.lor2c_A["default"].weight) for layer in AdaptedBlocks(model).layers}
        assert len(shared) == 1
        model(IDS, labels=IDS).loss.backward()
        assert all(layer.lor2c_B["default"].weight.grad.abs().max() > 0 for layer in AdaptedBlocks(model).layers)

    @pytest.mark.parametrize("fused", [False, True])
    def test_reads_output(self, fused):
        """Against a hook that says so: h + (alpha / r) h A' B' with h = Block(h_in), at the last of fused blocks."""
        model = llama(reads="output").double()
        if fused:
            model.base_model.fuse(0, 1, survivor="first")
        blocks = AdaptedBlocks(model)
        owners = {span.last: blocks.layers[span.owner] for span in blocks.structure.spans}
        reference = base_model("llama").double()
        for number, layer in owners.items():
            update = 2.0 * layer.lor2c_A["default"].weight.T @ layer.lor2c_B["default"].weight.T
            reference.model.layers[number].register_forward_hook(lambda block, x, h, update=update: h + h @ update)
        assert_close(logits(model), logits(reference))
        of_input = llama().double()
        if fused:
            of_input.base_model.fuse(0, 1, survivor="first")
        assert_far(logits(of_input), logits(reference))
        assert blocks.num_parameters() == AdaptedBlocks(of_input).num_parameters()

    @pytest.mark.parametrize(("reads", "passes"), [("input", True), ("output", False)])
    def test_gradients_around_a_block_that_lets_none_through(self, reads, passes):
        model = llama(reads=reads)
        block = AdaptedBlocks(model).layers[1].get_base_layer()
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states.detach()
        model(IDS, labels=IDS).loss.backward()
        gradient = AdaptedBlocks(model).layers[0].lor2c_B["default"].weight.grad
        assert (gradient is not None and gradient.abs().max().item() > 0) is passes

    def test_reads_is_saved(self, tmp_path):
        model = llama(reads="output")
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base_model("llama"), tmp_path)
        equal(logits(again), logits(model.eval()))
        with pytest.raises(ConfigError, match="reads='both' must be one of input, output"):
            LoR2CConfig(reads="both")

    def test_patterns_and_selection(self):
        model = llama(rank_pattern={"layers.1": 3}, alpha_pattern={"layers.2": 2})
        layers = AdaptedBlocks(model).layers
        assert [layer.r["default"] for layer in layers] == [4, 3, 4]
        assert [layer.scaling["default"] for layer in layers] == [2.0, 8 / 3, 0.5]
        for options in (
            {"layers_to_transform": [0, 2]},
            {"target_modules": ["layers.0", "layers.2"]},
            {"target_modules": r".*\.[02]"},
            {"exclude_modules": ["layers.1"]},
            {"target_modules": ["0", "1", "2"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        ):
            blocks = AdaptedBlocks(llama(**options))
            assert blocks.names == ["model.layers.0", "model.layers.2"], options
            with pytest.raises(ConfigError, match="do not touch"):
                blocks.fuse(0, 1)


class TestSeveralAdapters:
    def test_switch_union_delete(self):
        model = llama()
        one = logits(model)
        model.add_adapter("other", LoR2CConfig(r=2, lor2c_dropout=0.0, injectable=True))
        move(model, seed=5)
        first = logits(model)
        assert_far(first, one)
        model.set_adapter("other")
        second = logits(model)
        assert_far(second, first)
        model.base_model.fuse(1, 2, adapter_name="other")
        model.base_model.inject(0, adapter_name="other")
        assert model.base_model.structure("default").fuses == 0
        fused = logits(model)
        assert_far(fused, second)
        model.base_model.set_adapter(["default", "other"])
        both = logits(model)
        assert_far(both, first)
        set_zero(model, "default")
        equal(logits(model), fused)
        model.delete_adapter("default")
        assert model.active_adapters == ["other"]
        equal(logits(model), fused)
        assert not any("default" in name for name, _ in model.named_parameters())

    def test_modules_in_use_train_and_others_rest(self):
        model = llama()
        model.add_adapter("other", LoR2CConfig(r=2))
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable
        assert all(".default." in name for name in trainable)
        model.set_adapter("other")
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(".other." in name for name in trainable)

    def test_mixed_batches(self):
        model = llama(injectable=True, modules_to_save=["lm_head"])
        model.add_adapter("other", LoR2CConfig(r=2, lor2c_dropout=0.0, injectable=True, modules_to_save=["lm_head"]))
        move(model, seed=5)
        model.base_model.fuse(0, 1, adapter_name="other")
        model.base_model.inject(1, adapter_name="default")
        expected = []
        for row, name in enumerate(("other", "default")):
            model.set_adapter(name)
            expected.append(logits(model)[row])
        assert_close(logits(model, adapter_names=["other", "default"]), torch.stack(expected))
        with model.disable_adapter():
            base = logits(model)
        mixed = logits(model, adapter_names=["__base__", "default"])
        assert_close(mixed[0], base[0])
        assert_close(mixed[1], expected[1])
        with pytest.raises(ValueError, match="non-existing adapter"):
            logits(model, adapter_names=["typo", "default"])
        with pytest.raises(ValueError, match="training mode"):
            model.train()(IDS, adapter_names=["other", "default"])


class TestWithOthers:
    @pytest.mark.parametrize("lora_first", [False, True])
    def test_lora_before_and_after(self, lora_first):
        """Both adapters, one after the other, in either order; LoR2C injected into what LoRA also adapts."""

        def lora(model):
            config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            torch.manual_seed(7)
            return inject_adapter_in_model(config, model, "lora")

        def lor2c(model):
            model = inject_adapter_in_model(LoR2CConfig(r=4, lor2c_dropout=0.0, injectable=True), model, "lor2c")
            move(model)
            blocks = AdaptedBlocks(model, "lor2c")
            blocks.inject(1)
            return model

        model = base_model("llama")
        for add in (lora, lor2c) if lora_first else (lor2c, lora):
            model = add(model)
        for module in model.modules():
            if hasattr(module, "set_adapter") and hasattr(module, "lora_A"):
                module.set_adapter("lora")
            elif hasattr(module, "lor2c_A"):
                module.set_adapter("lor2c")
        output = logits(model.eval())
        assert_far(output, logits(lora(base_model("llama"))))
        reference = lora(lor2c(base_model("llama")))
        for module in reference.modules():
            if hasattr(module, "set_adapter") and hasattr(module, "lora_A"):
                module.set_adapter("lora")
            elif hasattr(module, "lor2c_A"):
                module.set_adapter("lor2c")
        assert_close(output, logits(reference.eval()))
        model(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B.lora" in n)

    def test_modules_to_save_inside_and_outside_of_blocks(self, tmp_path):
        model = llama(modules_to_save=["input_layernorm", "lm_head"])
        saved = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
        assert len(saved) == 4
        assert all(parameter.requires_grad for parameter in saved)
        with torch.no_grad():
            saved[0].mul_(2)
        model.save_pretrained(tmp_path)
        equal(logits(PeftModel.from_pretrained(base_model("llama"), tmp_path).eval()), logits(model))

    def test_merging_raises_with_the_reason(self):
        model = llama()
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(NotImplementedError, match="past their norms and non-linearities"):
                merge()
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            AdaptedBlocks(model).layers[0].merge()

    def test_native_integration_of_transformers(self, tmp_path):
        model = base_model("llama")
        model.add_adapter(LoR2CConfig(r=4, lor2c_dropout=0.0, injectable=True))
        move(model)
        AdaptedBlocks(model).fuse(0, 1)
        expected = logits(model.eval())
        model.disable_adapters()
        equal(logits(model), logits(base_model("llama")))
        model.enable_adapters()
        model.save_pretrained(tmp_path)
        base_model("llama").save_pretrained(tmp_path / "base")
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        other.load_adapter(str(tmp_path))
        equal(logits(other), expected)
        other.delete_adapter("default")
        equal(logits(other), logits(base_model("llama")))

    def test_auto_classes_and_config(self, tmp_path):
        base_model("llama").save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        model = with_lor2c(base, task_type="CAUSAL_LM", layers_to_transform=[1, 2], share_A=True)
        model.save_pretrained(tmp_path / "adapter")
        auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        equal(logits(auto), logits(model))
        config = PeftConfig.from_pretrained(tmp_path / "adapter")
        assert type(config) is LoR2CConfig
        assert config.layers_to_transform == [1, 2]
        assert [module["weights"] for module in config.structure["modules"]] == ["model.layers.1", "model.layers.2"]
        assert isinstance(auto.base_model, LoR2CModel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision(dtype, autocast_adapter_dtype):
    config = LoR2CConfig(r=4, lor2c_alpha=8, lor2c_dropout=0.0, injectable=True)
    model = get_peft_model(base_model("llama").to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    move(model)
    blocks = AdaptedBlocks(model)
    blocks.fuse(0, 1)
    blocks.inject(2)
    assert {p.dtype for p in blocks.parameters()} == {torch.float32 if autocast_adapter_dtype else dtype}
    output = model.train()(IDS, labels=IDS)
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in blocks.parameters_in_use())
    reference = llama(injectable=True)
    move(reference)
    AdaptedBlocks(reference).structure = blocks.structure
    assert_close(output.logits.float(), logits(reference), dtype)


def test_bf16_autocast_keeps_the_residual_stream_in_float32():
    model, seen = llama(), []
    model.base_model.model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    assert seen == [torch.float32]


def test_quantised_base():
    """NF4 weights: integers in packed storage, of which the adapter must take neither shape nor dtype."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # Its kernels for CPUs want widths that are multiples of 32.
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}
    base = LlamaForCausalLM(LlamaConfig(**{**DECODER, **wide}))
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                quantised = bitsandbytes.nn.Linear4bit(*child.weight.T.shape, bias=False, quant_type="nf4")
                quantised.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, quantised.to("cpu"))
    assert base.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    model = with_lor2c(base, injectable=True)
    blocks = AdaptedBlocks(model)
    blocks.inject(2)
    model(IDS, labels=IDS).loss.backward()
    assert {p.dtype for p in blocks.parameters()} == {torch.float32}
    assert all(parameter.grad.abs().max() > 0 for parameter in blocks.parameters_in_use())


@pytest.mark.parametrize("recompute", ["none", "invert", "replay", "reversible"])
def test_crnet_with_its_memory_policies(recompute):
    """The tape notices what LoR2C adds between and within its layers: gradients are those of plain autograd."""
    gradients = []
    for policy in (None, recompute):
        torch.manual_seed(0)
        base = CRNetForCausalLM(crnet_config(recompute=policy or "none"))
        for name, parameter in base.named_parameters():
            if name.endswith("B.weight"):  # zero at the start: layers would be copies
                nn.init.normal_(parameter, std=0.1)
        model = with_lor2c(base, injectable=True).train()
        blocks = AdaptedBlocks(model)
        blocks.fuse(0, 1)
        blocks.inject(2)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name.endswith("down_proj.B.weight"))
        if policy is None:  # plain autograd: the tape steps back from evaluation mode
            model.eval()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert sum("lor2c" in name for name in gradients[0]) == 2 * 2 + 4
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, what=name)


def test_compiles_to_one_graph():
    model = llama(injectable=True)
    model.base_model.fuse(0, 1)
    model.base_model.inject(2)
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(IDS, use_cache=False).logits, expected)


class TestStages:
    """Swin's widths grow from stage to stage: the residuals go around the blocks within."""

    def swin(self):
        torch.manual_seed(0)
        shape = {"image_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8}
        return SwinForImageClassification(SwinConfig(**shape, depths=[2, 3], num_heads=[2, 2])).eval()

    def test_blocks_of_every_stage_by_default(self):
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        model, plain = with_lor2c(self.swin(), injectable=True).double(), self.swin().double()
        blocks = AdaptedBlocks(model)
        stage = "swin.encoder.layers.{}.blocks.{}"
        assert blocks.names == [stage.format(*place) for place in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))]
        blocks.fuse(0, 1)
        blocks.fuse(3, 4)
        with pytest.raises(ConfigError, match=r"neighbour"):
            blocks.fuse(1, 2)
        held = {}
        for first, last in ((0, 1), (2, 2), (3, 4)):
            layer = blocks.layers[first]
            A, B = layer.lor2c_A["default"].weight, layer.lor2c_B["default"].weight
            plain.get_submodule(blocks.names[first]).register_forward_pre_hook(
                lambda block, args, key=last: held.__setitem__(key, args[0])
            )
            plain.get_submodule(blocks.names[last]).register_forward_hook(
                lambda block, args, out, key=last, A=A, B=B: (out[0] + 2.0 * held[key] @ A.T @ B.T, *out[1:])
            )
        assert_close(model(pixel_values=pixels).logits, plain(pixel_values=pixels).logits)

    def test_one_width_stays_one_list(self):
        """Blocks that hold lists of their own, such as experts, are no stages."""

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))

            def forward(self, x):
                return sum(expert(x) for expert in self.experts)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.ModuleList(Block() for _ in range(2))

            def forward(self, x):
                for layer in self.layers:
                    x = layer(x)
                return x

        assert AdaptedBlocks(with_lor2c(Net())).names == ["layers.0", "layers.1"]


class Widening(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)

    def forward(self, x):
        return self.linear(x)


class Uneven(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Widening(8, 8), Widening(8, 12), Widening(12, 12)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"r": 0}, "r=0 must be a positive integer"),
            ({"r": -3}, "r=-3 must be"),
            ({"r": 2.5}, "r=2.5 must be"),
            ({"rank_pattern": {"layers.0": 0}}, r"rank_pattern\['layers.0'\]=0"),
            ({"inject_r": 0}, "inject_r=0"),
            ({"lor2c_dropout": 1.5}, "lor2c_dropout=1.5 must lie in"),
            ({"target_modules": "all-linear"}, "names linears"),
            ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
            ({"injectable": False, "inject_r": 2}, "although injectable=False"),
        ],
    )
    def test_configurations(self, options, message):
        with pytest.raises(ConfigError, match=message):
            LoR2CConfig(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target_modules": ["blocks.0"]}, r"matches no block.*model\.layers\.0 \.\.\. model\.layers\.2"),
            ({"layers_to_transform": [7]}, "layers_to_transform=\\[7\\] matches no block"),
            ({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj is a Linear, a linear"),
            ({"target_modules": ["layers"]}, "model.layers is a container of 3 modules"),
            ({"target_modules": ["embed_tokens"]}, "is a Embedding"),
            ({"inject_target_modules": ["qq_proj"]}, "model.layers.0 has no linear qq_proj.*self_attn.q_proj"),
            ({"share_A": True, "rank_pattern": {"layers.1": 2}}, "share_A needs one width and one rank"),
        ],
    )
    def test_blocks(self, options, message):
        """Refused before the model is touched."""
        model = base_model("llama")
        keys = list(model.state_dict())
        with pytest.raises(ConfigError, match=message):
            get_peft_model(model, LoR2CConfig(**options))
        assert list(model.state_dict()) == keys
        assert not model.model.layers[0]._forward_hooks

    def test_no_attention_to_inject_into(self):
        with pytest.raises(ConfigError, match=r"backbone\.layers\.0 has no linear query and value.*mixer.in_proj"):
            get_peft_model(base_model("mamba"), LoR2CConfig(injectable=True))

    def test_uneven_blocks_are_named(self):
        with pytest.raises(ConfigError, match=r"layers\.1 \(8 -> 12\)"):
            get_peft_model(Uneven(), LoR2CConfig(r=2))
        model = get_peft_model(Uneven(), LoR2CConfig(r=2, exclude_modules=["layers.1"]))
        assert model(torch.randn(1, 8)).shape == (1, 12)
        hidden = Uneven()
        hidden.config = {"model_type": "custom"}  # a model of a library: found out when it runs
        with pytest.raises(ConfigError, match=r"layers\.1: a block that reads width 8 and puts out width 12"):
            get_peft_model(hidden, LoR2CConfig(r=2, lor2c_dropout=0.0))(torch.randn(1, 8))

    def test_adapter_for_another_base(self, tmp_path):
        llama().save_pretrained(tmp_path)
        smaller = base_model("llama").config
        for change, message in (
            ({"hidden_size": 16}, r"lor2c_A.*is \[4, 32\] in the adapter and \[4, 16\] here"),
            ({"num_hidden_layers": 2}, r"layers\.2\.lor2c.*does not exist here"),
        ):
            config = copy.deepcopy(smaller)
            config.update(change)
            other = type(base_model("llama"))(config)
            with pytest.raises(CheckpointError, match=message):
                PeftModel.from_pretrained(other, tmp_path)

    def test_structure_requests(self):
        blocks = AdaptedBlocks(llama())
        with pytest.raises(ConfigError, match="injectable=True"):
            blocks.inject(0)
        with pytest.raises(ConfigError, match="do not touch"):
            blocks.fuse(0, 2)
        with pytest.raises(ConfigError, match="survivor='last'"):
            blocks.fuse(0, 1, survivor="last")
        with pytest.raises(ConfigError, match=r"no LoR2C adapter 'other'; it has \['default'\]"):
            AdaptedBlocks(llama(), "other")
        with pytest.raises(ConfigError, match="none at all"):
            AdaptedBlocks(base_model("llama"))

    def test_methods(self):
        for method in SETTINGS:
            for_config, for_callback = lor2c_settings(method)
            LoR2CConfig(**for_config)
            LoR2CStructureCallback(**for_callback)
        with pytest.raises(ConfigError, match="the nearest is mergelor2c"):
            lor2c_settings("mergelorc")


class TestStructureOperations:
    def test_a_fused_module_reads_the_first_input_and_adds_to_the_last_output(self):
        model, plain = llama(), base_model("llama")
        blocks = AdaptedBlocks(model)
        blocks.fuse(0, 1)
        blocks.fuse(1, 2)
        layer, kept = blocks.layers[0], []
        A, B = layer.lor2c_A["default"].weight, layer.lor2c_B["default"].weight
        plain.model.layers[0].register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        plain.model.layers[2].register_forward_hook(lambda module, args, out: out + 2.0 * kept[0] @ A.T @ B.T)
        assert_close(logits(model), logits(plain))

    @pytest.mark.parametrize("survivor", ["first", "higher_score"])
    def test_survivor_keeps_its_own_tensors_and_moments(self, survivor):
        model = llama().train()
        blocks = AdaptedBlocks(model)
        optimizer = torch.optim.AdamW(blocks.parameters(), lr=1e-2)
        identities = [id(parameter) for parameter in blocks.parameters()]

        def step():
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        scores = list(blocks.scores("sfs").values())
        owner = 0 if survivor == "first" or scores[0] >= scores[1] else 1
        structure = blocks.fuse(0, 1, survivor=survivor)
        assert structure.spans[0].owner == owner
        before = [parameter.clone() for parameter in blocks.parameters()]
        moments = [optimizer.state[parameter]["exp_avg"].clone() for parameter in blocks.parameters()]
        step()
        assert [id(parameter) for parameter in blocks.parameters()] == identities
        idle = {id(parameter) for layer in (blocks.layers[1 - owner],) for parameter in layer.parameters()}
        for parameter, value, moment in zip(blocks.parameters(), before, moments, strict=True):
            assert torch.equal(parameter, value) == (id(parameter) in idle)  # no step and no decay where idle
            assert torch.equal(optimizer.state[parameter]["exp_avg"], moment) == (id(parameter) in idle)

    def test_injected_pairs_move(self):
        model = llama(moved=False, injectable=True).train()
        blocks = AdaptedBlocks(model)
        optimizer = torch.optim.AdamW(blocks.parameters(), lr=1e-2)
        blocks.inject(1)
        assert logits(model).isfinite().all()
        for _ in range(2):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
        pairs = blocks.layers[1].pairs("default")
        assert set(pairs) == {"self_attn__q_proj", "self_attn__v_proj"}
        assert all(B.weight.abs().max() > 0 for _, B in pairs.values())
        assert (blocks.layers[1].lor2c_B["default"].weight == 0).all()
        assert all(A.weight.shape[0] == 2 for A, _ in pairs.values())

    def test_injection_is_lora(self):
        model = llama(injectable=True)
        blocks = AdaptedBlocks(model)
        for block in range(3):
            blocks.inject(block)
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        lora = get_peft_model(base_model("llama"), config).eval()
        for layer, block in zip(lora.base_model.model.model.layers, blocks.layers, strict=True):
            for key, (A, B) in block.pairs("default").items():
                linear = layer.get_submodule(key.replace("__", "."))
                linear.lora_A["default"].weight.data.copy_(A.weight)
                linear.lora_B["default"].weight.data.copy_(B.weight)
        assert_close(logits(model), logits(lora))

    def test_loading_into_an_existing_adapter_brings_the_structure_along(self, tmp_path):
        """As Trainer's resume and best-model reload do, which never read adapter_config.json."""
        model = llama(injectable=True)
        blocks = AdaptedBlocks(model)
        blocks.fuse(0, 1)
        blocks.inject(2)
        expected, wanted = logits(model), blocks.structure
        model.save_pretrained(tmp_path)
        other = llama(injectable=True)
        AdaptedBlocks(other).fuse(1, 2)
        other.load_adapter(tmp_path, "default")
        equal(logits(other), expected)
        assert AdaptedBlocks(other).structure == wanted
        other.save_pretrained(tmp_path / "again")
        assert PeftConfig.from_pretrained(tmp_path / "again").structure == blocks.describe()

    def test_injected_state_needs_the_pairs(self, tmp_path):
        model = llama(injectable=True)
        model.base_model.inject(2)
        state = {name: value for name, value in model.state_dict().items() if "lor2c_state" in name}
        plain = llama()
        plain.load_state_dict(state, strict=False)
        with pytest.raises(CheckpointError, match="load it with injectable=True"):
            logits(plain)
