"""The embedded engine: paged Llama and Qwen2 in plain torch, driven step by step by a plan."""

from sagellm_ir.runtime.engines.embedded.engine import EmbeddedEngine
from sagellm_ir.runtime.engines.embedded.load import load_model, load_tokenizer, random_model
from sagellm_ir.runtime.engines.embedded.model import CausalLM
from sagellm_ir.runtime.engines.embedded.model_config import ModelConfig
from sagellm_ir.runtime.engines.embedded.tokenizer import ModelTokenizer

__all__ = [
    "CausalLM",
    "EmbeddedEngine",
    "ModelConfig",
    "ModelTokenizer",
    "load_model",
    "load_tokenizer",
    "random_model",
]
