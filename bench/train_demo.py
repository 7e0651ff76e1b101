"""Train the embedded demo model: a small qwen3_moe that tells stories.

Needs PyTorch and tokenizers (the `train` extra); nothing else in expertd does. One run makes the whole
`expertd/demo/` folder, in Hugging Face layout, deterministically for a given seed and torch version:

    python bench/train_demo.py --train train.txt --valid valid.txt --out expertd/demo

(glibc gives large buffers back to the kernel after each step; MALLOC_MMAP_THRESHOLD_=4294967296
MALLOC_TRIM_THRESHOLD_=8589934592 in the environment keep them, worth 17 % of the time.)

Theory of operation. Matrices learn by Muon (orthogonalised momentum: Jordan 2024, scaled as in
Moonlight, arXiv 2502.16982), everything else by AdamW. Muon roughly halves the tokens that a given
loss needs, and tokens are what a CPU lacks. Experts are kept stacked, [num_experts, out, in], so that
one batched Newton-Schulz iteration serves them all. Tokens are sorted by expert and each expert
multiplies its own rows: no padding, no dropped tokens. The first 70 % of the steps see windows of
512 tokens, the rest 1024, which is the context length that the config promises.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

END = "<|endoftext|>"
# Of the mean over layers. A tenth of it left an expert of the first layer with 5 % of its fair share.
BALANCE_WEIGHT = 0.1


@dataclass(frozen=True)
class Shape:
    """The model's sizes; each quantized row is a multiple of 256, so that other engines' formats fit."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 12
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 256
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def matrix(*shape: int, scale: float = 1.0) -> nn.Parameter:
    """A weight [..., out, in] with standard deviation scale / sqrt(in)."""
    return nn.Parameter(torch.randn(*shape) * scale / math.sqrt(shape[-1]))


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        q, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
        self.q_proj, self.k_proj = matrix(q, s.hidden_size), matrix(kv, s.hidden_size)
        self.v_proj = matrix(kv, s.hidden_size)
        self.o_proj = matrix(s.hidden_size, q, scale=0.2)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(s.head_dim)) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (b, t, _) = self.s, x.shape

        def heads(w: Tensor) -> Tensor:
            return F.linear(x, w).view(b, t, -1, s.head_dim).transpose(1, 2)

        def rotate(h: Tensor) -> Tensor:
            a, c = h.chunk(2, -1)
            return torch.cat([a * cos - c * sin, c * cos + a * sin], -1)

        q = rotate(rms_norm(heads(self.q_proj), self.q_norm, s.rms_norm_eps))
        k = rotate(rms_norm(heads(self.k_proj), self.k_norm, s.rms_norm_eps))
        y = F.scaled_dot_product_attention(q, k, heads(self.v_proj), is_causal=True, enable_gqa=True)
        return F.linear(y.transpose(1, 2).reshape(b, t, -1), self.o_proj)


class Experts(nn.Module):
    """Router and experts; `forward` also gives the load-balancing loss of Switch Transformers, eq. 4."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.gate = matrix(s.num_experts, s.hidden_size, scale=0.1)
        self.gate_up = matrix(s.num_experts, 2 * s.moe_intermediate_size, s.hidden_size)
        self.down = matrix(s.num_experts, s.hidden_size, s.moe_intermediate_size, scale=0.2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, rows = self.s, x.reshape(-1, x.shape[-1])
        probs = F.linear(rows, self.gate).softmax(-1)
        weights, chosen = probs.topk(s.num_experts_per_tok)
        weights = weights / weights.sum(-1, keepdim=True)
        counts = torch.bincount(chosen.flatten(), minlength=s.num_experts)
        order = chosen.flatten().argsort(stable=True)
        token = order // s.num_experts_per_tok
        parts = rows[token].split(counts.tolist())
        up_down = zip(parts, self.gate_up.unbind(0), self.down.unbind(0), strict=True)
        y = torch.cat([self.expert(p, up, down) for p, up, down in up_down])
        out = torch.zeros_like(rows).index_add(0, token, y * weights.flatten()[order, None])
        balance = s.num_experts * (counts / counts.sum() * probs.mean(0)).sum()
        return out.view_as(x), balance

    @staticmethod
    def expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.eps = s.rms_norm_eps
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(s.hidden_size)) for _ in range(2))
        self.attn, self.mlp = Attention(s), Experts(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attn(rms_norm(x, self.norm1, self.eps), cos, sin)
        y, balance = self.mlp(rms_norm(x, self.norm2, self.eps))
        return x + y, balance


class Model(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed = nn.Parameter(torch.randn(s.vocab_size, s.hidden_size) * 0.05)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(s.hidden_size))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [batch, time, vocab] and the mean balance loss (1 = perfectly even) for tokens [batch, time]."""
        s, t = self.s, tokens.shape[1]
        freq = s.rope_theta ** (-torch.arange(0, s.head_dim, 2) / s.head_dim)
        angle = torch.arange(t)[:, None] * freq
        x, balance = F.embedding(tokens, self.embed), torch.zeros(())
        for layer in self.layers:
            x, part = layer(x, angle.cos(), angle.sin())
            balance = balance + part / s.num_hidden_layers
        return F.linear(rms_norm(x, self.norm, s.rms_norm_eps), self.embed), balance


def orthogonalize(g: Tensor) -> Tensor:
    """Newton-Schulz towards U V^T of each matrix [..., m, n]; quintic coefficients by Jordan (2024)."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the 0.2 sqrt(max(m, n)) scale makes AdamW's learning rates fit."""

    def __init__(self, params: list[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))


def make_tokenizer(text: Path, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    return tokenizer


# The model has read stories and no dialogues: it goes on from what the user wrote. A system prompt would only
# confuse it and is left out.
CHAT_TEMPLATE = """\
{%- for message in messages if message.role != "system" -%}
{{- "" if loop.first else "\\n\\n" }}{{ message.content -}}
{%- endfor -%}
"""


def save_tokenizer(tokenizer: Tokenizer, out: Path, context_length: int) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def calibration_sample(text: str, num_bytes: int = 390_000) -> str:
    """An equal run of paragraphs from the middle of every book of the training text."""
    books = text.split("\n\n\n")
    share = num_bytes // len(books)
    runs = [book[len(book) // 2 :][:share] for book in books]
    return "\n\n\n".join(run[run.find("\n\n") + 2 : run.rfind("\n\n")] for run in runs) + "\n"


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """All token ids of a text whose books are parted by two blank lines; each book ends with END."""
    books = [f"{book.strip()}\n\n{END}" for book in text.split("\n\n\n")]
    return torch.tensor([i for e in tokenizer.encode_batch(books) for i in e.ids])


@torch.no_grad()
def evaluate(model: Model, tokens: Tensor, window: int = 1024) -> dict[str, object]:
    """Perplexity over consecutive windows, and each layer's least-used expert against its fair share."""
    model.eval()
    n = (len(tokens) - 1) // window
    nll, loads = 0.0, [torch.zeros(model.s.num_experts) for _ in model.layers]

    def count(i: int):  # type: ignore[no-untyped-def]
        def hook(mlp: Experts, args: tuple[Tensor]) -> None:
            chosen = F.linear(args[0], mlp.gate).topk(mlp.s.num_experts_per_tok).indices
            loads[i] += torch.bincount(chosen.flatten(), minlength=mlp.s.num_experts)

        return hook

    hooks = [ly.mlp.register_forward_pre_hook(count(i)) for i, ly in enumerate(model.layers)]
    for i in range(n):
        part = tokens[i * window : (i + 1) * window + 1]
        logits, _ = model(part[None, :-1])
        nll += F.cross_entropy(logits[0], part[1:], reduction="sum").item()
    for hook in hooks:
        hook.remove()
    model.train()
    fair = [float(ld.min() / ld.mean()) for ld in loads]
    return {"perplexity": math.exp(nll / (n * window)), "tokens": n * window, "least_load": fair}


def hf_tensors(model: Model) -> dict[str, Tensor]:
    """The weights under the names that Hugging Face's qwen3_moe gives them, in bfloat16."""
    out = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm}
    for i, layer in enumerate(model.layers):
        p = f"model.layers.{i}."
        out[p + "input_layernorm.weight"] = layer.norm1
        out[p + "post_attention_layernorm.weight"] = layer.norm2
        out |= {f"{p}self_attn.{k}.weight": v for k, v in layer.attn.named_parameters()}
        out[p + "mlp.gate.weight"] = layer.mlp.gate
        for e in range(model.s.num_experts):
            gate, up = layer.mlp.gate_up[e].chunk(2)
            named = {"gate_proj": gate, "up_proj": up, "down_proj": layer.mlp.down[e]}
            out |= {f"{p}mlp.experts.{e}.{k}.weight": v for k, v in named.items()}
    return {k: v.detach().to(torch.bfloat16).contiguous() for k, v in out.items()}


def save(model: Model, out: Path) -> None:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "bos_token_id": 0,
        "decoder_sparse_step": 1,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "intermediate_size": model.s.moe_intermediate_size,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **asdict(model.s),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(hf_tensors(model), out / "model.safetensors", metadata={"format": "pt"})


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over 40 steps, then linear decay to zero: the fraction of the peak rate."""
    return min((step + 1) / 40, (steps - step) / (steps - 40))


def backward(model: Model, batch: Tensor, num_parts: int = 4) -> tuple[float, float]:
    """Accumulate gradients of one batch [rows, window + 1], in parts so that logits stay in the cache."""
    losses, balances = [], []
    for part in batch.chunk(num_parts):
        logits, balance = model(part[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
        ((loss + BALANCE_WEIGHT * balance) / num_parts).backward()
        losses.append(loss.item())
        balances.append(balance.item())
    return sum(losses) / num_parts, sum(balances) / num_parts


def train(args: argparse.Namespace, model: Model, tokens: Tensor, valid: Tensor) -> None:
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and "gate_up" in n]
    matrices += [p for n, p in model.named_parameters() if n.endswith(("_proj", ".down"))]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    adam = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = [Muon(matrices, lr=6e-3), adam]
    peaks = [group["lr"] for opt in optimizers for group in opt.param_groups]
    rng, start = torch.Generator().manual_seed(args.seed), time.monotonic()
    for step in range(args.steps):
        window = 512 if step < 0.7 * args.steps else 1024
        at = torch.randint(len(tokens) - window - 1, (args.batch // window,), generator=rng)
        batch = torch.stack([tokens[i : i + window + 1] for i in at.tolist()])
        loss, balance = backward(model, batch)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for opt, peak in zip(optimizers, peaks, strict=True):
            opt.param_groups[0]["lr"] = peak * learning_rate(step, args.steps)
            opt.step()
            opt.zero_grad(set_to_none=True)
        took = time.monotonic() - start
        if step % 20 == 0 or step == args.steps - 1:
            rate = (step + 1) * args.batch / took
            line = f"step {step} loss {loss:.3f} balance {balance:.3f}"
            print(f"{line} {rate:.0f} tokens/s {took / 60:.1f} min", flush=True)
        if step % 100 == 99:
            torch.save({"model": model.state_dict(), "step": step}, args.out / "checkpoint.pt")
            print("valid", json.dumps(evaluate(model, valid[:20481])), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=540)
    parser.add_argument("--batch", type=int, default=8192, help="tokens per step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    tokenizer = make_tokenizer(args.train, shape.vocab_size)
    save_tokenizer(tokenizer, args.out, shape.max_position_embeddings)
    (args.out / "calibration.txt").write_text(calibration_sample(args.train.read_text()))
    (args.out / "valid.txt").write_text(args.valid.read_text())
    tokens, valid = (encode(tokenizer, p.read_text()) for p in (args.train, args.valid))
    print(f"{len(tokens)} training tokens, {len(valid)} held out", flush=True)
    model = Model(shape)
    start = time.monotonic()
    train(args, model, tokens, valid)
    save(model, args.out)
    report = {"minutes": round((time.monotonic() - start) / 60, 1)}
    report |= {"tokens_seen": args.steps * args.batch, "seed": args.seed, **evaluate(model, valid)}
    print(json.dumps(report))
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
