"""Where transformers decides by a name or a class of its own, and how ours are entered there.

    auto_map of a folder                which code each Auto class loads (`trust_remote_code=True`)
    MODEL_FOR_*_MAPPING_NAMES           Trainer smooths shifted labels of the causal models it knows by name; pipelines
                                        call every other name unsupported
    attributes of `transformers`        `transformers serve` (and TRL) take config.architectures[0] from there
    nn.LayerNorm                        what Trainer's weight decay spares, besides names with "bias" or "norm"

`configuration_bmojo` calls `register_names`: it is the first of our modules that a process imports, and the only one
that `transformers serve` has imported when it asks.
"""

from torch import nn
from transformers.models.auto import modeling_auto
from transformers.utils.import_utils import _LazyModule


# Auto class -> our class, by name, and transformers' table of such names.
ARCHITECTURES = {
    "AutoModel": "BMojoModel",
    "AutoModelForCausalLM": "BMojoForCausalLM",
    "AutoModelForSequenceClassification": "BMojoForSequenceClassification",
    "AutoModelForTokenClassification": "BMojoForTokenClassification",
    "AutoModelForQuestionAnswering": "BMojoForQuestionAnswering",
}
TABLES = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
# What the auto_map of a folder that holds our code says.
AUTO_MAP = {"AutoConfig": "configuration_bmojo.BMojoConfig"} | {
    auto_class: f"modeling_bmojo.{name}" for auto_class, name in ARCHITECTURES.items()
}


def register_names() -> None:
    """Enter our names.

    As an attribute of `transformers` stands the Auto class: it finds the code that belongs to the folder being loaded,
    where a class of ours would be that of the folder loaded first. It is set on the module's class, because there are
    two modules `transformers` as soon as transformers.processing_utils is imported, which runs its __init__ again, and
    who asks may hold either.
    """
    for auto_class, name in ARCHITECTURES.items():
        TABLES[auto_class]["bmojo"] = name
        setattr(_LazyModule, name, getattr(modeling_auto, auto_class))


class NoDecay(nn.LayerNorm):
    """A module whose parameters no weight decay touches: for Trainer that is a LayerNorm, and there is no other way to
    say so. Nothing else of a LayerNorm is in it."""

    __constants__ = ()

    def __init__(self):
        nn.Module.__init__(self)

    def reset_parameters(self) -> None:
        """None: the model's `_init_weights` fills them."""

    def extra_repr(self) -> str:
        return ""
