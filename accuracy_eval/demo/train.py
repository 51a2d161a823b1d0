"""Train the demo's model from random weights on the demo's tasks, and save it in half precision.

`python accuracy_eval/demo/train.py --minutes 5.5` trains a model as the bundled one was (one GPU) in its place;
`--out` and `--tasks` make another one.
Loss is taken on answers only. Contexts grow from 4 sentences to 448 (4,000 tokens with the questions).
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from demo.check import exact_match, show  # noqa: E402
from demo.make_data import make_rows, tasks_json  # noqa: E402
from demo.tasks import MAX_TOKENS, TASKS  # noqa: E402
from demo.tokenizer import build_tokenizer  # noqa: E402
from demo.trainer import Trainer, train  # noqa: E402

#: What the bundled model was trained on; the generator's other tasks are harder, and no model of them is bundled.
TRAINED = ("homes", "stores", "employers", "topics", "paragraphs")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "demo-llama")
    parser.add_argument("--resume", type=Path, default=None, help="folder of a saved model to start from")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--mlp", type=int, default=768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=2)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--init", type=float, default=0.06, help="standard deviation of the first weights")
    parser.add_argument("--longest", type=int, default=448, help="sentences of the longest contexts")
    parser.add_argument("--batch", type=float, default=1.0, help="share of the usual batch")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=TRAINED, metavar="TASK")
    parser.add_argument("--check_rows", type=int, default=40, help="rows per task of the final check")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.device == "cpu" and args.out.resolve() == HERE / "demo-llama":
        parser.error(
            "training takes a GPU: in minutes on a CPU little is learnt, and the bundled model would be replaced. "
            "Give --out to try it nevertheless"
        )
    return args


def new_model(args: argparse.Namespace, tokenizer) -> LlamaForCausalLM:
    """A Llama with random weights for this tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=MAX_TOKENS,
        rope_theta=10000.0,
        initializer_range=args.init,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer, out: Path) -> None:
    """Write the model in half precision, its configuration and its tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(
        f"saved {out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {size / 1e6:.1f} MB"
    )


def main() -> None:
    args = parse_args()
    print(json.dumps(vars(args), default=str), flush=True)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(MAX_TOKENS)
    if args.resume:
        model = AutoModelForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
    else:
        model = new_model(args, tokenizer)
    model = model.to(args.device)
    model.set_attn_implementation("demo_causal")
    train(Trainer(model, args.lr, args.tasks, args.batch), args.minutes, args.longest)
    save(model, tokenizer, args.out)

    # What was saved is what is checked.
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=dtype).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    for tokens in (1024, 2048, 4096):
        if args.check_rows and tokens <= 10 * args.longest:
            rows = [
                row for name in args.tasks for row in make_rows(name, args.check_rows, (tokens,), 77, 0.45)
            ]
            print(f"exact match in %, {args.check_rows} rows per task, {tokens} tokens")
            show(exact_match(model, tokenizer, tasks_json(), rows))


if __name__ == "__main__":
    main()
