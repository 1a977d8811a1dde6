"""A Hugging Face folder of ours as the GGUF files that llama.cpp reads: f32, f16 and q8_0, without a vocabulary.

    /path/to/llamacpp/python benchmarks/peers/write_gguf.py HF_FOLDER OUTPUT_FOLDER

llama.cpp itself quantizes. Needs one float32 safetensors file and tied embeddings, which is what the benchmark writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a float32 file: eight bytes of header length, the header in JSON, the bytes."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise ValueError(f"{path}: {name} is {entry['dtype']}, expected F32")
        begin, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(raw[begin:end], "<f4").reshape(entry["shape"])
    return tensors


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of the folder's tensors."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}.weight"


def write(source: Path, target: Path, *, half: bool) -> None:
    """One GGUF file: matrices in float16 if `half`, all else in float32."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(str(target), "qwen3")
    writer.add_name("random")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(1 if half else 0)
    writer.add_tokenizer_model("no_vocab")
    for name, values in read_safetensors(source / "model.safetensors").items():
        writer.add_tensor(gguf_name(name), values.astype(np.float16 if half and values.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """All three files."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    write(source, target / "f32.gguf", half=False)
    write(source, target / "f16.gguf", half=True)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    code = llama_cpp.llama_model_quantize(str(target / "f16.gguf").encode(), str(target / "q8_0.gguf").encode(), options)
    if code:
        raise RuntimeError(f"llama.cpp refused to quantize {target / 'f16.gguf'}: code {code}")


if __name__ == "__main__":
    main()
