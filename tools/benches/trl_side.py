"""TRL's side of `bench.py step`: `trl_side.py trl|trl-kl PROMPT ANSWER GROUP MICRO_BATCH_TOKENS`.

GRPOTrainer on a language model of the same sizes. Its loss is called with made-up completions, so
generation is not part of the time: log-probs of n full sequences, backward, clip, AdamW; `trl-kl`
has the reference pass too. The micro-batch is the whole group.
"""

import sys
import tempfile

import torch

from benches.worker import resident, serve

try:
    import pyarrow
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise SystemExit(f"{error}: pip install -e '.[bench]' has TRL.") from None
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCAB = 4096  # sizes of step_side.py
CONFIG = Qwen2Config(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)


def trainer(folder: str, answers: int, beta: float) -> "GRPOTrainer":
    word_tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[EOS]": 2}, unk_token="[UNK]")
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    )
    Qwen2ForCausalLM(CONFIG).save_pretrained(folder)  # the reference is read from where it lies
    model = Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    options = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=answers,
        num_generations=answers,
        beta=beta,
        report_to="none",
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=options,
        train_dataset=Dataset(pyarrow.table({"prompt": ["a"]}), fingerprint="bench"),  # not read
        processing_class=tokenizer,
    )


def main(side: str, prompt: int, answer: int, answers: int) -> None:
    torch.set_num_threads(1)
    held_before = resident()
    with tempfile.TemporaryDirectory() as folder:
        grpo = trainer(folder, answers, beta=0.01 if side == "trl-kl" else 0.0)
    optimizer = torch.optim.AdamW(grpo.model.parameters(), lr=1e-6)
    inputs = {
        "prompt_ids": torch.randint(3, VOCAB, (1, prompt)).repeat(answers, 1),
        "prompt_mask": torch.ones(answers, prompt, dtype=torch.long),
        "completion_ids": torch.randint(3, VOCAB, (answers, answer)),
        "completion_mask": torch.ones(answers, answer, dtype=torch.long),
        "advantages": torch.randn(answers),
        "num_items_in_batch": torch.tensor(answers * answer),
    }
    whole = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)

    def once() -> None:
        if side == "trl-kl":
            with torch.no_grad():
                kept, *_ = grpo._get_per_token_logps_and_entropies(
                    grpo.ref_model, whole, torch.ones_like(whole), answer
                )
            inputs["ref_per_token_logps"] = kept
        grpo.compute_loss(grpo.model, inputs).backward()
        torch.nn.utils.clip_grad_norm_(grpo.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    tokens = whole.numel()
    passes = tokens * (4 if side == "trl-kl" else 3)
    serve(once, held_before=held_before, fixed={"tokens": tokens, "passes": passes})


if __name__ == "__main__":
    name, *sizes = sys.argv[1:]
    main(name, *map(int, sizes[:3]))
