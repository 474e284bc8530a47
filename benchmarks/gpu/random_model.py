"""Random bf16 weights for the shape of a model, as a Hugging Face folder. Llama and Qwen2 families.

    python benchmarks/gpu/random_model.py FOLDER            # Qwen2.5-7B's shape
    python benchmarks/gpu/random_model.py FOLDER --small    # 0.2B, for engines on a CPU too

Answers are printable ASCII, so that they can be read and joined as text.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["QWEN2_5_7B", "SMALL", "write_model"]

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
SMALL: Mapping[str, Any] = {
    **QWEN2_5_7B,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "max_window_layers": 12,
    "num_attention_heads": 16,
    "num_hidden_layers": 12,
    "vocab_size": 4096,
}
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_model(
    config: Mapping[str, Any], folder: Path, device: str = "cuda", *, readable: bool = False
) -> None:
    """Write config, weights (normal with deviation 0.02, always the same on a device), tokenizer.

    Args:
        config: as in `config.json`.
        folder: where to.
        device: what makes the random numbers.
        readable: only tokens of printable ASCII are ever the likeliest.
    """
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
        if readable:
            spoken = [at for at, letter in enumerate(_letters()) if letter.isascii()]
            kept = top["lm_head.weight"][spoken]
            top["lm_head.weight"].zero_()[spoken] = kept
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


def _letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes: LMDeploy wants one, though requests are token ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: at for at, letter in enumerate([*_letters(), "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    whole = make(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    whole.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    write_model(SMALL if given.small else QWEN2_5_7B, given.folder, given.device, readable=True)
