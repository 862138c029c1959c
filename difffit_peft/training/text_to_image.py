"""Text-to-image pipelines of Diffusers, as they are trained: one class a family, for the little in which they differ.

What a prompt becomes is what the pipeline's own `encode_prompt` gives; how the model is called, and what it predicts,
is as in the pipeline's own loop. Whether a base is trained by noise or by flow matching its scheduler says
(`objective.noising`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .checkpoint import fingerprint
from .objective import Diffusion, FlowMatching, Objective
from .prompts import Embeddings, Prompts, stacked


class TextToImage:
    """A pipeline whose model takes latents as they are, `timestep` and `encoder_hidden_states`: Stable Diffusion.

    A family overrides what is otherwise with it.

    Attributes:
        part: the pipeline's component that is trained.
        embeddings: what to keep of what `encode_prompt` returns: names as the pipeline takes them, with their places.
        guidance: the pipeline's argument for the scale of classifier-free guidance.
        packing: latents come in multiples of so many on a side, as tokens are made of patches of them.
    """

    part: ClassVar[str] = "transformer"
    embeddings: ClassVar[dict[str, int]] = {"prompt_embeds": 0}
    guidance: ClassVar[str] = "guidance_scale"
    packing: int = 2

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.config = self.model.config
        self.takes = inspect.signature(type(self.model).forward).parameters

    @property
    def model(self) -> Any:
        return getattr(self.pipe, self.part)

    def predict(self, model: Any, x_t: Tensor, timesteps: Tensor, prompts: Sequence[Embeddings]) -> Tensor:
        """What the model gives, in the shape of `x_t`, perhaps with the channels of its variance."""
        return model(**self.inputs(x_t, timesteps, stacked(prompts, x_t.device)), return_dict=False)[0]

    def inputs(self, x_t: Tensor, timesteps: Tensor, given: Embeddings) -> dict[str, Any]:
        """The model's arguments; `given` are the embeddings of a prompt for each sample."""
        return {"sample": x_t, "timestep": timesteps, "encoder_hidden_states": given["prompt_embeds"]}

    def distilled_guidance(self, batch: int, device: torch.device) -> Tensor | None:
        """The guidance that a guidance-distilled model is told: what its pipeline tells it by default."""
        if not self.config.get("guidance_embeds"):
            return None
        scale = inspect.signature(type(self.pipe).__call__).parameters["guidance_scale"].default
        return torch.full((batch,), float(scale), device=device)

    @property
    def default_dropout(self) -> float:
        """The share of prompts to drop: 10 % where guidance compares with the empty prompt, none where it does not."""
        return 0.0 if self.config.get("guidance_embeds") else 0.1

    def resolution(self, resolution: int | None) -> int:
        """The resolution to train at, the base's own by default.

        Raises:
            ValueError: if the base does not take it, or none is given and the base names none.
        """
        factor = self.pipe.vae_scale_factor
        step = factor * self.packing
        if resolution is None:
            side = self.config.get("sample_size") or getattr(self.pipe, "default_sample_size", None)
            if side is None:
                raise ValueError(f"--resolution is not given, and a {type(self.pipe).__name__} names none: give one.")
            resolution = side * factor
        if resolution % step:
            raise ValueError(
                f"--resolution is {resolution}, but this base takes multiples of {step}: "
                f"{resolution // step * step or step} or {(resolution // step + 1) * step}, for instance."
            )
        return resolution

    def _encoding(self) -> dict[str, Any]:
        """The arguments of `encode_prompt` beside the prompt: what the pipeline's own call passes by default."""
        takes = inspect.signature(self.pipe.encode_prompt).parameters
        defaults = inspect.signature(type(self.pipe).__call__).parameters
        given = {name: defaults[name].default for name in takes if name in defaults and name != "prompt"}
        fixed = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        return given | {name: value for name, value in fixed.items() if name in takes}

    @torch.no_grad()
    def encode(self, prompt: str, **options: Any) -> Embeddings:
        """The embeddings of one prompt, without a dimension of the batch."""
        device = self.text_encoders()[0].device
        returned = self.pipe.encode_prompt(prompt=[prompt], device=device, **self._encoding() | options)
        return {name: returned[place][0] for name, place in self.embeddings.items() if returned[place] is not None}

    def text_encoders(self) -> list[Any]:
        parts = self.pipe.components.items()
        return [part for name, part in parts if name.startswith("text_encoder") and isinstance(part, nn.Module)]

    def encoding_key(self) -> str:
        """A hash of what shapes embeddings beside the prompt: text encoders, tokenizers, the pipeline's arguments."""
        parts = [type(self.pipe).__name__, sorted(self.embeddings), repr(sorted(self._encoding().items()))]
        parts += [[fingerprint(encoder), str(encoder.dtype)] for encoder in self.text_encoders()]
        for name, part in sorted(self.pipe.components.items()):
            if name.startswith("tokenizer") and part is not None:
                tokenizer = getattr(part, "tokenizer", part)  # of a processor
                parts += [sorted(tokenizer.get_vocab().items()), repr(tokenizer.init_kwargs), str(part.chat_template)]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]

    def drop_text_encoders(self) -> None:
        """Frees the memory of the text encoders, when all prompts are encoded."""
        for name, part in self.pipe.components.items():
            if name.startswith("text_encoder") and isinstance(part, nn.Module):
                setattr(self.pipe, name, None)

    def objective(self, noising: Diffusion | FlowMatching, prompts: Prompts, null: int, dropout: float) -> Objective:
        """What the model is trained for, when labels are indices of `prompts`; `null` is that of the empty one."""

        def predict(model: Any, x_t: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
            return self.predict(model, x_t, timesteps, [prompts[index] for index in labels.tolist()])

        return Objective(noising, predict, null, dropout)

    def call(self, prompt: Embeddings, empty: Embeddings, count: int, resolution: int, guidance: float) -> dict:
        """The arguments with which the pipeline makes `count` pictures of one prompt.

        `guidance` is the scale of classifier-free guidance; 1: none.
        """
        takes = inspect.signature(type(self.pipe).__call__).parameters
        device = self.model.device
        given: dict[str, Any] = {"negative_prompt": None, "use_resolution_binning": False}
        given |= {"height": resolution, "width": resolution, self.guidance: guidance}
        for prefix, embeddings in (("", prompt), ("negative_", empty)):
            given |= {prefix + name: self.repeat(value.to(device), count) for name, value in embeddings.items()}
        return {name: value for name, value in given.items() if name in takes}

    def repeat(self, value: Tensor, count: int) -> Any:
        """One prompt's embedding for `count` pictures, in float32, in which the loop of the pipeline then works."""
        value = value.float() if value.is_floating_point() else value
        return value.expand(count, *value.shape)


class StableDiffusion(TextToImage):
    part = "unet"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        self.packing = 2 ** (len(self.config.block_out_channels) - 1)  # so often the UNet halves latents


class PixArt(TextToImage):
    embeddings = {"prompt_embeds": 0, "prompt_attention_mask": 1}

    def inputs(self, x_t: Tensor, timesteps: Tensor, given: Embeddings) -> dict[str, Any]:
        size = None
        if self.model.use_additional_conditions:
            size = [side * self.pipe.vae_scale_factor for side in x_t.shape[-2:]]
        return {
            "hidden_states": x_t,
            "encoder_hidden_states": given["prompt_embeds"],
            "encoder_attention_mask": given["prompt_attention_mask"],
            "timestep": timesteps,
            "added_cond_kwargs": {
                "resolution": None if size is None else x_t.new_tensor(size).repeat(len(x_t), 1),
                "aspect_ratio": None if size is None else x_t.new_tensor([size[0] / size[1]]).repeat(len(x_t), 1),
            },
        }


class StableDiffusion3(TextToImage):
    embeddings = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}

    def inputs(self, x_t: Tensor, timesteps: Tensor, given: Embeddings) -> dict[str, Any]:
        return {
            "hidden_states": x_t,
            "timestep": timesteps,
            "encoder_hidden_states": given["prompt_embeds"],
            "pooled_projections": given["pooled_prompt_embeds"],
        }


class Flux2(TextToImage):
    embeddings = {"prompt_embeds": 0, "text_ids": 1}

    def inputs(self, x_t: Tensor, timesteps: Tensor, given: Embeddings) -> dict[str, Any]:
        return {
            "hidden_states": self.pipe._pack_latents(x_t),
            "timestep": timesteps / self.pipe.scheduler.config.num_train_timesteps,
            "guidance": self.distilled_guidance(len(x_t), x_t.device),
            "encoder_hidden_states": given["prompt_embeds"],
            "txt_ids": given["text_ids"],
            "img_ids": self.pipe._prepare_latent_ids(x_t).to(x_t.device),
        }

    def predict(self, model: Any, x_t: Tensor, timesteps: Tensor, prompts: Sequence[Embeddings]) -> Tensor:
        return super().predict(model, x_t, timesteps, prompts).permute(0, 2, 1).reshape(x_t.shape)


class Sana(TextToImage):
    embeddings = {"prompt_embeds": 0, "prompt_attention_mask": 1}
    packing = 1

    def encode(self, prompt: str, **options: Any) -> Embeddings:
        if not prompt:  # guidance compares with the empty prompt without the instruction
            options["complex_human_instruction"] = None
        return super().encode(prompt, **options)

    def inputs(self, x_t: Tensor, timesteps: Tensor, given: Embeddings) -> dict[str, Any]:
        return {
            "hidden_states": x_t,
            "encoder_hidden_states": given["prompt_embeds"],
            "encoder_attention_mask": given["prompt_attention_mask"],
            "timestep": timesteps * self.config.timestep_scale,
        }


class QwenImage(TextToImage):
    embeddings = {"prompt_embeds": 0, "prompt_embeds_mask": 1}
    guidance = "true_cfg_scale"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        if Version(diffusers.__version__) < Version("0.37"):  # a batch of prompts of several lengths needs it
            raise ValueError(
                f"Qwen-Image masks no text in Diffusers {diffusers.__version__}: install Diffusers 0.37 or newer."
            )
        super().__init__(pipe)

    def encode(self, prompt: str, **options: Any) -> Embeddings:
        given = super().encode(prompt, **options)
        mask = torch.ones(len(given["prompt_embeds"]), dtype=torch.long)  # `None` where all tokens count
        return {"prompt_embeds_mask": mask} | given

    def predict(self, model: Any, x_t: Tensor, timesteps: Tensor, prompts: Sequence[Embeddings]) -> Tensor:
        given = {name: pad_sequence([each[name] for each in prompts], batch_first=True) for name in prompts[0]}
        mask, (height, width) = given["prompt_embeds_mask"], x_t.shape[-2:]
        output = model(
            hidden_states=self.pipe._pack_latents(x_t, *x_t.shape),
            timestep=timesteps / self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=given["prompt_embeds"].to(x_t.device),
            encoder_hidden_states_mask=None if mask.all() else mask.to(x_t.device),
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        factor = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(output, height * factor, width * factor, factor).squeeze(2)


class ZImage(TextToImage):
    def predict(self, model: Any, x_t: Tensor, timesteps: Tensor, prompts: Sequence[Embeddings]) -> Tensor:
        times = 1 - timesteps / self.pipe.scheduler.config.num_train_timesteps  # from noise, 0, to the image, 1
        texts = [each["prompt_embeds"].to(x_t.device) for each in prompts]
        output = model([*x_t.unsqueeze(2)], times, texts, return_dict=False)[0]
        return -torch.stack([*output]).squeeze(2)  # it predicts x_0 - noise

    def call(self, prompt: Embeddings, empty: Embeddings, count: int, resolution: int, guidance: float) -> dict:
        return super().call(prompt, empty, count, resolution, guidance - 1)  # 0: none, as this pipeline counts

    def repeat(self, value: Tensor, count: int) -> Any:
        return [super().repeat(value, 1)[0]] * count  # a list, as prompts differ in length


FAMILIES: dict[str, type[TextToImage]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2,
    "SanaPipeline": Sana,
    "QwenImagePipeline": QwenImage,
    "ZImagePipeline": ZImage,
}
"""By the name of the pipeline's class."""


def family_of_pipeline(name: str) -> type[TextToImage]:
    """The family of a pipeline's class.

    Raises:
        ValueError: for a class that cannot be trained from text here.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"The base is a {name}, which cannot be trained from captions here: give one of {', '.join(FAMILIES)}. "
            "examples/train_difffit.py trains class-conditional bases."
        )
    return FAMILIES[name]
