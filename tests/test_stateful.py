"""Random sequences of verbs on two adapters and more, against the formula in plain torch.

    γ = Π (1 + s_i (γ_i - 1))        δ = Σ s_i δ_i        B A = Σ s_i B_i A_i

over the adapters that count: those that are merged or, if none is, the active ones. After every step, refused or
not, the model computes that, and the base's own parameters are the same to the last bit unless something is merged.
"""

import math
import os
import warnings

import pytest
import reference
import torch
from conftest import CLOSE, make_dit
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from peft import get_peft_model

from difffit_peft import DiffFitConfig, DiffFitLayer

SEQUENCES, STEPS = int(os.environ.get("DIFFFIT_TEST_SEQUENCES", 500)), 12
MAX_RANK = 8  # the smaller side of the layers below that get A and B
DIMENSIONS = {"attention_head_dim": 4, "num_layers": 2, "sample_size": 4, "num_embeds_ada_norm": 6}
DIMENSIONS |= {"attention_bias": False}  # of queries, keys and values
CONFIGS = [
    {},
    {"gamma_modules": []},
    {"num_classes": 2, "gamma_modules": ["norm1.linear"]},
    {"gamma_modules": ["attn1.to_q", "ff.net.2"], "gamma_layers": [1], "num_classes": 4},
    {"target_modules": ["attn1.to_v", "proj_out_2"]},
    {"target_modules": [], "gamma_modules": ["attn1.to_k", "proj_out_1"]},
    {"new_biases": True},
    {"new_biases": True, "target_modules": ["attn1.to_q", "attn1.to_v"], "gamma_modules": ["attn1.to_q"], "r": 1},
    {"r": 1, "num_classes": 3},
    {"r": 2, "gamma_modules": [], "low_rank_modules": ["norm1.linear", "attn1.to_out.0", "proj_out_2"]},
]
configs, seeds = st.sampled_from(CONFIGS), st.integers(0, 1000)
scales = st.sampled_from([-1.5, 0.0, 0.3, 1.0, 2.0])


class Verbs(RuleBasedStateMachine):
    adapters = Bundle("adapters")

    @initialize(target=adapters, config=configs, seed=seeds)
    def start(self, config, seed):
        warnings.simplefilter("ignore")
        dit = make_dit(**DIMENSIONS)
        self.base = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
        self.positions = dit.pos_embed.pos_embed
        generator = torch.Generator().manual_seed(4)
        self.x = torch.randn(3, 4, 4, 4, generator=generator)
        self.timestep, self.labels = torch.tensor([3, 500, 999]), torch.tensor([0, 3, 6])
        self.model = get_peft_model(dit, DiffFitConfig(**config), adapter_name="a0").eval()
        self.bytes = [p.detach().clone() for n, p in self.model.named_parameters() if "difffit_" not in n]
        # what the model should be: adapter -> layer -> kind -> values; scales; who is active; who is merged
        self.values, self.scale, self.active, self.merged, self.count = {}, {"a0": 1.0}, ["a0"], [], 1
        self.write("a0", seed)
        return "a0"

    def write(self, adapter, seed):
        """Stands for training: random values, exact zeros and negative ones among them."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if name.endswith(f".{adapter}"):
                value = 0.3 * torch.randn(parameter.shape, generator=generator) + ("gamma" in name)
                if "gamma" in name:
                    value[:2] = torch.tensor([0.0, -1.0])
                parameter.data.copy_(value)
        self.read(adapter)

    def read(self, adapter):
        self.values[adapter] = values = {}
        for name, parameter in self.model.named_parameters():
            if name.endswith(f".{adapter}"):
                layer, kind = reference.name(name, adapter).rsplit(".", 1)
                values.setdefault(layer, {})[kind] = parameter.detach().clone()

    def composed(self, names, merged=()):
        """What reference.forward takes: the values of the adapters together."""
        adapter = {}
        for layer in {layer for values in self.values.values() for layer in values}:
            for name in [n for n in merged or names if layer in self.values[n]]:
                s = self.scale[name]
                for kind, value in self.values[name][layer].items():
                    if layer.endswith("embedding_table"):
                        rows = adapter.setdefault(f"{layer}.delta", torch.zeros(7, value.shape[1]))
                        rows[: len(value) - 1] += s * value[:-1]
                        rows[-1] += s * value[-1]
                    elif kind == "A":  # B A = Σ s_i B_i A_i, written as B = Σ s_i B_i A_i and A = 1
                        change = s * self.values[name][layer]["B"] @ value
                        adapter[f"{layer}.B"] = adapter.get(f"{layer}.B", 0) + change
                        adapter[f"{layer}.A"] = torch.eye(value.shape[1])
                    elif kind == "B":
                        continue
                    elif kind == "gamma":
                        adapter[f"{layer}.gamma"] = adapter.get(f"{layer}.gamma", 1) * (1 + s * (value - 1))
                    else:
                        adapter[f"{layer}.delta"] = adapter.get(f"{layer}.delta", 0) + s * value
        return adapter

    def expected(self, names, merged=(), samples=slice(None)):
        x, t, y = self.x[samples], self.timestep[samples], self.labels[samples]
        adapter = self.composed(names, merged)
        return reference.forward(x, t, y, self.positions, self.base, adapter, heads=2, depth=2, patch=2)

    @torch.no_grad()
    def output(self, **kwargs):
        return self.model(self.x, timestep=self.timestep, class_labels=self.labels, **kwargs).sample

    # Verbs

    @rule(target=adapters, config=configs, seed=seeds)
    def add(self, config, seed):
        name, self.count = f"a{self.count}", self.count + 1
        self.model.add_adapter(name, DiffFitConfig(**config))
        self.merged, self.scale[name] = [], 1.0  # peft unmerges what it sets active anew
        self.write(name, seed)
        return name

    @rule(names=st.lists(adapters, min_size=1, max_size=3, unique=True))
    def set_active(self, names):
        self.model.base_model.set_adapter(names)
        self.active, self.merged = names, []

    @rule(name=adapters, seed=seeds)
    def train(self, name, seed):
        if name not in self.merged:
            self.write(name, seed)

    @rule(name=adapters, scale=scales)
    def set_scale(self, name, scale):
        if name in self.merged:
            with pytest.raises(ValueError, match="is merged"):
                self.model.set_scale(name, scale)
        else:
            self.model.set_scale(name, scale)
            self.scale[name] = scale

    @precondition(lambda self: len(self.values) > 1)
    @rule(name=consumes(adapters))
    def delete(self, name):
        self.model.unmerge_adapter()
        self.merged = []
        self.model.delete_adapter(name)
        del self.values[name], self.scale[name]
        self.active = [other for other in self.active if other != name] or [next(iter(self.values))]
        assert self.model.base_model.active_adapters == self.active
        with torch.no_grad():
            output = self.model.base_model(self.x, timestep=self.timestep, class_labels=self.labels).sample
        torch.testing.assert_close(output, self.expected(self.active), **CLOSE)
        self.model.set_adapter(self.active[0])  # PeftModel itself takes note of one active adapter alone
        self.model.base_model.set_adapter(self.active)

    @rule(names=st.none() | st.lists(adapters, min_size=1, max_size=2, unique=True), safe=st.booleans())
    def merge(self, names, safe):
        self.model.merge_adapter(names, safe_merge=safe)
        self.merged += [name for name in names or self.active if name not in self.merged]

    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = []

    @rule()
    def disable(self):
        with self.model.disable_adapter():
            torch.testing.assert_close(self.output(), self.expected([]), **CLOSE)
        self.merged = []

    @rule(target=adapters, names=st.lists(adapters, min_size=1, max_size=3, unique=True), data=st.data())
    def add_weighted(self, names, data):
        weights = data.draw(st.lists(scales, min_size=len(names), max_size=len(names)))
        name, self.count = f"a{self.count}", self.count + 1
        has_low_rank = any("A" in kinds for n in names for kinds in self.values[n].values())
        if has_low_rank and sum(self.model.peft_config[n].r for n in names) > MAX_RANK:
            with pytest.raises(ValueError, match="Use a lower r"):
                self.model.add_weighted_adapter(names, weights, name)
            return multiple()
        self.model.add_weighted_adapter(names, weights, name)
        self.merged = []
        kept, self.scale = self.scale, dict(zip(names, weights, strict=True))
        blended = self.expected(names)
        self.scale = kept | {name: 1.0}
        self.read(name)
        torch.testing.assert_close(self.expected([name]), blended, **CLOSE)
        return name

    @rule(names=st.lists(adapters | st.just("__base__"), min_size=3, max_size=3))
    def adapter_per_sample(self, names):
        if self.merged:
            with pytest.raises(ValueError, match="merged adapters"):
                self.output(adapter_names=names)
            return
        mixed = self.output(adapter_names=names)
        for i, name in enumerate(names):
            alone = self.expected([] if name == "__base__" else [name], samples=slice(i, i + 1))
            torch.testing.assert_close(mixed[i : i + 1], alone, **CLOSE)

    # Refusals

    @rule(name=adapters, number=st.sampled_from([math.nan, math.inf]))
    def a_scale_that_is_not_finite(self, name, number):
        with pytest.raises(ValueError, match="finite"):
            self.model.set_scale(name, number)
        with pytest.raises(ValueError, match="finite"):
            self.model.add_weighted_adapter([name], [number], "new")

    @rule(name=adapters)
    def an_adapter_that_does_not_fit(self, name):
        with pytest.raises(ValueError):
            self.model.add_adapter("new", DiffFitConfig(gamma_layers=[7]))
        with pytest.raises(ValueError):
            self.model.add_adapter("new", DiffFitConfig(sample_size=8))
        with pytest.raises(ValueError):
            self.model.add_weighted_adapter([name, "nobody"], [1.0, 1.0], "new")
        with pytest.raises(ValueError):
            self.model.add_weighted_adapter([name], [1.0], name)
        for refused in (
            lambda: self.model.set_scale("nobody", 1.0),
            lambda: self.model.base_model.set_adapter([name, "nobody"]),
            lambda: self.model.merge_adapter([name, "nobody"]),
            lambda: self.model.merge_and_unload(adapter_names=["nobody"]),
            lambda: self.model.base_model.delete_adapter("nobody"),
        ):
            with pytest.raises(ValueError, match="no adapter 'nobody'"):
                refused()

    @rule(name=adapters)
    def a_broken_merge(self, name):
        if name in self.merged:
            return
        parameter = [p for n, p in self.model.named_parameters() if n.endswith(f".{name}")][-1]
        parameter.data.view(-1)[0] = math.nan
        with pytest.raises(ValueError, match="not finite"):
            self.model.merge_adapter([name], safe_merge=True)
        parameter.data.view(-1)[0] = 1.0
        self.read(name)

    # What always holds

    @invariant()
    def the_model_computes_the_formula(self):
        if hasattr(self, "model"):
            expected = self.expected(self.active, self.merged)
            torch.testing.assert_close(self.output(), expected, **CLOSE)
            assert set(self.model.peft_config) == set(self.values)
            merged = {n for m in self.model.modules() if isinstance(m, DiffFitLayer) for n in m.merged_adapters}
            assert merged == set(self.merged)

    @invariant()
    def the_base_is_untouched(self):
        if hasattr(self, "model") and not self.merged:
            now = [(n, p) for n, p in self.model.named_parameters() if "difffit_" not in n]
            for (name, parameter), before in zip(now, self.bytes, strict=True):
                assert torch.equal(parameter.view(torch.int32), before.view(torch.int32)), name


Verbs.TestCase.settings = settings(
    max_examples=SEQUENCES,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestVerbs = Verbs.TestCase
