"""What the benchmarks stand on: the methods compared, and the page that results are written to."""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_dit, make_inputs

pytest.importorskip(
    "efficientnet_lite_pytorch", reason="the avatars' packages are installed for the newest versions alone"
)
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import adaptation  # noqa: E402
import device  # noqa: E402
import inference  # noqa: E402
import latent_cache  # noqa: E402
import methods  # noqa: E402
import quality  # noqa: E402
import report  # noqa: E402
import resolution  # noqa: E402
import study  # noqa: E402
import training_speed  # noqa: E402


@torch.no_grad()
def output(model) -> torch.Tensor:
    return model.eval()(**make_inputs()).sample


@pytest.mark.parametrize("name", [*methods.METHODS, "floor"])
def test_every_method_starts_as_the_base_and_trains_what_it_says(name):
    base = make_dit()
    parameters = {n: p.shape for n, p in base.named_parameters()}
    embedder = sum(shape.numel() for n, shape in parameters.items() if ".0.norm1.emb." in n)
    total = sum(shape.numel() for shape in parameters.values()) - 3 * embedder  # one for all four blocks
    biases = sum(shape.numel() for n, shape in parameters.items() if n.endswith(".bias") and ".norm1.emb." not in n)
    biases += sum(shape.numel() for n, shape in parameters.items() if n.endswith(".bias") and ".0.norm1.emb." in n)
    rows = 1001 * 16
    model = methods.adapt(name, make_dit())
    assert torch.equal(output(model), output(base))
    count = sum(weight.numel() for weight in methods.trained(model).values())
    layers = 4 * [(16, 16)] * 4 + 4 * [(16, 64), (64, 16)]  # (in, out) of attention and feed-forward
    expected = {
        "full": total,
        "BitFit": biases + rows,
        "DiffFit": biases + rows + 2 * 5 * 16,
        "DiffFit, adaLN": biases + rows + 4 * 6 * 16,
        "DiffFit r=1": biases + rows + 4 * (16 + 16 + 64 + 16) - 4 * 16,
        "LoRA r=2": 2 * sum(i + o for i, o in layers),
        "LoRA r=8": 8 * sum(i + o for i, o in layers),
        "LoRA r=16": 16 * sum(i + o for i, o in layers),
        "LoHa": 2 * 8 * sum(i + o for i, o in layers),
        "LoKr": 4 * 4 * 2 * 4**2 + 4 * 2 * 2 * 4 * 8,  # factors of 16 are 4 and 4, of 64 8 and 8
        "OFT": 4 * 5 * math.comb(16, 2) + 4 * 2 * math.comb(32, 2),  # a rotation of each 32 inputs, or of all 16
        "IA³": 4 * (4 * 16 + 64 + 64),
        "GLoRA, vectors": sum(i + 4 * o for i, o in layers),
        "LN tuning": 0,
        "floor": 1,
    }
    assert count == expected[name]


def test_an_unknown_method():
    with pytest.raises(ValueError, match="'lora' is not a method: use one of full, BitFit"):
        methods.adapt("lora", make_dit())


def test_a_section_is_replaced_and_the_rest_of_the_page_left(tmp_path):
    page = tmp_path / "results.md"
    page.write_text("# Results\n\n<!-- a -->\nold\n<!-- /a -->\n\nBy hand.\n")
    report.write_section(page, "a", "new")
    report.write_section(page, "b", "appended")
    assert page.read_text() == (
        "# Results\n\n<!-- a -->\nnew\n<!-- /a -->\n\nBy hand.\n\n<!-- b -->\nappended\n<!-- /b -->\n"
    )
    page.write_text("<!-- a -->\n")
    with pytest.raises(ValueError, match="it must have <!-- a --> and after it <!-- /a -->, once each"):
        report.write_section(page, "a", "new")
    assert page.read_text() == "<!-- a -->\n"


def test_targets():
    met, missed = report.target("a", "≤", 1.0, 1.0), report.target("b", "≥", 2.0, 1.9)
    assert (met["met"], missed["met"], report.target("c", "≥", 2.0, None)["met"]) == (True, False, None)
    assert "| b | ≥ 2 | 1.9 | **not met** |" in report.targets_table([met, missed])
    with pytest.raises(ValueError, match="bound='<'"):
        report.target("a", "<", 1.0, 1.0)


NEAR = study.Cell("near", None, 200)


class Losses:
    """Stands for `adaptation.Bench`: the loss of a run is how far its learning rate is, in decades, from the best."""

    def __init__(self, best: float) -> None:
        self.best, self.made = best, {}

    def result(self, run):
        rate = run.learning_rate or 1e-9  # that of the base, which is not trained, is 0
        return self.made.setdefault(run, {"loss": abs(math.log10(rate / self.best))})

    def stored(self, run):
        return self.made.get(run)


@pytest.mark.parametrize(
    "best, rates, chosen",
    [
        (1e-2, [0.003, 0.01, 0.03], 0.01),
        (1e-1, [0.003, 0.01, 0.03, 0.09, 0.3], 0.09),  # goes on beyond the edge, until the best is inside
        (1e-5, [0.003, 0.01, 0.03, 0.0009, 0.0003], 0.0003),  # twice at most
    ],
)
def test_a_sweep_goes_on_beyond_its_edge_and_chooses_the_lowest_loss(best, rates, chosen):
    form = study.Form({"DiffFit": (0.003, 0.01, 0.03)}, (NEAR,), study.Cell("far", None, 60), (0, 1), 10, 1, 1)
    bench = Losses(best)
    sweep = study.Study(form, bench, "no")
    assert sweep.best(NEAR, "DiffFit") is None  # nothing is made yet
    run = sweep.best(NEAR, "DiffFit", make=True)
    assert (run.domain, run.learning_rate, run.steps, run.num_images) == ("near", chosen, 200, 10)
    made = [(r.domain, r.learning_rate, r.steps, r.num_images) for r in bench.made]
    assert made == [("far", rate, 60, 0) for rate in rates]
    assert sweep.best(NEAR, "DiffFit") == run  # from what is made


def test_methods_are_compared_at_the_seeds_that_all_have():
    rates = {name: (1e-3, 1e-2, 1e-1) for name in ("full", "DiffFit", "LoRA r=2")}
    form = study.Form(rates, (NEAR,), dataclasses.replace(NEAR, steps=0), (0, 1, 2), 10, 1, 1)
    bench = Losses(1e-2)
    partial = study.Study(form, bench, "no")
    assert study.stored(partial, NEAR) == {}
    for name, made in {"full": (0, 1, 2), "DiffFit": (0, 2), "LoRA r=2": (1,)}.items():
        for seed in made:
            bench.result(partial.run(NEAR, name, 1e-2, seed))
    rows = study.stored(partial, NEAR)
    assert {name: [run.seed for run, _ in made] for name, made in rows.items()} == {"full": [0, 2], "DiffFit": [0, 2]}
    assert study.seeds(rows) == "0, 2"
    assert study.center(rows["full"], "loss") == 0 and study.center(rows["full"], "fid") is None


def test_a_study_says_what_is_to_be_done_and_does_it_once():
    rates = {name: (1e-3, 1e-2, 1e-1) for name in ("full", "DiffFit")}
    every = [*rates, "γ on attention"]
    few = study.Cell("near", 20, 100)
    no_sweep = dataclasses.replace(NEAR, steps=0)
    form = study.Form(rates, (NEAR, few), no_sweep, (0,), 10, 1, 1, variants=("γ on attention",))
    bench = Losses(1e-2)
    whole = study.Study(form, bench, "no")
    assert whole.outlook([NEAR, few], every).startswith("8 runs of 900 steps in all are to be made")
    bench.made[whole.run(NEAR, "full", 1e-2)] = {"seconds": 720.0}
    assert whole.outlook([NEAR, few], every).endswith("beside the sweeps of learning rates: about 0.7 hours.")
    whole.make([NEAR], ["DiffFit"])
    assert {(run.method, run.steps) for run in bench.made} == {("full", 200), ("DiffFit", 0), ("DiffFit", 200)}
    assert whole.outlook([NEAR], ["full", "DiffFit"]) == "All runs are made."
    whole.make([NEAR], every)
    assert len(bench.made) == 4 and {run.images_per_class for run in bench.made} == {None}
    assert whole.outlook([NEAR], every) == "All runs are made."


def test_the_best_step_is_the_one_with_the_lowest_distance():
    curve = [{"step": 30, "fid": 9.0}, {"step": 100, "fid": 5.0}, {"step": 200, "fid": 7.0}]
    assert study.best_step({"curve": curve}) == curve[1]
    pairs = [(None, {"curve": curve}), (None, {"curve": curve[:1]})]
    assert study.at_best(pairs) == 7.0 and study.at_best([(None, {"diverged": "why"})]) is None
    assert study.at_best([]) is None


def test_methods_are_compared_at_equal_seconds():
    ours = {"seconds_per_step": 1.0, "curve": [{"step": s, "fid": f} for s, f in ((10, 8.0), (100, 4.0))]}
    theirs = {"seconds_per_step": 2.0, "curve": [{"step": s, "fid": f} for s, f in ((5, 8.0), (50, 4.0), (500, 2.0))]}
    assert resolution.at_equal_seconds([(None, ours)], [(None, theirs)]) == pytest.approx(1.0)  # after 100 seconds
    assert resolution.at_equal_seconds([(None, ours)], [(None, {"diverged": "why"})]) is None


@pytest.mark.parametrize("count, trained", [(None, 15), (3, 6)])
def test_no_run_trains_on_what_learning_rates_are_chosen_by(count, trained):
    """Few images are the first of those that many are of."""

    class Latents(list):
        labels = torch.arange(16) % 2

    bench = SimpleNamespace(_encoded=lambda *key: Latents(range(16)))
    run = adaptation.Run("near", "full", 1e-3, 0, 100, 0, images_per_class=count)
    train, chosen_by = adaptation.Bench._split(bench, run)
    everything, apart = adaptation.Bench._split(bench, dataclasses.replace(run, images_per_class=None))
    assert len(train) == len({*train}) == trained and {*train} <= {*everything} and [*chosen_by] == [*apart]
    assert {*train}.isdisjoint(chosen_by) and len(everything) + len(apart) == 16
    if count:
        assert sorted(index % 2 for index in train) == [0] * count + [1] * count


def test_memorised_is_nearer_than_real_images_come():
    train, real = torch.zeros(1, 1), torch.linspace(1, 2, 101)[:, None]
    judge = SimpleNamespace(network=lambda images: images, real=real)  # nearest to a training image: 1.01, of a 100th
    images = torch.tensor([[0.0], [1.0], [1.02], [5.0]])
    assert adaptation.Judge.memorised(judge, images, train) == 0.5


def test_what_is_asked_of_difffit():
    def made(parameters, *distances, memorised=0.0):
        curve = [{"step": step, "fid": fid} for step, fid in zip((100, 300), distances, strict=True)]
        return [(None, {"parameters": parameters, "curve": curve, "fid": distances[-1], "memorised": memorised})]

    rows = {
        "base": [(None, {"fid": 200.0})],
        "full": made(1000, 90.0, 150.0, memorised=0.5),
        "DiffFit": made(10, 100.0, 75.0, memorised=0.01),
        "BitFit": made(8, 120.0, 60.0),
        "LoRA r=2": made(20, 80.0, 100.0),
        "LoRA r=8": made(90, 50.0, 55.0),
        "γ on attention": made(9, 20.0, 30.0),  # ours
    }
    measured = {t["what"]: t["measured"] for t in quality.targets_of(quality.NEAR_FEW, rows)}
    assert [*measured.values()] == [75 / 90, 0.5, 0.02, 75 / 60, None]
    assert "(BitFit)" in [*measured][3]
    rows["full"] = made(1000, 90.0, 150.0, memorised=0.01)  # nothing to compare with
    assert quality.targets_of(quality.NEAR_FEW, rows)[2]["measured"] is None


def test_a_diverged_run_is_not_chosen():
    form = study.Form({"full": (1e-4, 1e-3, 1e-2)}, (NEAR,), dataclasses.replace(NEAR, steps=60), (0,), 10, 1, 1)
    bench = Losses(1e-3)
    sweep = study.Study(form, bench, "no")
    run = dataclasses.replace(sweep.run(form.sweep, "full", 1e-3), num_images=0)
    bench.made[run] = {"diverged": "why"}
    assert sweep.best(NEAR, "full", make=True).learning_rate in (1e-4, 1e-2)
    assert study.cells_of([{"loss": 1.0}, {"diverged": "why"}], ["loss", "fid"]) == ["diverged"] * 2


def test_a_profile_shows_the_longest_of_any_method_and_sums_up():
    profiles = {"a": {f"aten::op{i}": float(i) for i in range(12)}, "b": {"aten::op0": 20.0}}
    lines = training_speed.profile_table(profiles).splitlines()[2:]
    assert lines[0] == "| op0 | 0.000 | 20.000 |" and len(lines) == training_speed.NUM_OPERATORS + 2
    assert lines[-2:] == ["| all others | 6.000 | 0.000 |", "| sum | 66.000 | 20.000 |"]


@pytest.fixture
def tiny(monkeypatch):
    def make(num_layers, dtype=torch.float32, sample_size=32):
        return make_dit(num_layers=num_layers, sample_size=sample_size).to(dtype)

    for benchmark in (training_speed, inference):
        monkeypatch.setattr(benchmark, "dit_xl_2", make)


@pytest.mark.parametrize(
    ("benchmark", "args", "reference", "name"),
    [(training_speed, (4,), "full", "DiffFit + int8 base"), (inference, (), "base", "DiffFit, merged")],
)
def test_what_runs_on_a_gpu_runs_on_a_cpu_at_a_tiny_size(tiny, benchmark, args, reference, name):
    results = {n: benchmark.on_device(n, 2, "cpu", *args, num_layers=1, rounds=2) for n in (reference, name)}
    assert all(len(result["seconds"]) == 2 and result["peak_bytes"] > 0 for result in results.values())
    lines = device.device_table("32 pixels", reference, {2: results, 4: dict.fromkeys(results)}).splitlines()
    assert lines[0] == "| 32 pixels | batch 2 | batch 4 | within 24 GB | within 80 GB |"
    assert "(1.00x, " in lines[2] and "does not fit" in lines[3] and lines[3].endswith(" at 2 |")


def test_the_long_form_measures_every_target_or_says_what_would(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training_speed, "product_seconds", lambda dtype: 1.0)  # on every machine, bf16 is timed
    monkeypatch.setattr(training_speed, "in_fresh_process", lambda function, *args: function(*args))
    readings = itertools.count()
    monkeypatch.setattr(training_speed, "resident", lambda field: next(readings))
    monkeypatch.setattr(training_speed, "DEPTHS", (1, 2))
    monkeypatch.setattr(training_speed, "FULL_DEPTH", 3)
    monkeypatch.setattr(training_speed, "ALL", training_speed.OF_TARGETS)
    monkeypatch.setattr(training_speed, "PROFILED", ["floor"])
    monkeypatch.setattr(sys, "argv", ["training_speed.py", "--output_dir", str(tmp_path), "--rounds", "2", "2"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    training_speed.main()
    record = json.loads((tmp_path / "training_speed.json").read_text())
    targets = {t["what"]: t for t in record["targets"]}
    for what in ("of what can be had, full ÷ DiffFit by full ÷ floor", "DiffFit ÷ BitFit, seconds per step"):
        for precision in ("fp32", "bf16"):
            assert all(targets[f"{what}, {precision}{w}"]["measured"] for w in ("", ", batch 16", ", 3 blocks"))
    ours, theirs = (sum(record["results"]["alone"]["3"]["fp32"][name]["seconds"]) for name in ("DiffFit", "BitFit"))
    assert targets["DiffFit ÷ BitFit, seconds per step, fp32, 3 blocks"]["measured"] == ours / theirs
    (ours,), (theirs,) = (
        record["results"]["larger_batch"]["bf16"]["2"][name] for name in ("full", "DiffFit + int8 base")
    )
    int8 = targets["full ÷ DiffFit with its base in int8, seconds per step, bf16, batch 16"]
    assert int8["measured"] == pytest.approx(sum(ours) / sum(theirs))
    unmeasured = {what: t["unmeasured"] for what, t in targets.items() if t["measured"] is None}
    assert unmeasured == dict.fromkeys(training_speed.OF_A_GPU, "needs a GPU: `training_speed.py --device cuda`")
    assert "| needs a GPU: " in report.targets_table(targets.values())


@torch.no_grad()
def test_adapters_are_loaded_and_mixed_in_any_dtype(tiny, monkeypatch):
    monkeypatch.setattr(inference, "SEVERAL", 2)
    options = {"dtype": torch.bfloat16, "num_layers": 1, "rounds": 1}
    loading, mixed = inference.adapters(**options), inference.mixed("DiffFit", batch=2, **options)
    assert [*mixed] == ["one active", "1", "2"] and all(len(s) == 1 for s in (loading | mixed).values())
    lines = inference.adapter_tables(loading, {"DiffFit": mixed}, 1)
    assert "| load 2, one by one |" in lines[1] and "| DiffFit, 2 different |" in lines[3]


def test_a_batch_that_does_not_fit():
    with pytest.raises(SystemExit, match="A batch of 2 does not fit"):
        device.check_measured({4: {"base": {"seconds": [1.0]}}, 2: {"base": None}}, "base")

    def make():
        raise torch.OutOfMemoryError

    assert device.measure(make, torch.device("cpu"), rounds=1) is None


def test_methods_of_peft_train_the_same_class_rows():
    for name in ("LoRA r=2", "BitFit"):
        weights = methods.trained(methods.adapt(name, make_dit(), num_classes=5))
        rows = [weight for key, weight in weights.items() if "embedding_table" in key]
        assert [weight.shape for weight in rows] == [(6, 16)], name
        assert ("lora" in "".join(weights)) == (name == "LoRA r=2")
    full = methods.adapt("full", make_dit(), num_classes=5)
    table = full.norm1_emb.class_embedder.embedding_table.weight
    assert torch.equal(table[:5], table[-1:].expand(5, -1)) and not torch.equal(table[5], table[-1])


def test_the_loader_is_measured_on_what_a_run_loads_from():
    found = latent_cache.loading(10, 2, make_dit(num_layers=1, sample_size=8), batch=4)
    assert (found["images"], len(found["opening"]), len(found["batches"]), len(found["steps"])) == (10, 2, 3, 2)
    assert latent_cache.share(found | {"batches": [0.001, 0.002, 0.5], "steps": [0.4, 0.2]}) == pytest.approx(0.2 / 0.3)
    assert latent_cache.loading_table([found | {"images": 200_000}]).splitlines()[2].startswith("| 200,000 | ")
