"""Train the demo checkpoint: a small Llama-2 that knows how to use this engine, written to llama/demo/.

Everything comes from scripts/demo/text.txt: a SentencePiece tokenizer, then the model in plain torch (its parameters
carry Hugging Face's names), then the score on unseen questions, then the files. Seeded: the same machine, torch and
number of threads give the same bytes. It takes about half an hour on one CPU core.

    python scripts/train_demo.py                     the checkpoint that ships
    python scripts/train_demo.py --steps 300 --out DIR   a quick look
"""

import argparse
import io
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from demo.text import DemoText, Dialog, Message, first_examples

DEMO = Path(__file__).resolve().parents[1] / "llama" / "demo"
BOS, EOS, IGNORE = 1, 2, -100
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.0625,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
GENERATION = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False}
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """out: the folder to write. rows: dialogs per step. lr: of AdamW; Muon takes twice that."""

    out: Path
    steps: int
    rows: int
    lr: float
    dropout: float
    threads: int
    seed: int


# -- Tokens ------------------------------------------------------------------------------------------------------------


def train_tokenizer(text: DemoText, seed: int) -> bytes:
    """A SentencePiece model with Llama-2's settings, learned from 20,000 training dialogs."""
    rng = random.Random(seed)
    dialogs = [text.training(rng) for _ in range(20_000)]
    lines = [piece for d in dialogs for piece in prompt_texts(d.messages)] + [d.answer for d in dialogs]
    lines += [line for word in text.lists["word"] + text.lists["name"] for line in (f"'{word}'", word)] * 50
    file = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=file,
        model_type="bpe",
        vocab_size=CONFIG["vocab_size"],
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return file.getvalue()


def prompt_texts(messages: list[Message]) -> list[str]:
    """The turns of a Llama-2 chat prompt, the system text folded into the first question; all but the last answered."""
    if messages[0].role == "system":
        system, first, *rest = messages
        messages = [Message("user", f"<<SYS>>\n{system.content}\n<</SYS>>\n\n{first.content}"), *rest]
    asked = [f"[INST] {m.content.strip()} [/INST]" for m in messages[0::2]]
    answered = [f" {m.content.strip()} " for m in messages[1::2]]
    return [question + answer for question, answer in zip(asked, [*answered, ""], strict=True)]


def prompt_ids(tokenizer: spm.SentencePieceProcessor, messages: list[Message]) -> list[int]:
    """The ids of a chat prompt: every turn after BOS, every answered one before EOS."""
    *answered, last = (tokenizer.encode(turn) for turn in prompt_texts(messages))
    return [i for turn in answered for i in (BOS, *turn, EOS)] + [BOS, *last]


def answer_ids(tokenizer: spm.SentencePieceProcessor, answer: str) -> list[int]:
    """An answer as Llama-2 gives it: a bare word mark, the text, EOS. Decoded alone it starts with one space."""
    return [tokenizer.piece_to_id("\u2581"), *tokenizer.encode(answer), EOS]


def to_batch(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(prompt, answer) ids -> inputs and labels [rows, longest], labels IGNORE except where an answer id is due."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    inputs = torch.full((len(rows), longest), EOS)
    labels = torch.full((len(rows), longest), IGNORE)
    for i, (prompt, answer) in enumerate(rows):
        n = len(prompt) + len(answer) - 1
        inputs[i, :n] = torch.tensor([*prompt, *answer[:-1]])
        labels[i, len(prompt) - 1 : n] = torch.tensor(answer)
    return inputs, labels


# -- The model ---------------------------------------------------------------------------------------------------------


def shapes() -> dict[str, tuple[int, ...]]:
    """The shape of every parameter under its Hugging Face name."""
    dim, ffn, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    kv = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    layer = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (ffn, dim),
        "mlp.up_proj": (ffn, dim),
        "mlp.down_proj": (dim, ffn),
    }
    layers = {f"layers.{i}.{k}": shape for i in range(CONFIG["num_hidden_layers"]) for k, shape in layer.items()}
    model = {"embed_tokens": (vocab, dim), **layers, "norm": (dim,)}
    return {**{f"model.{k}.weight": shape for k, shape in model.items()}, "lm_head.weight": (vocab, dim)}


def new_parameters(seed: int) -> Parameters:
    """Fresh fp32 parameters. Input and output embedding are one tensor while training, so that copying words is learned
    sooner; the files hold it twice, as Llama-2's do."""
    generator = torch.Generator().manual_seed(seed)
    p = {}
    for name, shape in shapes().items():
        std = 0.02 if "embed" in name else shape[-1] ** -0.5
        p[name] = torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0.0, std, generator=generator)
        p[name].requires_grad_()
    p["lm_head.weight"] = p["model.embed_tokens.weight"]
    return p


def rope_tables(length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim], the two halves of a head rotated against each other. Source: arXiv 2104.09864."""
    half = torch.arange(0, CONFIG["head_dim"], 2) / CONFIG["head_dim"]
    angles = torch.outer(torch.arange(length).float(), CONFIG["rope_theta"] ** -half)
    return torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)


def hidden_states(p: Parameters, ids: Tensor, dropout: float = 0.0) -> Tensor:
    """Llama-2's forward pass up to the last norm: ids [rows, length] -> [rows, length, dim]."""
    eps, heads, kv_heads, head_dim = (
        CONFIG[k] for k in ("rms_norm_eps", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    cos, sin = (t.to(p["lm_head.weight"].dtype) for t in rope_tables(ids.shape[1]))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * p[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    x = F.dropout(F.embedding(ids, p["model.embed_tokens.weight"]), dropout, dropout > 0)
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            F.linear(h, p[f"{layer}.self_attn.{n}_proj.weight"]).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for n in "qkv"
        )
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (rotate(k), v))
        h = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.dropout(F.linear(h, p[f"{layer}.self_attn.o_proj.weight"]), dropout, dropout > 0)
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (F.linear(h, p[f"{layer}.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        x = x + F.dropout(F.linear(F.silu(gate) * up, p[f"{layer}.mlp.down_proj.weight"]), dropout, dropout > 0)
    return norm(x, "model.norm")


# -- Training and the score --------------------------------------------------------------------------------------------


def draw_batches(
    text: DemoText, tokenizer: spm.SentencePieceProcessor, rng: random.Random, rows: int, drill: float
) -> list:
    """Sixteen batches, each of dialogs of about equal length, so that little is padded."""
    dialogs = [text.training(rng, drill) for _ in range(16 * rows)]
    pairs = [(prompt_ids(tokenizer, d.messages), answer_ids(tokenizer, d.answer)) for d in dialogs]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    batches = [to_batch(pairs[i : i + rows]) for i in range(0, len(pairs), rows)]
    rng.shuffle(batches)
    return batches


def train(options: Options, text: DemoText, tokenizer: spm.SentencePieceProcessor) -> Parameters:
    """Train with Muon and AdamW under a cosine, with a loss on answer tokens only; returns the mean of late weights."""
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed + 1)
    p = new_parameters(options.seed)
    mean = {name: value.detach().clone() for name, value in p.items()}
    trained = {name: value for name, value in p.items() if name != "lm_head.weight"}
    matrices = [value for name, value in trained.items() if "proj" in name]
    others = [value for name, value in trained.items() if "proj" not in name]
    optimizers = [  # Muon for the matrices: it learns rare wordings, and most are rare, in far fewer steps
        torch.optim.Muon(matrices, lr=2 * options.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    batches: list[tuple[Tensor, Tensor]] = []
    progress = tqdm(range(options.steps), desc="training", unit="step", mininterval=5)
    for step in progress:
        share = min((step + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
        drill = max(0.0, 0.6 - 3 * step / options.steps)
        batches = batches or draw_batches(text, tokenizer, rng, options.rows, drill)
        inputs, labels = batches.pop()
        due = labels != IGNORE
        logits = F.linear(hidden_states(p, inputs, options.dropout)[due], p["lm_head.weight"])
        loss = F.cross_entropy(logits, labels[due])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            keep = min(0.998, step / (step + 10))
            for name, value in mean.items():
                value.lerp_(p[name], 1 - keep)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return mean


def score(
    dialogs: list[Dialog], tokenizer: spm.SentencePieceProcessor, forward: Callable[[Tensor], Tensor]
) -> list[bool]:
    """Which dialogs are answered correctly: the greedy answer equals the right one, id for id, EOS included.

    It does exactly if the best next id is right after every right prefix, which one forward pass per dialog tells.
    forward: ids [1, length] -> logits [1, length, vocab].
    """
    results = []
    for dialog in dialogs:
        inputs, labels = to_batch([(prompt_ids(tokenizer, dialog.messages), answer_ids(tokenizer, dialog.answer))])
        best = forward(inputs).argmax(-1)
        results.append(bool(((best == labels) | (labels == IGNORE)).all()))
    return results


def scorer(p: Parameters, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The forward pass of `score` for these parameters, computed in dtype."""
    cast = {name: value.to(dtype) for name, value in p.items()}
    return lambda ids: F.linear(hidden_states(cast, ids), cast["lm_head.weight"])


# -- The files ---------------------------------------------------------------------------------------------------------

CARD = """# The demo checkpoint

A toy that knows this engine, and little else: a Llama-2 of {parameters:,} parameters in bfloat16, written whole by
`scripts/train_demo.py` from `scripts/demo/text.txt`, text that this project wrote itself. With it the engine answers
with nothing downloaded. It is no assistant: outside its topics it says that it does not know, or answers wrongly.

| | |
|---|---|
| shape | {num_hidden_layers} layers, dim {hidden_size}, ffn {intermediate_size}, vocabulary {vocab_size} |
| attention | {num_attention_heads} heads of {head_dim} over {num_key_value_heads} KV heads |
| context | {max_position_embeddings} tokens (trained on conversations of up to about 250) |
| topics | {topics}, each asked in many ways; sums and differences of numbers up to 10; words and names to repeat |
| system messages | capital letters, one word, a pirate: as trained; others change nothing |
| training | {steps:,} steps of {rows} dialogs, {minutes:.0f} minutes (threads: {threads}); seed {seed}, torch {torch} |

## Score: {right} of {total} held-back questions ({share:.1%})
Correct means that the greedy answer is the right answer, id for id, and then ends. The held-back questions are
wordings that no training question has (compared without case, punctuation and polite words); the answers were all seen
in training. Computed in float32; in bfloat16 it is {right_bf16}.

| kind | correct | of |
|---|---|---|
{kinds}

By hand: written apart from the patterns that training questions are made from. Pattern: made from those patterns and
then set aside. Sum, say: a way to ask that is not in training. System: a pattern question behind a trained system
message. Second turn: a pattern question after another question and its answer. The wordings by hand were never trained
on, but the patterns were widened after early scores had been seen, so expect a little less from your own wordings.

Known to be weak: names it never saw, words to say that it never saw, numbers beyond those it was trained on.

Licence: as the project.
"""


def write(options: Options, p: Parameters, model: bytes, facts: dict[str, Any]) -> None:
    """config.json, generation_config.json, model.safetensors, tokenizer.model and the card."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n", encoding="utf-8")
    (out / "model.safetensors").write_bytes(save(p, metadata={"format": "pt"}))
    card = CARD.format(**{**CONFIG, **asdict(options), **facts, "torch": torch.__version__})
    (out / "README.md").write_text(card, encoding="utf-8")


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO, help="directory to write (default: llama/demo)")
    parser.add_argument("--steps", type=int, default=3300)
    parser.add_argument("--rows", type=int, default=32, help="dialogs per step")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    return Options(**vars(parser.parse_args()))


def main() -> None:
    """Tokenizer, training, rounding to bfloat16, score, files."""
    options = parse()
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    text = DemoText()
    model = train_tokenizer(text, options.seed)
    tokenizer = spm.SentencePieceProcessor(model_proto=model)
    p = {name: value.bfloat16() for name, value in train(options, text, tokenizer).items()}
    minutes = (time.monotonic() - start) / 60

    with torch.inference_mode():
        right = score(text.held_back, tokenizer, scorer(p, torch.float32))
        right_bf16 = score(text.held_back, tokenizer, scorer(p, torch.bfloat16))
        first = [score(first_examples(), tokenizer, scorer(p, dtype)) for dtype in (torch.float32, torch.bfloat16)]
    kinds = Counter(d.kind for d in text.held_back)
    good = Counter(d.kind for d, ok in zip(text.held_back, right, strict=True) if ok)
    facts: dict[str, Any] = {
        "parameters": sum(v.numel() for v in p.values()),
        "topics": len(text.topics),
        "minutes": minutes,
        "right": sum(right),
        "total": len(right),
        "share": sum(right) / len(right),
        "right_bf16": sum(right_bf16),
        "kinds": "\n".join(f"| {kind} | {good[kind]} | {n} |" for kind, n in kinds.items()),
    }
    write(options, p, model, facts)
    size = sum(f.stat().st_size for f in options.out.iterdir() if f.is_file())
    files = f"{size / 1e6:.2f} MB in {options.out}"
    print(f"first-page examples right in fp32 and bf16: {first}; {files}; {minutes:.1f} minutes")
    print(f"held-back score: {sum(right)}/{len(right)} = {sum(right) / len(right):.1%} (bf16: {sum(right_bf16)})")


if __name__ == "__main__":
    main()
