"""Random bf16 weights for the shape of a model, as a Hugging Face folder. Llama and Qwen2 families."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["QWEN2_5_7B", "write_model"]

QWEN2_5_7B: Mapping[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
"""The shape of Qwen2.5-7B: 15.2 GB."""


def write_model(config: Mapping[str, Any], folder: Path, device: str = "cuda") -> None:
    """Write config, weights (normal with deviation 0.02, always the same on a device), tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)
    hidden, inner, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * 0.02).bfloat16().cpu()

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    index: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    top = {"model.embed_tokens.weight": normal(vocab, hidden), "model.norm.weight": ones()}
    if not config.get("tie_word_embeddings"):
        top["lm_head.weight"] = normal(vocab, hidden)
    save("model-top.safetensors", top)
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        tensors = {f"{at}{name}.weight": normal(*shape) for name, shape in shapes.items()}
        tensors |= {
            f"{at}{n}.weight": ones() for n in ("input_layernorm", "post_attention_layernorm")
        }
        if config["model_type"] == "qwen2":
            biased = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
            tensors |= {f"{at}{name}.bias": normal(shapes[name][0]) for name in biased}
        save(f"model-{layer:03d}.safetensors", tensors)
    weights = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    (folder / "config.json").write_text(json.dumps(dict(config)))
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes: LMDeploy wants one, though requests are token ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: at for at, letter in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    whole = make(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    whole.save_pretrained(folder)
