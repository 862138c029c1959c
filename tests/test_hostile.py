"""Adapters from strangers: hostile and corrupted files are refused fast, and leave the pipeline as it was."""

import json
import pickle
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import make_inputs, make_pipeline, save_adapter
from safetensors.torch import load_file, save_file

from difffit_peft import DiffFitDiTPipeline

FILE = "adapter_model.safetensors"
MILLION = 1_000_000
NUMBERS = [-1, 0, 10**12, -(10**400), 1.5, "3", True, [], {}]
EXPRESSIONS = [r"([a-z_.\d]+)+!", "(?:a{65000}){65000}", "(?R)", "proj_out_1", "", "[", "*", "\0"]  # none is in a file
PATTERNS = [*EXPRESSIONS, 3, {}, [""], [3], [["to_q"]], [None], ["to_q"] * 5_000, ["a" * 900_000]]
FIELDS = {
    "target_modules": PATTERNS,
    "exclude_modules": [*EXPRESSIONS, 3, {"a": 1}, [""], [3], ["to_q"] * 5_000],
    "gamma_modules": PATTERNS,
    "gamma_layers": [[-1], [10**9], [1.5], ["0"], [True], [[0]], "0", {"0": 0}, list(range(5_000)), 3],
    "r": NUMBERS + [0, 2, 17],
    "low_rank_modules": PATTERNS,
    "num_classes": NUMBERS,
    "id2label": [
        *({}, [], "fox", 3, {"x": "fox"}, {"-1": "fox"}, {"0": "fox", "2": "owl"}, {"0": 1}, {"0": None}),
        *({"0": ["fox"]}, {"0": "fox"}, {str(i): "fox" for i in range(2_000)}, {"9" * 5_000: "fox"}),
    ],
    "init_class_rows": ["zero", "../null", 3, None, [], {}, ["0"], [0.5], [10**6] * 2],
    "sample_size": [n for n in NUMBERS if n] + [0, 7, 10**9, 130],
    "background": ["sky", "", "#ffffff80", "white" * 5_000, 3, True, [], ["red"], {"r": 1}],
    "modules_to_save": ["proj_out_2", ["(a+)+$"], [".*"], [""], ["../x"], [3], ["nowhere"], ["x"] * 5_000, {"a": 1}],
    "new_biases": ["yes", 3, None, []],
    "init_weights": ["yes", 3, None, []],
    "format_version": [n for n in NUMBERS if n != 0],
    "base_config": [[], 3, "x", *({"num_layers": value} for value in NUMBERS), {"unknown": 1}, {"sample_size": "8"}],
    "component": ["vae", "unet_2", "../unet", "", 3, True, [], {}],
    "peft_type": ["LORA", "NONE", "difffit", 3, None, [], {}, "../DIFFFIT"],
    "task_type": ["CAUSAL_LM", "SEQ_CLS", "none", 3, {}, []],
}
BASES = [
    *("https://evil.example/base", "http://127.0.0.1/x", "file:///etc/passwd", "/etc", "../../base", "..", ".", "~"),
    *(
        "a/b/c",
        "a\\b",
        "C:\\base",
        "a b",
        "-x",
        "x" * 300,
        "a--b",
        "a..b",
        "\0",
        "a\nb",
        "",
        3,
        ["a/b"],
        {"a": 1},
        None,
    ),
    *("base.git", "../", "//evil.example/base", "a/../../b", "\u202ebase", "s3://bucket/base"),
]


def write_raw(content: bytes):
    return lambda folder: (folder / "adapter_config.json").write_bytes(content)


def write_weights(change):
    """`change` gets the file's bytes and returns others."""

    def corrupt(folder: Path) -> None:
        file = folder / FILE
        file.write_bytes(change(file.read_bytes()))

    return corrupt


def edit_tensors(change):
    """`change` gets the file's tensors and the names of its γ and δ, and edits them in place."""

    def corrupt(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        change(tensors, sorted(tensors))
        save_file(tensors, folder / FILE)

    return corrupt


def with_header(header: bytes, size: int | None = None):
    return write_weights(lambda _: (len(header) if size is None else size).to_bytes(8, "little") + header + b"\0" * 64)


def replace(index: int, function):
    def change(tensors, names):
        tensors[names[index]] = function(tensors[names[index]]).contiguous()

    return edit_tensors(change)


def add(name: str, shape: tuple[int, ...] = (4,)):
    return edit_tensors(lambda tensors, names: tensors.update({name: torch.zeros(shape)}))


RAW = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"3",
    "string": b'"DIFFFIT"',
    "no peft_type": b"{}",
    "open": b'{"peft_type": "DIFFFIT"',
    "nan": b'{"peft_type": "DIFFFIT", "sample_size": NaN}',
    "infinity": b'{"peft_type": "DIFFFIT", "num_classes": Infinity}',
    "byte order mark": b'\xef\xbb\xbf{"peft_type": "DIFFFIT"}',
    "utf-16": '{"peft_type": "DIFFFIT"}'.encode("utf-16"),
    "latin-1": b'{"peft_type": "DIFFFIT", "id2label": {"0": "\xe9"}}',
    "nested lists": b"[" * 500_000,
    "nested objects": b'{"a":' * 200_000,
    "two megabytes of blanks": b" " * 2**21,
    "a million layers": json.dumps({"peft_type": "DIFFFIT", "gamma_layers": list(range(MILLION))}).encode(),
    "a million names": json.dumps({"peft_type": "DIFFFIT", "target_modules": ["a"] * MILLION}).encode(),
    "a million classes": json.dumps({"peft_type": "DIFFFIT", "id2label": dict.fromkeys(range(MILLION), "x")}).encode(),
    "a number of a million digits": b'{"peft_type": "DIFFFIT", "num_classes": ' + b"9" * MILLION + b"}",
    "zeros": bytes(1000),
    "pickle": pickle.dumps({"peft_type": "DIFFFIT"}),
}
WEIGHTS = {
    "empty": write_weights(lambda data: b""),
    "text": write_weights(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "pickle": write_weights(lambda data: pickle.dumps({"a": 1})),
    "zip": write_weights(lambda data: b"PK\x03\x04" + data),
    "one byte more": write_weights(lambda data: data + b"\0"),
    "header longer than the file": with_header(b"{}", 2**40),
    "header of 2**64 - 1 bytes": with_header(b"{}", 2**64 - 1),
    "no header": with_header(b"", 0),
    "header is no JSON": with_header(b"{[}"),
    "header nested": with_header(b"[" * 100_000),
    "negative offset": with_header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}'),
    "offsets beyond the file": with_header(b'{"a":{"dtype":"F32","shape":[1048576],"data_offsets":[0,4194304]}}'),
    "shape overflows": with_header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,64]}}'),
    "overlapping": with_header(
        b'{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},"b":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}'
    ),
    "unknown dtype": with_header(b'{"a":{"dtype":"Q4","shape":[16],"data_offsets":[0,64]}}'),
    "other weights": with_header(b'{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}'),
    "missing": lambda folder: (folder / FILE).unlink(),
    "a folder": lambda folder: (folder / FILE).unlink() or (folder / FILE).mkdir(),
    "pickled weights instead": lambda folder: (folder / FILE).rename(folder / "adapter_model.bin"),
    "base's output layer": add("base_model.model.proj_out_2.weight", (32, 16)),
    "base's wrapped layer": add("base_model.model.proj_out_2.base_layer.weight", (32, 16)),
    "base's positions": add("base_model.model.pos_embed.pos_embed", (1, 16, 16)),
    "a path": add("../../../etc/passwd"),
    "a dunder": add("base_model.model.__class__.difffit_delta"),
    "no name": add(""),
    "another adapter's": add("base_model.model.proj_out_2.difffit_delta.other"),
    "a layer that is not there": add("base_model.model.transformer_blocks.99.attn1.to_q.difffit_delta", (16,)),
} | {
    f"truncated at {share:.0%}": write_weights(lambda data, share=share: data[: int(len(data) * share)])
    for share in (0.001, 0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
} | {
    f"{kind} in tensor {i}": replace(i, function)
    for kind, function in {
        "nan": lambda t: t.index_fill(0, torch.tensor([0]), float("nan")),
        "infinity": lambda t: t.index_fill(0, torch.tensor([0]), float("inf")),
        "integers": lambda t: t.long(),
        "float8": lambda t: t.to(torch.float8_e4m3fn),
        "booleans": lambda t: t.bool(),
        "one value more": lambda t: torch.cat([t, t[:1]]),
        "no values": lambda t: t[:0],
        "one dimension more": lambda t: t[None],
        "a scalar": lambda t: t.flatten()[0].clone(),
    }.items()
    for i in (0, 7, -1)
} | {
    f"lacks tensor {i}": edit_tensors(lambda tensors, names, i=i: tensors.pop(names[i])) for i in range(0, 40, 2)
}  # fmt: skip
CASES = (
    {f"{field}={str(v)[:40]} ({i})": {field: v} for field, values in FIELDS.items() for i, v in enumerate(values)}
    | {f"config: {name}": write_raw(content) for name, content in RAW.items()}
    | {f"weights: {name}": corrupt for name, corrupt in WEIGHTS.items()}
)  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter that loads, with γ, a change of rank 1, and class rows."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, id2label={0: "fox", 1: "owl"}, r=1)
    return folder


@pytest.fixture(scope="module", params=["first", "second"])
def pipe(request, adapter) -> DiffFitDiTPipeline:
    """A pipeline without adapters, or with one."""
    pipe = DiffFitDiTPipeline.from_pipe(make_pipeline())
    if request.param == "second":
        pipe.load_difffit_weights(adapter, "good")
    return pipe


@torch.no_grad()
def seen(pipe: DiffFitDiTPipeline) -> tuple:
    """All that a user could see change."""
    return (
        pipe.transformer(**make_inputs()).sample.numpy().tobytes(),
        pipe.labels,
        pipe.get_active_adapters(),
        pipe.get_list_adapters(),
        pipe.transformer.config.sample_size,
        [name for name, _ in pipe.transformer.named_modules()],
        {name: tuple(tensor.shape) for name, tensor in pipe.transformer.state_dict().items()},
    )


def edited(adapter: Path, folder: Path, case) -> Path:
    shutil.copytree(adapter, folder)
    if isinstance(case, dict):
        config = folder / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | case))
    else:
        case(folder)
    return folder


def test_there_are_many():
    assert len(CASES) + len(BASES) >= 200


@pytest.mark.parametrize("name", CASES)
def test_hostile_adapters_are_refused(pipe, adapter, tmp_path, name):
    before = seen(pipe)
    folder = edited(adapter, tmp_path / "adapter", CASES[name])
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        pipe.load_difffit_weights(folder, "hostile")
    assert time.process_time() - start < 1
    assert len(str(error.value)) < 2_000
    assert seen(pipe) == before


def test_flipped_bits_are_refused_or_load(pipe, adapter, tmp_path):
    """Not every flipped bit can be seen; what loads can be taken off again."""
    before, order, refused = seen(pipe), random.Random(0), 0
    for i in range(100):
        folder = edited(adapter, tmp_path / str(i), lambda folder: None)
        file = folder / order.choice(["adapter_config.json", FILE])
        data = bytearray(file.read_bytes())
        data[order.randrange(min(len(data), 4_000))] ^= 1 << order.randrange(8)
        file.write_bytes(data)
        try:
            pipe.load_difffit_weights(folder, "flipped")
        except ValueError:
            refused += 1
        else:
            pipe.delete_adapters("flipped")
            if pipe.get_list_adapters():
                pipe.set_adapters("good")
        assert seen(pipe) == before
    assert refused > 30


# no backslash: pytest escapes ids of this kind anew each time that it collects in one process, as `make mutants` does
@pytest.mark.parametrize("base", BASES, ids=lambda base: ascii(base)[:40].replace("\\", "/"))
def test_a_base_that_is_no_id_of_the_hub_is_not_loaded(adapter, tmp_path, base):
    folder = edited(adapter, tmp_path / "adapter", {"base_model_name_or_path": base})
    start = time.process_time()
    with pytest.raises(ValueError, match="load the base with from_pretrained|Load the base with from_pretrained"):
        DiffFitDiTPipeline.from_pretrained(folder)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a.b", "a/b", "/etc/x", "a\\b"])
def test_names_that_are_paths(pipe, adapter, name):
    before = seen(pipe)
    with pytest.raises(ValueError, match="must not be empty, nor hold a dot or a slash"):
        pipe.load_difffit_weights(adapter, name)
    assert seen(pipe) == before


def test_names_of_a_saved_pipelines_adapters_stay_in_its_folder(adapter, tmp_path):
    pipe = DiffFitDiTPipeline.from_pipe(make_pipeline())
    pipe.load_difffit_weights(adapter, "good")
    pipe.save_pretrained(tmp_path / "saved")
    active = tmp_path / "saved" / "adapters" / "active.json"
    for content in ('{"../../x": 1.0}', '{"good": "x"}', "[1]", "{", '{"good": NaN}'):
        active.write_text(content)
        with pytest.raises(ValueError):
            DiffFitDiTPipeline.from_pretrained(tmp_path / "saved")
