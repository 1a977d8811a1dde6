"""The other side of tests/test_huggingface_transformers.py: torch and transformers alone, perhaps in another environment.

logits FOLDER IDS.npy OUT.npy          load a folder, save float32 logits
make FOLDER TIED MAX_SHARD_SIZE DTYPE  a random model of theirs, saved by theirs
chat FOLDER REQUEST.json OUT.json      ids of texts and conversations, and texts of ids
"""

import json
import sys

import numpy as np
import torch
import transformers


def logits(folder, ids, out):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        np.save(out, model(torch.tensor(np.load(ids))).logits.numpy())


def make(folder, tied, max_shard_size, dtype):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=300,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=12345.0,
        rms_norm_eps=3e-6,
        tie_word_embeddings=tied == "tied",
        max_position_embeddings=64,
    )
    model = transformers.Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)


def chat(folder, request, out):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with open(request) as file:
        asked = json.load(file)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked["texts"]]
    answer = {
        "texts": encoded,
        "decoded": [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded],
        "chats": [
            [tokenizer.apply_chat_template(turns, add_generation_prompt=add, return_dict=False) for turns in asked["chats"]]
            for add in (False, True)
        ],
    }
    with open(out, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    {"logits": logits, "make": make, "chat": chat}[sys.argv[1]](*sys.argv[2:])
