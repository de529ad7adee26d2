"""B'MOJO for Hugging Face Transformers: configuration, cache and models; importing it registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_bmojo import BMojoCache, RememberedToken
from .configuration_bmojo import BMojoConfig
from .modeling_bmojo import (
    BMojoForCausalLM,
    BMojoForQuestionAnswering,
    BMojoForSequenceClassification,
    BMojoForTokenClassification,
    BMojoModel,
    BMojoPreTrainedModel,
)


__version__ = "0.1.0"

AUTO_CLASSES = {
    AutoModel: BMojoModel,
    AutoModelForCausalLM: BMojoForCausalLM,
    AutoModelForSequenceClassification: BMojoForSequenceClassification,
    AutoModelForTokenClassification: BMojoForTokenClassification,
    AutoModelForQuestionAnswering: BMojoForQuestionAnswering,
}

AutoConfig.register("bmojo", BMojoConfig, exist_ok=True)
for auto_class, model_class in AUTO_CLASSES.items():
    auto_class.register(BMojoConfig, model_class, exist_ok=True)

__all__ = [
    "AUTO_CLASSES",
    "BMojoCache",
    "BMojoConfig",
    "BMojoForCausalLM",
    "BMojoForQuestionAnswering",
    "BMojoForSequenceClassification",
    "BMojoForTokenClassification",
    "BMojoModel",
    "BMojoPreTrainedModel",
    "RememberedToken",
]
