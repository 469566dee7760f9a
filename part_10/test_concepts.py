"""
Tests of the sentence autoencoder, of the Large Concept Models and of their demos. The oracles are
arithmetic by hand, slower statements of the same mathematics, and tiny runs of the scripts.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import demo_next_concept
import demo_semantic_space
import train_lcm
import train_sonar
from model import GPT, GPTConfig, rope, rope_table
from shared import read_facts, require, save_checkpoint
from tokenizer import Tokenizer
from train_lcm import BaseLCM, DenoiserBlock, QuantLCM, TwoTowerLCM, Writer
from train_sonar import THE_END, Sonar

FOLDER = Path(__file__).resolve().parent
TINY = GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, n_kv_head=4)
D = 6

# The scripts must not believe that they run under torchrun, and they are too small for threads.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
for variable in ("RANK", "WORLD_SIZE"):
    ENVIRONMENT.pop(variable, None)


def randomised(model, seed=0, std=0.2):
    """The model with random parameters, and gains near 1. Much of a new model is zero, and a zero
    would hide everything that stands before it."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = std * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        is_gain = p.ndim == 1 and p.data.mean() > 0.5
        p.data = 1 + noise if is_gain else noise
    return model


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def word_tokenizer():
    """Every word of the world is one token. A word that stands in the table needs no merges."""
    text = (require("data/stories") / "val.txt").read_text()
    words = sorted(set(re.findall(r" ?[A-Za-z]+", text)))
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    return Tokenizer(ranks)


@pytest.fixture(scope="module")
def tok():
    return word_tokenizer()


def make_sonar(tok, seed=0, dim=D):
    cfg = GPTConfig(vocab_size=tok.vocab_size, block_size=32, n_layer=1, n_head=4, n_embd=16)
    return randomised(Sonar(cfg, dim, tok), seed=seed)


SENTENCES = ["There Tom found the red hat.", "Tom ran.", "At last Tom went home sad."]


# the autoencoder ----------------------------------------------------------------------------------


def test_split_sentences_by_hand():
    text = "Write a story. End it sadly.\nTom ran!  Tom fell? Yes"
    expected = ["Write a story.", "End it sadly.", "Tom ran!", "Tom fell?", "Yes"]
    assert train_sonar.split_sentences(text) == expected
    assert train_sonar.split_sentences("  \n ") == []


def test_documents_are_stories_with_a_brief():
    train, val = train_sonar.load_documents("stories")
    assert {len(document) for document in train + val} == {8}
    assert {document[-1] for document in train} == {THE_END}
    assert all(document[0].startswith("Write a story about a ") for document in val)


def test_padding_changes_no_vector(tok):
    sonar = make_sonar(tok)
    together = sonar.vectors_of(SENTENCES)
    alone = torch.cat([sonar.vectors_of([sentence]) for sentence in SENTENCES])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.mean(dim=1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(together.square().mean(dim=1), torch.ones(3), rtol=1e-3, atol=0)


def test_every_token_of_a_sentence_changes_its_vector(tok):
    sonar = make_sonar(tok)
    [row] = sonar.token_rows(SENTENCES[:1])
    ids, lengths = train_sonar.pad([row], sonar.end)
    before = sonar.encode(ids, lengths)
    for place in range(len(row)):
        changed = ids.clone()
        changed[0, place] += 1
        assert (sonar.encode(changed, lengths) - before).abs().max() > 1e-4


def test_the_decoder_does_not_see_the_future(tok):
    sonar = make_sonar(tok)
    vectors = normal(1, D)
    ids = torch.randint(256, (1, 10), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 6] += 1
    before = sonar.decode(vectors, ids)
    after = sonar.decode(vectors, changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_generate_is_the_likeliest_token_again_and_again(tok):
    """Without a cache, and each vector alone."""
    sonar = make_sonar(tok)
    vectors = 3 * normal(4, D)
    written = sonar.generate(vectors)
    for i in range(4):
        ids = [sonar.start]
        while len(ids) <= written.size(1) and ids[-1] != sonar.end:
            logits = sonar.decode(vectors[i : i + 1], torch.tensor([ids]))
            ids.append(int(logits[0, -1].argmax()))
        assert written[i, : len(ids) - 1].tolist() == ids[1:]
        assert (written[i, len(ids) - 1 :] == sonar.end).all()


def test_reconstruction_loss_by_hand(tok):
    sonar = make_sonar(tok)
    rows = sonar.token_rows(SENTENCES)
    total = 0.0
    count = 0
    for row in rows:
        vector = sonar.encode(torch.tensor([row]), torch.tensor([len(row)]))
        logp = sonar.decode(vector, torch.tensor([[sonar.start, *row]])).log_softmax(dim=-1)
        for place, token in enumerate([*row, sonar.end]):
            total -= logp[0, place, token].item()
            count += 1
    loss = train_sonar.reconstruction_loss(sonar, rows, level=0.0).item()
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_noise_comes_late():
    cfg = train_sonar.Config(steps=100, noise=0.7)
    levels = [train_sonar.noise_level(step, cfg) for step in (0, 20, 40, 60, 99)]
    assert levels == pytest.approx([0, 0, 0.35, 0.7, 0.7])

    torch.manual_seed(0)
    vectors = torch.zeros(4000, 50)
    assert torch.equal(train_sonar.add_noise(vectors, 0.0), vectors)
    deviations = train_sonar.add_noise(vectors, 0.8).square().mean(dim=1).sqrt()
    assert deviations.mean().item() == pytest.approx(0.4, rel=0.05)
    assert 0.7 < deviations.max() < 1.2


def test_all_parameters_of_the_autoencoder_learn(tok):
    sonar = make_sonar(tok)
    train_sonar.reconstruction_loss(sonar, sonar.token_rows(SENTENCES), 0.1).backward()
    for name, p in sonar.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def test_the_autoencoder_learns_a_batch_by_heart(tok):
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=tok.vocab_size, block_size=32, n_layer=1, n_head=4, n_embd=32)
    sonar = Sonar(cfg, 32, tok)
    options = train_sonar.Config(steps=60, lr=0.02, lr_adamw=1e-2)
    optimizers = train_sonar.make_optimizers(sonar, options)
    sentences = [*SENTENCES, "Tom sat down and cried.", "Mia sat down and cried.", THE_END]
    for step in range(60):
        train_sonar.set_lr(optimizers, train_sonar.lr_scale(step, options))
        loss = train_sonar.reconstruction_loss(sonar, sonar.token_rows(sentences), 0.0)
        train_sonar.update(sonar, loss, optimizers, 1.0)
    assert train_sonar.exact_share(sonar, sentences) == 1.0


def test_muon_gets_the_matrices_of_the_blocks_alone(tok):
    sonar = make_sonar(tok)
    muon, adamw = train_sonar.make_optimizers(sonar, train_sonar.Config())
    hidden = {id(p) for group in muon.param_groups for p in group["params"]}
    others = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert id(sonar.encoder[0].attn.c_q.weight) in hidden
    assert id(sonar.wte.weight) in others and id(sonar.encoder[0].ln_1.weight) in others
    assert hidden | others == {id(p) for p in sonar.parameters()}
    assert not hidden & others


# no leak: what is predicted depends on earlier sentences alone ------------------------------------


def make_families():
    quant = randomised(QuantLCM(TINY, D, levels=3, codes=5))
    quant.codebooks.copy_(normal(3, 5, D))
    return {
        "base": randomised(BaseLCM(TINY, D)),
        "two_tower": randomised(TwoTowerLCM(TINY, D)),
        "quant": quant,
    }


@pytest.mark.parametrize("kind", ["base", "two_tower", "quant"])
def test_a_prediction_does_not_see_its_own_sentence_or_later_ones(kind):
    model = make_families()[kind]
    x = normal(2, 7, D)
    changed = x.clone()
    changed[:, 4] += 1

    def predict(x):
        torch.manual_seed(0)
        return model.next_vectors(x)

    before, after = predict(x), predict(changed)
    assert torch.equal(before[:, :4], after[:, :4])  # they follow the sentences 0 to 3
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def no_drop(model):
    if isinstance(model, TwoTowerLCM):
        model.drop = 0.0
    return model


@pytest.mark.parametrize("kind", ["base", "two_tower", "quant"])
def test_the_loss_looks_at_earlier_sentences_alone(kind):
    """With sentence 4 as the only target, the hidden states of sentences 0 to 3 are all that the
    loss depends on, and among the sentences after it nothing matters."""
    model = no_drop(make_families()[kind])
    is_target = torch.zeros(2, 7, dtype=torch.bool)
    is_target[:, 4] = True
    hidden = []

    def keep(module, inputs, h):
        h.retain_grad()
        hidden.append(h)

    model.context.register_forward_hook(keep)

    def loss_of(x):
        torch.manual_seed(0)
        return model.loss(x, is_target)

    x = normal(2, 7, D)
    loss_of(x).backward()
    [h] = hidden
    assert h.grad[:, 3].abs().min() > 0
    assert not h.grad[:, 4:].any()

    later = x.clone()
    later[:, 5:] += 3
    assert loss_of(later).item() == pytest.approx(loss_of(x).item(), rel=1e-6)


def test_only_last_is_the_last():
    x = normal(2, 5, D)
    families = make_families()
    all_places = families["base"].next_vectors(x)
    last = families["base"].next_vectors(x, only_last=True)
    torch.testing.assert_close(last, all_places[:, -1:])

    # The denoiser at one place does not depend on which other places it denoises.
    tower = families["two_tower"]
    h = tower.context(x)
    noisy = normal(2, 5, D, seed=3)
    t = torch.full((2, 5), 60)
    place = torch.arange(1, 6)
    visible = train_lcm.causal_mask(place - 1, torch.arange(5)).expand(2, -1, -1)
    together = tower.denoise(noisy, t, h, place, visible)
    for i in range(5):
        own = slice(i, i + 1)
        alone = tower.denoise(noisy[:, own], t[:, own], h, place[own], visible[:, own])
        torch.testing.assert_close(alone, together[:, own], rtol=1e-4, atol=1e-5)


def test_a_hidden_context_is_hidden():
    tower = make_families()["two_tower"]
    noisy = normal(2, 3, D, seed=3)
    t = torch.full((2, 3), 60)
    place = torch.arange(1, 4)
    guesses = []
    for seed in (1, 2):
        h = tower.context(normal(2, 3, D, seed=seed))
        hidden = torch.zeros(2, 3, 3, dtype=torch.bool)
        guesses.append(tower.denoise(noisy, t, h, place, hidden))
    assert torch.equal(guesses[0], guesses[1])


@pytest.mark.parametrize("kind", ["base", "two_tower", "quant"])
def test_all_parameters_learn(kind):
    model = no_drop(make_families()[kind])
    torch.manual_seed(0)
    is_target = torch.ones(2, 7, dtype=torch.bool)
    model.loss(normal(2, 7, D), is_target).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), name


# diffusion ----------------------------------------------------------------------------------------


def test_cosine_schedule_by_the_formula():
    T, s = 50, 0.008
    signal, noise = train_lcm.cosine_schedule(T)
    for t in (0, 1, 20, 49, 50):
        f = math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
        f0 = math.cos(s / (1 + s) * math.pi / 2) ** 2
        assert signal[t].item() ** 2 == pytest.approx(f / f0, abs=1e-6)
    torch.testing.assert_close(signal.square() + noise.square(), torch.ones(T + 1))
    assert (signal[0].item(), noise[0].item(), signal[-1].item()) == (1.0, 0.0, 0.0)
    assert (signal.diff() < 0).all()


def test_ddim_keeps_the_noise_and_ends_at_the_guess():
    """With a perfect guess, every stop on the way is the true noisy vector of its step."""
    signal, noise = (values.double() for values in train_lcm.cosine_schedule(100))
    x0 = normal(3, D, seed=4).double()
    n = normal(3, D, seed=5).double()
    x = signal[100] * x0 + noise[100] * n
    for now, after in ((100, 70), (70, 35), (35, 10)):
        x = train_lcm.ddim_step(x, x0, now, after, signal, noise)
        torch.testing.assert_close(x, signal[after] * x0 + noise[after] * n, rtol=1e-9, atol=1e-9)
    x = train_lcm.ddim_step(x, x0, 10, 0, signal, noise)
    torch.testing.assert_close(x, x0, rtol=1e-9, atol=1e-9)


def test_one_denoising_step_is_the_first_guess():
    tower = make_families()["two_tower"]
    x = normal(2, 4, D)
    torch.manual_seed(3)
    written = tower.next_vectors(x, only_last=True, denoising_steps=1)
    torch.manual_seed(3)
    noise = torch.randn(2, 1, D)
    visible = torch.ones(2, 1, 4, dtype=torch.bool)
    h = tower.context(x)
    guess = tower.denoise(noise, torch.full((2, 1), 100), h, torch.tensor([4]), visible)
    torch.testing.assert_close(written, guess, rtol=1e-4, atol=1e-5)


def test_guidance_by_hand_and_at_scale_1():
    assert train_lcm.guide(torch.tensor(3.0), torch.tensor(1.0), 2.5).item() == 6.0
    tower = make_families()["two_tower"]
    x = normal(2, 4, D)
    written = []
    for scale in (1.0, 1.0 + 1e-6, 3.0):
        torch.manual_seed(3)
        written.append(tower.next_vectors(x, guidance=scale))
    torch.testing.assert_close(written[0], written[1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(written[0], written[2], atol=1e-2)


def test_a_new_denoiser_is_the_identity_and_can_learn():
    torch.manual_seed(0)
    block = DenoiserBlock(TINY)
    x, h, condition = normal(2, 3, 16), normal(2, 4, 16, seed=2), normal(2, 3, 16, seed=3)
    visible = torch.ones(2, 3, 4, dtype=torch.bool)
    y = block(x, h, torch.arange(3), visible, condition)
    assert torch.equal(y, x)

    # Both gates get a gradient: behind neither of them is there another zero.
    y.square().sum().backward()
    for modulation in (block.modulation_1, block.modulation_2):
        gate = modulation.linear.bias.grad.chunk(3)[2]
        assert gate.abs().max() > 1e-3


def test_cross_attention_by_loops_in_float64():
    attention = randomised(train_lcm.CrossAttention(TINY)).double()
    x, h = normal(2, 3, 16).double(), normal(2, 4, 16, seed=2).double()
    place = torch.tensor([2, 4, 1])
    visible = train_lcm.causal_mask(place - 1, torch.arange(4)).expand(2, -1, -1)
    actual = attention(x, h, place, visible)

    def rotated(vector, position):
        cos, sin = rope_table(torch.tensor([position]), 4, TINY.rope_base)
        return rope(vector.view(1, 1, 1, 4), cos, sin).flatten()

    for b in range(2):
        for i in range(3):
            heads = []
            for head in range(4):
                own = slice(4 * head, 4 * head + 4)
                q = attention.q_norm((attention.c_q.weight @ x[b, i])[own])
                q = rotated(q, int(place[i]))
                scores = []
                values = []
                for j in range(-1, 4):
                    if j >= place[i]:
                        continue
                    source = attention.null if j < 0 else h[b, j]
                    k = rotated(attention.k_norm((attention.c_k.weight @ source)[own]), j)
                    scores.append((q @ k).item() / 2)
                    values.append((attention.c_v.weight @ source)[own])
                weights = torch.tensor(scores, dtype=torch.float64).softmax(dim=0)
                heads.append(sum(w * v for w, v in zip(weights, values)))
            expected = attention.c_proj.weight @ torch.cat(heads)
            # RMSNorm computes in float32.
            torch.testing.assert_close(actual[b, i], expected, rtol=1e-5, atol=1e-6)


def test_regression_finds_the_mean_and_diffusion_finds_both_sentences():
    """The lesson in two dimensions: after the same context come (2, 0) or (0, 2)."""
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=2, block_size=8, n_layer=1, n_head=4, n_embd=16, n_kv_head=4)
    options = train_lcm.Config(lr=0.01, lr_adamw=1e-2, steps=250)
    written = {}
    for kind in ("base", "two_tower"):
        model = BaseLCM(cfg, 2) if kind == "base" else TwoTowerLCM(cfg, 2)
        optimizers = train_sonar.make_optimizers(model, options)
        for step in range(options.steps):
            train_sonar.set_lr(optimizers, train_sonar.lr_scale(step, options))
            first = torch.rand(64) < 0.5
            answer = torch.stack([2.0 * first, 2.0 * ~first], dim=1)
            x = torch.stack([torch.ones(64, 2), answer], dim=1)  # (64, 2, 2)
            is_target = torch.tensor([False, True]).expand(64, -1)
            train_sonar.update(model, model.loss(x, is_target), optimizers, 1.0)
        written[kind] = model.next_vectors(torch.ones(400, 1, 2))[:, 0]

    torch.testing.assert_close(written["base"].mean(dim=0), torch.ones(2), rtol=0, atol=0.25)
    assert written["base"].std(dim=0).max() < 1e-4, "a regression writes one vector"
    ends = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    distance = torch.cdist(written["two_tower"], ends)
    assert (distance.min(dim=1).values < 0.6).float().mean() > 0.85
    assert 0.3 < (distance.argmin(dim=1) == 0).float().mean() < 0.7


# residual quantization ----------------------------------------------------------------------------


def test_nearest_is_the_nearest():
    vectors, centroids = normal(50, D), normal(9, D, seed=2)
    expected = torch.cdist(vectors, centroids).argmin(dim=1)
    assert torch.equal(train_lcm.nearest(vectors, centroids), expected)


def test_k_means_finds_clusters_and_survives_few_vectors():
    centers = 10 * normal(4, D)
    vectors = centers.repeat(50, 1) + 0.01 * normal(200, D, seed=2)
    found = train_lcm.k_means(vectors, 8, 10, torch.Generator().manual_seed(0))
    assert torch.cdist(centers, found).min(dim=1).values.max() < 0.02

    few = train_lcm.k_means(vectors[:3], 8, 10, torch.Generator().manual_seed(0))
    assert torch.cdist(vectors[:3], few).min(dim=1).values.max() < 1e-5


def test_each_level_of_the_quantization_leaves_less_over():
    vectors = normal(500, D)
    books = train_lcm.fit_codebooks(vectors, 4, 16, torch.Generator().manual_seed(0))
    codes = train_lcm.quantize(vectors, books)
    left = [vectors.square().mean().item()]
    total = torch.zeros_like(vectors)
    for level in range(4):
        total = total + books[level][codes[:, level]]
        left.append((vectors - total).square().mean().item())
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.2 * left[0]


def test_the_quantized_loss_level_by_level():
    model = make_families()["quant"]
    x = normal(2, 4, D)
    is_target = torch.ones(2, 4, dtype=torch.bool)
    h = model.context(x[:, :-1])
    losses = []
    for b in range(2):
        for place in range(1, 4):
            [codes] = train_lcm.quantize(x[b, place][None], model.codebooks).tolist()
            partial = torch.zeros(1, 1, D)
            for level, code in enumerate(codes):
                visible = (torch.arange(3) < place)[None, None]
                logits = model.logits(
                    partial, torch.tensor([level]), h[b : b + 1], torch.tensor([place]), visible
                )
                losses.append(-logits[0, 0].log_softmax(dim=0)[code].item())
                partial = partial + model.codebooks[level][code]
    expected = sum(losses) / len(losses)
    assert model.loss(x, is_target).item() == pytest.approx(expected, rel=1e-4)


# data and writing ---------------------------------------------------------------------------------


def test_cut_and_vectorize(tok):
    documents = [["a", "b", "c", "d", "e"], ["f"], ["g", "h", "i"]]
    assert train_lcm.cut(documents, 3, 2) == [["a", "b", "c"], ["g", "h", "i"]]
    sonar = make_sonar(tok)
    vectors = train_lcm.vectorize(sonar, [[*SENTENCES, THE_END], SENTENCES], given=1)
    assert vectors.is_target.tolist() == [[False, True, True, True], [False, True, True, False]]
    torch.testing.assert_close(vectors.x[1, :3], sonar.vectors_of(SENTENCES), rtol=1e-4, atol=1e-5)


def test_token_loss_by_hand(tok):
    model = randomised(GPT(GPTConfig(tok.vocab_size, 64, 1, 4, 16)))
    documents = [["Be short.", "End it.", "Tom ran.", "Tom fell.", THE_END]]
    documents.append(["Be short.", "End it.", "Tom.", THE_END])
    total = 0.0
    count = 0
    for document in documents:
        ids, start = train_lcm.token_row(tok, document, 2)
        assert tok.decode(ids[:start]) == "Be short. End it.\n"
        assert ids[-1] == tok.special["<|end|>"]
        logp = model(torch.tensor([ids]))[0].log_softmax(dim=-1)[0]
        for place in range(start, len(ids)):
            total -= logp[place - 1, ids[place]].item()
            count += 1
    loss = train_lcm.token_loss(model, tok, documents, 2, 64).item()
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_a_piece_of_a_long_document_has_no_end(tok):
    document = ["Be short.", "Tom ran.", "Tom fell.", "Tom sat.", "Tom cried.", THE_END]
    first, last = train_lcm.cut([document], 4, 1)
    ids, _ = train_lcm.token_row(tok, first, 1)
    assert tok.decode(ids) == "Be short.\nTom ran. Tom fell. Tom sat."
    ids, _ = train_lcm.token_row(tok, last, 1)
    assert tok.decode(ids) == "Tom cried.\n<|end|>"


class Script(torch.nn.Module):
    """Stands for a model: it writes the vectors of these sentences, one after the other."""

    def __init__(self, sonar, sentences):
        super().__init__()
        self.vectors = sonar.vectors_of(sentences)
        self.seen = []

    def next_vectors(self, x, only_last=False):
        self.seen.append(x)
        place = min(x.size(1) - 2, len(self.vectors) - 1)
        return self.vectors[place].expand(len(x), 1, -1)


@pytest.fixture(scope="module")
def trained_sonar(tok):
    """An autoencoder that knows a few sentences."""
    torch.manual_seed(1)
    cfg = GPTConfig(vocab_size=tok.vocab_size, block_size=32, n_layer=1, n_head=4, n_embd=32)
    sonar = Sonar(cfg, 32, tok)
    options = train_sonar.Config(steps=60, lr=0.02, lr_adamw=1e-2)
    optimizers = train_sonar.make_optimizers(sonar, options)
    sentences = ["Be short.", "End it.", "Tom ran.", "Mia fell.", THE_END]
    for _ in range(60):
        loss = train_sonar.reconstruction_loss(sonar, sonar.token_rows(sentences), 0.3)
        train_sonar.update(sonar, loss, optimizers, 1.0)
    assert train_sonar.exact_share(sonar, sentences) == 1.0
    return sonar


def script_writer(sonar, sentences):
    zeros, ones = torch.zeros(sonar.dim), torch.ones(sonar.dim)
    return Writer("base", Script(sonar, sentences), sonar, zeros, ones)


def test_a_document_stops_at_the_end_or_when_it_repeats_itself(trained_sonar):
    prompts = [["Be short.", "End it."]] * 2
    for script in (["Tom ran.", "Mia fell.", THE_END], ["Tom ran.", "Mia fell.", "Mia fell."]):
        stories = train_lcm.write(script_writer(trained_sonar, script), prompts)
        assert stories.sentences == [["Tom ran.", "Mia fell."]] * 2
        assert stories.ended == [True, True]
        assert stories.positions == 6
    assert max(stories.end_cosines[0]) < train_lcm.STOP_COSINE


def test_a_document_without_an_end_is_cut_off(trained_sonar):
    script = ["Tom ran.", "Mia fell."] * 20
    stories = train_lcm.write(script_writer(trained_sonar, script), [["Be short.", "End it."]])
    assert stories.ended == [False]
    assert len(stories.sentences[0]) == train_lcm.MOST_SENTENCES


def test_snap_feeds_back_the_decoded_sentence(trained_sonar):
    writer = script_writer(trained_sonar, ["Tom ran.", THE_END])
    writer.model.vectors = writer.model.vectors + 0.1  # near a sentence, but not on it
    [exact] = trained_sonar.vectors_of(["Tom ran."])
    for snap in (False, True):
        writer.model.seen.clear()
        train_lcm.write(writer, [["Be short.", "End it."]], snap=snap)
        fed_back = writer.model.seen[1][0, 2]
        assert torch.allclose(fed_back, exact, atol=1e-5) == snap


def test_distance_in_the_autoencoders_space(trained_sonar):
    """The model works on standardised vectors, but l2 is that of the vectors as they are."""
    documents = [["Be short.", "End it.", "Tom ran.", THE_END]]
    vectors = train_lcm.vectorize(trained_sonar, documents, given=2)

    class Zero(torch.nn.Module):
        def next_vectors(self, x):
            return torch.zeros_like(x)

    mean, std = normal(32), torch.full((32,), 2.0)
    writer = Writer("base", Zero(), trained_sonar, mean, std)
    errors = (vectors.x[0, 2:] - mean).square().mean(dim=1).sqrt()
    assert train_lcm.distance(writer, vectors) == pytest.approx(errors.mean().item(), rel=1e-5)


# demo_next_concept --------------------------------------------------------------------------------


def facts():
    return read_facts(require("data/stories") / "facts.json")


def test_every_true_sentence_is_possible():
    """Against the world itself: the tables in the demo must be those of the world."""
    _, val = train_sonar.load_documents("stories")
    world = facts()
    for document in val[:80]:
        for place in range(2, 8):
            options = demo_next_concept.next_options(world, document[:place])
            assert sum(option.p for option in options) == pytest.approx(1)
            assert any(document[place] in option.sentences for option in options)


def test_the_slots_that_a_context_leaves_open():
    world = facts()
    brief = ["Write a story about a fox named Mia.", "End it sadly."]
    slots = demo_next_concept.known_slots(world, brief)
    assert slots == {"animal": "fox", "hero": "Mia", "ends": "sad"}
    options = demo_next_concept.next_options(world, brief)
    assert [len(option.sentences) for option in options] == [12, 12, 12]  # cities

    told = ["One day, a fox named Mia was in Rome.", "Then Mia saw the red hat."]
    told.append("But one king took the red hat.")
    options = demo_next_concept.next_options(world, brief + told)
    sentences = {option.sentences[0]: option.p for option in options}
    assert sentences["So Mia asked that king to give it back."] == 0.6
    assert sentences["Mia sat down and cried."] == 0.2
    assert len(sentences) == 3


def test_total_variation_by_hand():
    Option = demo_next_concept.Option
    options = [Option(0.5, ["a", "A"]), Option(0.3, ["b"]), Option(0.2, ["c"])]

    def variation(text):
        return demo_next_concept.total_variation(options, list(text))

    assert variation("aAaAabbbcc") == pytest.approx(0)
    assert variation("aaaaaaaaaa") == pytest.approx(0.5)
    assert variation("xxxxx") == pytest.approx(1)
    assert variation("aaaaabbbxx") == pytest.approx(0.2)


def test_samples_from_the_truth_are_near_it():
    _, val = train_sonar.load_documents("stories")
    generator = torch.Generator().manual_seed(0)
    floors = []
    for samples in (100, 2500):
        floors.append(demo_next_concept.noise_floor(facts(), val[:20], 4, samples, generator))
    assert 0.02 < floors[0] < 0.12
    assert floors[1] == pytest.approx(floors[0] / 5, rel=0.4)


def test_worlds_with_k_continuations():
    _, val = train_sonar.load_documents("stories")
    generator = torch.Generator().manual_seed(0)
    for k in (1, 3):
        documents = demo_next_concept.k_documents(facts(), k, val, generator)
        assert {len(document) for document in documents} == {8}
        first_words = {document[2].split(",")[0].split(" a ")[0] for document in documents}
        assert len(first_words) == k
        heroes = [document[0].split(" named ")[1].split()[0] for document in documents]
        assert all(hero in " ".join(d[2:]) for hero, d in zip(heroes, documents))


def test_the_token_models_next_sentence(tok, monkeypatch):
    """The answer is cut after its full stop. An end in its place is THE_END."""
    end = tok.special["<|end|>"]
    [stop] = tok.encode(".")
    answers = [tok.encode(" Tom ran. Tom"), [end, end, end]]

    class Model:
        wte = torch.nn.Embedding(2, 2)

        def generate(self, idx, most, temperature, lengths, stop):
            rows = []
            for row, length, answer in zip(idx.tolist(), lengths.tolist(), answers):
                rows.append((row[:length] + answer + [end] * 40)[: idx.size(1) + 10])
            return torch.tensor(rows)

    class OnlyTokenizer:
        pass

    sonar = OnlyTokenizer()
    sonar.tok = tok
    writer = Writer("token", Model(), sonar, None, None)
    contexts = [["Be short.", "End it."], ["Be short.", "End it."]]
    sentences = demo_next_concept.next_sentences_by_tokens(writer, contexts)
    assert sentences == ["Tom ran.", THE_END]


# demo_semantic_space ------------------------------------------------------------------------------


def test_a_walk_is_straight_and_even():
    start, end = normal(D), normal(D, seed=2)
    points = demo_semantic_space.walk(start, end, 4)
    torch.testing.assert_close(points[0], start)
    torch.testing.assert_close(points[-1], end)
    torch.testing.assert_close(points.diff(dim=0), ((end - start) / 4).expand(4, -1))


def words_of(sentence):
    return sentence.replace(".", "").split()


@pytest.mark.parametrize("change", list(demo_semantic_space.CHANGES))
def test_arithmetic_is_right_for_bags_of_words(change):
    """For vectors that only count words, A + (B' - B) has exactly the words that are expected."""
    vocabulary = facts()["vocabulary"]
    rng = Random(0)
    for _ in range(20):
        a, b, b_changed, expected = demo_semantic_space.change_trial(rng, vocabulary, change)
        assert a != expected and b != b_changed
        counts = Counter(words_of(a)) + Counter(words_of(b_changed))
        counts.subtract(words_of(b))
        assert +counts == Counter(words_of(expected))


def test_principal_axes_of_a_flat_cloud():
    flat = torch.zeros(100, D)
    flat[:, 1] = normal(100)
    flat[:, 4] = 3 * normal(100, seed=2)
    mean, axes = demo_semantic_space.principal_axes(flat + 5)
    assert axes[0].abs().argmax() == 4 and axes[1].abs().argmax() == 1
    torch.testing.assert_close(mean, flat.mean(dim=0) + 5)


def test_means_and_kinship_by_hand():
    """Vectors of a stub: what the sentences say, on a line."""
    place = {"a": 0.0, "b": 1.0, "c": 8.0, "d": 10.0}

    class Stub:
        def vectors_of(self, sentences):
            return torch.tensor([[place[sentence.removesuffix(".")[-1]]] for sentence in sentences])

    groups = {"low": ["a", "b"], "high": ["c", "d"]}
    means = demo_semantic_space.group_means(Stub(), groups)
    assert means.tolist() == [[0.5], [9.0]]
    assert demo_semantic_space.named_by_mean(Stub(), means, groups) == 1.0
    assert demo_semantic_space.named_by_mean(Stub(), means, {"low": ["a", "c"]}) == 0.5

    parents = {"a": "low", "b": "low", "c": "high", "d": "high"}
    ratio = demo_semantic_space.kinship(Stub(), {"thing": list("abcd")}, parents)
    assert ratio == pytest.approx(1.5 / ((8 + 10 + 7 + 9) / 4))


# the scripts --------------------------------------------------------------------------------------

# Runs scripts one after the other in one process, because importing torch takes longest, on a part
# of the world's text. Each job is a line of JSON; its exit code and its last line of stderr answer.
DRIVER = """
import contextlib, io, json, runpy, sys

here = sys.argv[1]
sys.path[:0] = [here, here + "/.."]
import shared

read_text = shared.read_text

def read_some(path):
    text = read_text(path)
    if str(path).endswith(("train.txt", "val.txt")):
        return "\\n\\n".join(text.split("\\n\\n")[:120])
    return text

shared.read_text = read_some
results = []
for script, *options in json.loads(sys.argv[2]):
    sys.argv = [script, "--device=cpu", *options]
    errors = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(f"{here}/{script}", run_name="__main__")
        except SystemExit as end:
            code = end.code
    results.append([code, output.getvalue(), errors.getvalue()])
sys.excepthook = sys.__excepthook__
print(json.dumps(results))
"""


def run_jobs(jobs):
    command = [sys.executable, "-c", DRIVER, str(FOLDER), json.dumps(jobs)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def base_checkpoint(tok, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.pt"
    save_checkpoint(path, kind="base", tokenizer=tok.state())
    return path


def test_all_scripts_from_sentences_to_figures(base_checkpoint, tmp_path):
    models = tmp_path / "models"
    sonar = models / "demo_next_concept.sonar.1"
    jobs = [
        ["train_sonar.py", f"--init={base_checkpoint}", "--steps=2", "--batch_size=8"]
        + ["--n_embd=16", "--dim=8", "--seed=1", f"--out={sonar}"]
    ]
    for kind in train_lcm.KINDS:
        folder = models / f"demo_next_concept.{kind}.1"
        jobs.append(
            ["train_lcm.py", f"--kind={kind}", "--steps=2", "--batch_size=8", "--n_embd=16"]
            + [f"--sonar={sonar}/sonar.pt", "--prompts=4", "--seed=1", f"--out={folder}"]
        )
    out = tmp_path / "out"
    jobs.append(
        ["demo_next_concept.py", f"--models={models}", "--seed=1", "--prompts=6", f"--out={out}"]
        + ["--positions=2", "--samples=5", "--share=0.003"]
    )
    jobs.append(
        ["demo_semantic_space.py", f"--sonar={sonar}/sonar.pt", "--samples=4", f"--out={out}"]
        + ["--text=Mia found the red hat. Tom ran."]
    )
    for code, output, errors in run_jobs(jobs):
        assert code == 0, errors + output[-500:]

    made = [sonar / "train_sonar", out / "demo_next_concept", out / "demo_semantic_space"]
    made += [models / f"demo_next_concept.{kind}.1" / "train_lcm" for kind in train_lcm.KINDS]
    for path in made:
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        json.loads(path.with_suffix(".json").read_text())

    results = json.loads((out / "demo_next_concept.json").read_text())
    assert set(results["table"]) == {"exact mean", *demo_next_concept.ROWS}
    [base] = results["table"]["Base"]
    assert base["distinct_event"] == 1, "a regression is deterministic"
    log = (sonar / "train_sonar.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [0, 1]


def test_own_text(base_checkpoint, tmp_path):
    """Documents of different lengths, and longer ones than --sentences allows."""
    text = tmp_path / "my.txt"
    documents = ["Tom ran. Mia fell. Tom sat down."] * 12 + ["Tom. Ran. And. Fell. Down. Today."]
    text.write_text("\n\n".join(documents * 3))
    options = [f"--data={text}", "--steps=2", "--batch_size=4", "--n_embd=16"]
    jobs = [
        ["train_sonar.py", f"--init={base_checkpoint}", "--dim=8", f"--out={tmp_path}"] + options,
        ["train_lcm.py", f"--sonar={tmp_path}/sonar.pt", "--given=1", "--sentences=4"]
        + ["--prompts=2", f"--out={tmp_path}"]
        + options,
    ]
    for code, output, errors in run_jobs(jobs):
        assert code == 0, errors + output[-500:]
    assert "gold" not in json.loads((tmp_path / "train_lcm.json").read_text())


def test_bad_input_ends_in_one_line(base_checkpoint, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    short = tmp_path / "short.txt"
    short.write_text("One sentence.\n\nAnother one.\n\nA third.")
    one = tmp_path / "one.txt"
    one.write_text("Only one document. It has two sentences.")
    init = f"--init={base_checkpoint}"
    bad = {
        "empty": ["train_sonar.py", init, f"--data={empty}"],
        "one document": ["train_sonar.py", init, f"--data={one}"],
        "no file": ["train_sonar.py", init, "--data=missing.txt"],
        "dim": ["train_sonar.py", init, "--dim=0"],
        "noise": ["train_sonar.py", init, "--noise=-1"],
        "n_embd": ["train_sonar.py", init, "--n_embd=12"],
        "steps": ["train_sonar.py", init, "--steps=0"],
        "kind": ["train_lcm.py", "--kind=three_tower"],
        "kind of checkpoint": ["train_lcm.py", f"--sonar={base_checkpoint}"],
        "sentences": ["train_lcm.py", "--sentences=2", "--given=2"],
        "drop": ["train_lcm.py", "--drop=1.5"],
        "given": ["train_lcm.py", f"--data={short}", "--given=5", "--sonar=my.pt"],
        "own text": ["train_lcm.py", f"--data={short}"],
        "codes": ["train_lcm.py", "--kind=quant", "--codes=1"],
        "seeds": ["demo_next_concept.py", "--seeds=0"],
        "share": ["demo_next_concept.py", "--share=0"],
        "samples": ["demo_semantic_space.py", "--samples=0"],
        "sonar": ["demo_semantic_space.py", f"--sonar={base_checkpoint}"],
        "text": ["demo_semantic_space.py", f"--sonar={base_checkpoint}", "--text= "],
    }
    jobs = [[*job, f"--out={tmp_path}/out"] for job in bad.values()]
    for name, (code, _, errors) in zip(bad, run_jobs(jobs)):
        assert code == 2, f"{name}: {errors}"
        assert errors.startswith("error: ") and errors.count("\n") == 1, f"{name}: {errors}"
