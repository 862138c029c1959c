"""The two tables in docs/api.md of what each verb does with an adapter that is unknown, inactive, disabled or merged.

Every cell is tried. One that says "refused" must raise and change nothing; after any other, the model computes with the
adapters named here. The adapters train different layers, so that one that should have no effect is seen in any layer.
"""

import re
from pathlib import Path

import pytest
import torch
from conftest import CLOSE, make_dit, make_inputs, make_pipeline, save_adapter
from peft import PeftModel

from difffit_peft import DiffFitDiTPipeline, hotswap_adapter

DOCS = Path(__file__).parents[1] / "docs" / "api.md"
STATES = ["unknown", "inactive", "disabled", "merged"]  # the columns
NAMES = {"unknown": "nobody", "inactive": "c"}  # else a, which is active, as b is
CONFIGS = {
    "a": {"gamma_modules": ["attn1.to_q"], "id2label": {0: "ant"}},
    "b": {"target_modules": ["attn1.to_v", "proj_out_2"], "gamma_modules": []},
    "c": {"id2label": {0: "cow", 1: "cat"}},
}
REFUSED, NOT_ASKED = "refused", "–"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The adapters a, b and c of `make_dit()`, and c again as `nobody`."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate([*CONFIGS.items(), ("nobody", CONFIGS["c"])]):
        save_adapter(folder / name, min(seed, 2), **config)
    return folder


@torch.no_grad()
def output(model) -> torch.Tensor:
    return model(**make_inputs()).sample


def disabled_output(model) -> torch.Tensor:
    with model.disable_adapter():
        return output(model)


def adapted(folder: Path) -> PeftModel:
    """A model with the adapters a, b and c, of which a and b are active."""
    model = PeftModel.from_pretrained(make_dit(), folder / "a", "a")
    model.load_adapter(folder / "b", "b")
    model.load_adapter(folder / "c", "c")
    model.base_model.set_adapter(["a", "b"], inference_mode=True)
    return model.eval()


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, torch.Tensor]:
    """What a model computes with adapters, by their names; with none, the base."""
    model, outputs = adapted(folder), {}
    for names in ("a", "b", "c", "ab", "ac"):
        model.base_model.set_adapter([*names])
        outputs[names] = output(model)
    outputs[""] = output(make_dit())
    assert len({tensor.numpy().tobytes() for tensor in outputs.values()}) == len(outputs)
    return outputs


def rows(verbs: dict) -> list[tuple[str, str]]:
    return [(verb, state) for verb in verbs for state in STATES]


def cell(verb: str, state: str) -> str:
    """What the docs say."""
    (row,) = re.findall(
        rf"^\| `{re.escape(verb)}` \|(.*)\|$",
        DOCS.read_text(encoding="utf-8").partition("## What verbs do with names")[2],
        re.MULTILINE,
    )
    return row.split(" | ")[STATES.index(state)].strip()


# PEFT's verbs, and what the model computes with after each; a tensor is what the verb itself computes
PEFT = {
    "set_adapter(name)": (lambda m, n, path: m.set_adapter(n), [REFUSED, "c", "", "a"]),
    "base_model.set_adapter([name])": (lambda m, n, path: m.base_model.set_adapter([n]), [REFUSED, "c", "", "a"]),
    "delete_adapter(name)": (lambda m, n, path: m.delete_adapter(n), [REFUSED, "ab", "", REFUSED]),
    "set_scale(name, scale)": (lambda m, n, path: m.set_scale(n, 1.0), [REFUSED, "ab", "", REFUSED]),
    "add_weighted_adapter([name], [weight], new)": (
        lambda m, n, path: m.add_weighted_adapter([n], [1.0], "new"),
        [REFUSED, "ab", "", "ab"],
    ),
    "model(..., adapter_names=[name, ...])": (
        lambda m, n, path: output(lambda **inputs: m(**inputs, adapter_names=[n] * 5)),
        [REFUSED, "c", "", REFUSED],
    ),
    "merge_adapter([name])": (lambda m, n, path: m.merge_adapter([n]), [REFUSED, "c", REFUSED, "a"]),
    "merge_and_unload(adapter_names=[name])": (
        lambda m, n, path: output(m.merge_and_unload(adapter_names=[n])),
        [REFUSED, "c", REFUSED, "a"],
    ),
    "unmerge_adapter()": (lambda m, n, path: m.unmerge_adapter(), [NOT_ASKED, NOT_ASKED, "", "ab"]),
    "unload()": (lambda m, n, path: output(m.unload()), [NOT_ASKED, NOT_ASKED, "", ""]),
    "with disable_adapter()": (
        lambda m, n, path: disabled_output(m),
        [NOT_ASKED, NOT_ASKED, "", ""],
    ),
    "hotswap_adapter(model, path, name)": (
        lambda m, n, path: hotswap_adapter(m, path / n, n),
        [REFUSED, "ab", "", REFUSED],
    ),
    "save_pretrained(folder, selected_adapters=[name])": (
        lambda m, n, path: m.save_pretrained(path / "out", selected_adapters=[n], save_embedding_layers=False),
        [REFUSED, "ab", "", "a"],
    ),
}


@pytest.mark.parametrize(("verb", "state"), rows(PEFT))
def test_verbs_of_peft(folder, expected, verb, state):
    do, effects = PEFT[verb]
    effect = effects[STATES.index(state)]
    assert (
        cell(verb, state).startswith(effect) if effect in (REFUSED, NOT_ASKED) else "refused" not in cell(verb, state)
    )
    if effect == NOT_ASKED:
        return
    model, name = adapted(folder), NAMES.get(state, "a")
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    elif state == "merged":
        model.merge_adapter(["a"])
    before = output(model)
    if effect == REFUSED:
        with pytest.raises(ValueError, match="nobody" if state == "unknown" else f"{state}|unmerge"):
            do(model, name, folder)
        assert torch.equal(output(model), before)
        assert model.base_model.active_adapters == ["a", "b"] and list(model.peft_config) == ["a", "b", "c"]
        return
    result = do(model, name, folder)
    result = result if isinstance(result, torch.Tensor) else output(model)
    torch.testing.assert_close(result, expected[effect], **CLOSE)


PIPELINE = {
    "set_adapters(name)": (lambda p, n, path: p.set_adapters(n), [REFUSED, "c", "a", REFUSED]),
    "delete_adapters(name)": (lambda p, n, path: p.delete_adapters(n), [REFUSED, "ab", "", REFUSED]),
    "load_difffit_weights(path, new)": (
        lambda p, n, path: p.load_difffit_weights(path / "c", "new"),
        [NOT_ASKED, NOT_ASKED, "c", REFUSED],
    ),
    "load_difffit_weights(path, name, hotswap=True)": (
        lambda p, n, path: p.load_difffit_weights(path / n, n, hotswap=True),
        [REFUSED, "c", "a", REFUSED],
    ),
    "fuse_difffit([name])": (lambda p, n, path: p.fuse_difffit([n]), [REFUSED, "c", REFUSED, "a"]),
    "fuse_difffit()": (lambda p, n, path: p.fuse_difffit(), [NOT_ASKED, NOT_ASKED, REFUSED, "a"]),
    "unfuse_difffit()": (lambda p, n, path: p.unfuse_difffit(), [NOT_ASKED, NOT_ASKED, "", "ab"]),
    "disable_difffit()": (lambda p, n, path: p.disable_difffit(), [NOT_ASKED, NOT_ASKED, "", REFUSED]),
    "enable_difffit()": (lambda p, n, path: p.enable_difffit(), [NOT_ASKED, NOT_ASKED, "ab", REFUSED]),
    "unload_difffit_weights()": (lambda p, n, path: p.unload_difffit_weights(), [NOT_ASKED, NOT_ASKED, "", ""]),
    "save_difffit_weights(folder, name)": (
        lambda p, n, path: p.save_difffit_weights(path / "saved" / n, n),
        [REFUSED, "ab", "", "a"],
    ),
    "push_difffit_to_hub(repo_id, name)": (
        lambda p, n, path: p.push_difffit_to_hub(f"me/table-{n}", n),
        [REFUSED, "ab", "", "a"],
    ),
    "save_pretrained(folder)": (
        lambda p, n, path: p.save_pretrained(path / f"pipeline-{n}-{p.get_active_adapters()}"),
        [NOT_ASKED, NOT_ASKED, "", "a"],
    ),
}


@pytest.mark.parametrize(("verb", "state"), rows(PIPELINE))
def test_verbs_of_the_pipeline(folder, expected, verb, state):
    """Here also: what is listed as active is what has an effect, and class names belong to it."""
    do, effects = PIPELINE[verb]
    effect = effects[STATES.index(state)]
    assert (
        cell(verb, state).startswith(effect) if effect in (REFUSED, NOT_ASKED) else "refused" not in cell(verb, state)
    )
    if effect == NOT_ASKED:
        return
    pipe, name = DiffFitDiTPipeline.from_pipe(make_pipeline()), NAMES.get(state, "a")
    pipe.labels = {"tench": 0}
    for adapter in CONFIGS:
        pipe.load_difffit_weights(folder / adapter, adapter)
    pipe.set_adapters(["a", "b"])
    if state == "disabled":
        pipe.disable_difffit()
    elif state == "merged":
        pipe.fuse_difffit(["a"])
    if effect == REFUSED:
        listed = pipe.get_list_adapters(), pipe.get_active_adapters(), dict(pipe.labels)
        with pytest.raises(ValueError, match="nobody" if state == "unknown" else f"{state}|unfuse"):
            do(pipe, name, folder)
        assert (pipe.get_list_adapters(), pipe.get_active_adapters(), dict(pipe.labels)) == listed
        effect = {"unknown": "ab", "disabled": "", "merged": "a"}[state]
    else:
        do(pipe, name, folder)
    torch.testing.assert_close(output(pipe.transformer), expected[effect], **CLOSE)
    assert "".join(pipe.get_active_adapters()).replace("new", "c") == effect
    assert pipe.labels == {"": {"tench": 0}, "c": {"cow": 0, "cat": 1}}.get(effect, {"ant": 0})
