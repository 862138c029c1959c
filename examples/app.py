"""A page in the browser that draws with a base and its adapters.

    pip install -e ".[app]"
    python examples/app.py
    python examples/app.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 --adapters me/dit-food101 me/dit-art

Choose adapters and their scales, a class, guidance by the class or by the base, and seeds. Beside what the adapters
draw stands what the base draws of the same seeds, and below it the code that makes the picture. Only this machine can
open the page, unless `--server_name 0.0.0.0` says otherwise.
"""

import argparse
import math
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
import torch
from difffit_peft import DiffFitDiTPipeline
from difffit_peft.training.scripts import run_script
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import make_image_grid
from httpx import HTTPError
from huggingface_hub.errors import HFValidationError

EXAMPLES = Path(__file__).resolve().parent
SHOWN_SIDE = 160  # pixels of a picture on the page, at least


class Studio:
    """A pipeline whose adapters can be added while it runs. One request at a time changes it or draws with it."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.pipe = DiffFitDiTPipeline.from_pretrained(base, dtype=torch.float32)
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        self.sources: dict[str, str] = {}  # where each adapter came from
        self._one_at_a_time = threading.Lock()

    def add(self, path: str) -> str:
        """Loads an adapter, and gives the name it has from now on.

        Raises:
            ValueError: as `load_difffit_weights`, which leaves the pipeline as it was.
            HTTPError: of the Hub.
        """
        with self._one_at_a_time:
            stem = re.sub(r"\W+", "-", Path(path).name).strip("-") or "adapter"
            name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 1000))) if n not in self.sources)
            self.pipe.load_difffit_weights(path, name)
            self.sources[name] = path
            return name

    def classes(self, scales: dict[str, float]) -> list[str]:
        """Names of the classes at these scales, or their indices where they have none."""
        with self._one_at_a_time:
            self._set(scales)
            names = self.pipe.id2label
        return [*names.values()] or [str(i) for i in range(self.pipe.transformer.config.num_embeds_ada_norm)]

    def draw(self, scales: dict[str, float], label: str, seed: int, count: int, **how: Any) -> list[PIL.Image.Image]:
        """Two grids of `count` pictures: the base's, of the class that `_like` says, and the adapters'."""
        seeds = range(seed, seed + count)
        device = self.pipe.device
        with self._one_at_a_time:
            grids = []
            for shown in ({}, scales):
                self._set(shown)
                given = label if shown is scales else self._like(label, scales)
                generator = [torch.Generator(device).manual_seed(s) for s in seeds]
                images = self.pipe([given] * count, generator=generator, **how).images
                side = max(1, -(-SHOWN_SIDE // images[0].width)) * images[0].width
                images = [image.resize((side, side), PIL.Image.Resampling.NEAREST) for image in images]
                columns = math.ceil(math.sqrt(count))
                blank = PIL.Image.new("RGB", (side, side), "white")
                images += [blank] * (-count % columns)
                grids.append(make_image_grid(images, len(images) // columns, columns))
            return grids

    def code(self, scales: dict[str, float], label: str, seed: int, count: int, **how: Any) -> str:
        """What draws the adapters' pictures without this page."""
        load = [f"pipe.load_difffit_weights({self.sources[name]!r}, {name!r})" for name in scales]
        blend = [f"pipe.set_adapters({[*scales]}, {[*scales.values()]})"] if scales else []
        options = ", ".join(f"{name}={value!r}" for name, value in how.items())
        return "\n".join(
            [
                "import torch",
                "from diffusers import DPMSolverMultistepScheduler",
                "from difffit_peft import DiffFitDiTPipeline",
                "",
                f"pipe = DiffFitDiTPipeline.from_pretrained({self.base!r})",
                "pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)",
                *load,
                *blend,
                f"generator = [torch.Generator().manual_seed(seed) for seed in range({seed}, {seed + count})]",
                f"images = pipe([{label!r}] * {count}, generator=generator, {options}).images",
            ]
        )

    def _like(self, label: str, scales: dict[str, float]) -> int | str:
        """The base's class: the same, the one that an adapter's class started from, or else the null class: any."""
        if label in self.pipe.id2label.values():
            return label
        for config in (self.pipe.transformer.peft_config[name] for name in scales):
            names = [*(config.id2label or {}).values()]
            if label in names and isinstance(config.init_class_rows, list):
                return config.init_class_rows[names.index(label)]
        return self.pipe.transformer.config.num_embeds_ada_norm

    def _set(self, scales: dict[str, float]) -> None:
        if scales:
            self.pipe.set_adapters([*scales], [*scales.values()])
        elif self.sources:
            self.pipe.disable_difffit()


def refused(error: Exception) -> gr.Error:
    return gr.Error(" ".join(str(error).split()), duration=None, print_exception=False)


def build(studio: Studio) -> gr.Blocks:
    with gr.Blocks(title="DiffFit") as page:
        base = Path(studio.base)
        gr.Markdown(f"# DiffFit\nAdapters of `{base.relative_to(EXAMPLES) if base.is_relative_to(EXAMPLES) else base}`")
        adapters = gr.State(lambda: [*studio.sources])
        with gr.Row():
            with gr.Column(scale=1):
                with gr.Accordion("Add an adapter", open=not studio.sources):
                    place = gr.Textbox(label="Hub id or folder", placeholder="me/dit-food101")
                    files = gr.File(label="or its two files", file_count="multiple", height=110)
                    add = gr.Button("Add")
                controls = gr.Column()
            with gr.Column(scale=2):
                with gr.Row():
                    with gr.Column():
                        gr.Markdown("### The base")
                        base_grid = gr.Image(format="png", interactive=False, show_label=False, elem_id="base")
                    with gr.Column():
                        gr.Markdown("### With adapters")
                        grid = gr.Image(format="png", interactive=False, show_label=False, elem_id="adapted")
                code = gr.Code(
                    label="The code that draws it",
                    language="python",
                    interactive=False,
                    wrap_lines=True,
                    elem_id="code",
                )

        def add_adapter(place: str, files: list[str] | None) -> tuple[list[str], str, None]:
            if not place.strip() and not files:
                raise gr.Error("Give a Hub id, a folder, or the adapter's two files.", print_exception=False)
            try:
                if place.strip():
                    studio.add(place.strip())
                else:
                    folder = Path(tempfile.mkdtemp(prefix="difffit-app-"), "uploaded")
                    folder.mkdir()
                    for file in files or []:
                        shutil.copy(file, folder / Path(file).name)
                    studio.add(str(folder))
            except (ValueError, OSError, HTTPError, HFValidationError) as error:
                raise refused(error) from None
            return [*studio.sources], "", None

        add.click(add_adapter, [place, files], [adapters, place, files])

        with controls:

            @gr.render(inputs=adapters)
            def show_controls(names: list[str]) -> None:
                sliders = [
                    gr.Slider(0, 2, 1.0, step=0.05, label=name, key=f"scale-{name}", interactive=True) for name in names
                ]
                choices = studio.classes(dict.fromkeys(names[-1:], 1.0))
                label = gr.Dropdown(
                    choices, value=choices[0], label="class", allow_custom_value=True, key="class", interactive=True
                )
                guidance = gr.Radio(
                    ["class", "domain"], value="class", label="guidance by", key="guidance", interactive=True
                )
                guidance_scale = gr.Slider(
                    1, 8, 1.5, step=0.25, label="guidance scale", key="guidance-scale", interactive=True
                )
                seed = gr.Number(0, precision=0, minimum=0, label="first seed", key="seed", interactive=True)
                count = gr.Slider(1, 16, 4, step=1, label="pictures", key="count", interactive=True)
                steps = gr.Slider(2, 50, 15, step=1, label="steps", key="steps", interactive=True)
                button = gr.Button("Draw", variant="primary")

                # Gradio finds the progress by its default, and puts it at its place among the inputs
                def draw(progress: gr.Progress = gr.Progress(track_tqdm=True), *values: Any) -> tuple[Any, ...]:  # noqa: B008
                    *scales, label, guidance, guidance_scale, seed, count, steps = values
                    chosen = {name: scale for name, scale in zip(names, scales, strict=True) if scale}
                    how = {"guidance": guidance, "guidance_scale": guidance_scale, "num_inference_steps": int(steps)}
                    try:
                        grids = studio.draw(chosen, label, int(seed), int(count), **how)
                        return *grids, studio.code(chosen, label, int(seed), int(count), **how)
                    except ValueError as error:
                        raise refused(error) from None

                inputs = [*sliders, label, guidance, guidance_scale, seed, count, steps]
                button.click(draw, inputs, [base_grid, grid, code], concurrency_id="pipeline", concurrency_limit=1)

    return page


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", default=str(EXAMPLES / "avatars/base"), help="Hub id or folder of a base"
    )
    parser.add_argument("--adapters", nargs="*", help="Hub ids or folders; default: what `make demo` left, if it did")
    parser.add_argument("--server_name", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--server_port", type=int, help="default: the first that is free from 7860 on")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    studio = Studio(args.pretrained_model_name_or_path)
    demo = EXAMPLES.parent / "demo/adapter"
    for path in [str(demo)] * demo.is_dir() if args.adapters is None else args.adapters:
        studio.add(path)
    build(studio).launch(server_name=args.server_name, server_port=args.server_port)


if __name__ == "__main__":
    run_script(main, parse_args)
