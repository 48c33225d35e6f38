"""Qwen2.5-VL, by transformers and PyTorch: says in a few words how the object of a video moves.

The extra `describe` has what runs it. No code of a model's folder is run, and its weights must be
safetensors.
"""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fourdstar_jax import bars

# A multiple of the 28 pixels of a token, within the sizes that the model's processor leaves as
# they are: what the model sees are these pixels.
SIDE = 336
MAX_NEW_TOKENS = 24
PROMPT = (
    "Describe only the motion in this video in one short phrase, in lower case. "
    "Do not name the object, its looks or the background."
)


class Qwen:
    """The model of a folder or of a name on the hub, on the GPU if there is one.

    Raises ValueError if PyTorch is missing, or for what is no Qwen2.5-VL with all its weights.
    """

    def __init__(self, name: str):
        try:
            import torch  # pyright: ignore[reportMissingImports]
            import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                f"to describe motions needs {error.name}: pip install "
                "'fourdstar-jax[train,describe]'"
            ) from None
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration

        self._torch: Any = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            with bars.waiting(f"loading {name}"):
                kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
                if kind != "qwen2_5_vl":
                    raise ValueError(f"it is of type {kind}, not qwen2_5_vl")
                self._processor: Any = AutoProcessor.from_pretrained(name, trust_remote_code=False)
                # what some versions ask for in a long warning; no picture here is that large
                self._processor.video_processor.cap_pixels_per_frame = True
                model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                    name, use_safetensors=True, dtype="auto", output_loading_info=True
                )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            why = " ".join(str(error).split())[:300]
            raise ValueError(f"{name} cannot be loaded as Qwen2.5-VL: {why}") from error
        if lost := sorted(info["missing_keys"]):
            raise ValueError(f"{name} lacks {len(lost)} weights of Qwen2.5-VL, as {lost[0]}")
        self._model: Any = model.to(self._device).eval()

    def __call__(self, frames: UInt8[np.ndarray, "T h w 3"], fps: float) -> str:
        """What the model says of a video of so many frames a second; the likeliest words."""
        inputs = self.inputs(frames, fps).to(self._device)
        with self._torch.inference_mode():
            out = self._model.generate(
                **inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                repetition_penalty=1.0,
            )
        said = out[:, inputs["input_ids"].shape[1] :]
        return self._processor.batch_decode(said, skip_special_tokens=True)[0]

    def inputs(self, frames: UInt8[np.ndarray, "T h w 3"], fps: float) -> Any:
        """The model's inputs: the prompt, and the frames as a video of SIDE x SIDE pixels."""
        from transformers.video_utils import VideoMetadata

        size = SIDE, SIDE
        large = [Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x in frames]
        video = np.stack([np.asarray(x) for x in large])
        content = [{"type": "video"}, {"type": "text", "text": PROMPT}]
        text = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        count = len(frames)
        metadata = VideoMetadata(total_num_frames=count, fps=fps, frames_indices=list(range(count)))
        return self._processor(
            text=[text],
            videos=[video],
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
