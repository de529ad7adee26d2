"""QLoRA: the frozen base of an adapter in 4 bits, by bitsandbytes through transformers, prepared by PEFT.

The linear maps inside layers are quantised as they are loaded; embeddings, head, norms, convolutions and the SSM's
scalars are not. Nothing here writes 4-bit checkpoints: an adapter trained on a 4-bit base is a file like any other.
"""

from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from .settings import FinetuneSettings, TrainingSettings


def kind_of(settings: TrainingSettings) -> str | None:
    """ "nf4" or "fp4" where the settings ask for a base in 4 bits, else None."""
    lora = settings.lora if isinstance(settings, FinetuneSettings) else None
    return None if lora is None else lora.quantize


def check_machine(settings: TrainingSettings) -> None:
    """Refuse 4 bits where they cannot be computed with (ValueError), before anything else looks for a GPU."""
    kind = kind_of(settings)
    if kind is None:
        return
    missing = [] if is_bitsandbytes_available() else ["bitsandbytes is not installed (pip install bitsandbytes)"]
    missing += [] if torch.cuda.is_available() else ["there is no CUDA GPU"]
    if missing:
        raise ValueError(
            f"lora.quantize={kind!r}: a base in 4 bits needs bitsandbytes and a CUDA GPU, and here "
            f"{' and '.join(missing)}; run it on a machine that has both, or remove lora.quantize: the base then keeps "
            "its dtype, as in configs/peft/lora-smollm2-135m.yaml."
        )


def loading_options(settings: TrainingSettings) -> dict[str, Any]:
    """Return what `from_pretrained` is told besides: {} without `lora.quantize`.

    There is no device map: by default transformers loads 4-bit weights onto the process's own GPU.
    """
    kind = kind_of(settings)
    return {} if kind is None else {"quantization_config": four_bit_config(kind)}


def four_bit_config(kind: str) -> BitsAndBytesConfig:
    """Return the configuration of QLoRA's paper (arXiv 2305.14314): scales quantised too, products in bfloat16."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],  # such a list replaces transformers' own, which would name the head
    )


def prepare(model: torch.nn.Module) -> torch.nn.Module:
    """Return the loaded 4-bit model, frozen, with all that is not in 4 bits cast to float32.

    Gradient checkpointing is left to the Trainer, which knows what the settings say of it.

    Raises:
        ValueError: nothing of the model is in 4 bits.
    """
    from peft import prepare_model_for_kbit_training

    if not any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters()):
        raise ValueError(
            "lora.quantize: no weight of the model was loaded in 4 bits, so it would train in full width without a "
            "word; check the versions of transformers and bitsandbytes, or remove lora.quantize."
        )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
