"""Runs a Hugging Face folder in transformers, in fp32 on the CPU."""

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from child import Runtime, main, padded


class Transformers(Runtime):
    def __init__(self, target: str, settings: dict[str, Any]) -> None:
        super().__init__()
        os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        import tokenizers
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.versions = {
            each.__name__: each.__version__ for each in (transformers, torch, tokenizers)
        }
        self.torch = torch
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(target, trust_remote_code=False)
        self.causal_lm = transformers.AutoModelForCausalLM.from_pretrained(
            target,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
        ).eval()

    def forward(self, ids: list[int], stream: bool) -> tuple[Any, list[Any] | None]:
        streams: list[Any] = []
        hooks: list[Any] = []
        if stream:
            hooks = [
                layer.register_forward_hook(lambda module, inputs, found: streams.append(found))
                for layer in self.causal_lm.model.layers
            ]
        with self.torch.no_grad():
            # Of a long text, logits of all places are most of what is computed and held.
            text, kept = self.torch.tensor([ids]), 0 if stream else 1
            logits = self.causal_lm(text, use_cache=False, logits_to_keep=kept).logits[0]
        for hook in hooks:
            hook.remove()
        values = [found[0] if isinstance(found, tuple) else found for found in streams]
        return logits.numpy(), [value[0].numpy() for value in values] or None

    def greedy_together(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        ids, mask = map(self.torch.tensor, padded(prompts))
        found = self.causal_lm.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            do_sample=False,
            # Also beyond the end of the text, for as many tokens as there is room for.
            eos_token_id=-1,
            pad_token_id=0,
        )
        tokens: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return tokens

    def encode(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text)["input_ids"]
        return found

    def encode_all(self, texts: list[str]) -> list[list[int] | None]:
        found: list[list[int] | None] = self.tokenizer(texts)["input_ids"]
        return found

    def encode_conversation(self, messages: list[dict[str, str]]) -> list[int] | None:
        if self.tokenizer.chat_template is None:
            return None
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def ends(self) -> list[int]:
        ends = self.causal_lm.generation_config.eos_token_id
        return [] if ends is None else sorted([ends] if isinstance(ends, int) else ends)


if __name__ == "__main__":
    main(Transformers)
