"""A language model on this machine, through transformers: for those who have no endpoint.

Encoder-decoder models (mT5, mT0, doc2query) and decoders (with their chat template, if they have one) are both served.
Batches are cut from the questions in their order and saved as a whole, and sampling is seeded by what is in the batch;
so a run that was killed asks the same batches again and gets the same answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.precision import resolve_dtype
from FlagEmbedding.mining.common.jobs import chunks
from FlagEmbedding.mining.query_generation.answer_cache import Answer, Task
from FlagEmbedding.mining.query_generation.arguments import LocalModelArguments, WritingArguments
from FlagEmbedding.mining.query_generation.endpoint import Save
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hardware import choose_device
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.identity import digest


class LocalModel:
    """A loaded model with the verbs of ``ChatEndpoint``.

    Args:
        options: which model, and how many prompts at a time.
        writing: ``temperature`` (0 takes the likeliest token) and ``max_tokens`` of the answers.
        hub: ``cache_dir`` and ``trust_remote_code`` are read.
        seed: of the sampling.

    Raises:
        UsageError: it cannot be loaded.
    """

    def __init__(
        self, options: LocalModelArguments, writing: WritingArguments, hub: EncoderArguments, seed: int
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        assert options.local_model is not None
        self.options, self.writing, self.seed, self.name = options, writing, seed, options.local_model
        self.sent = self.repeated = 0
        try:
            folder = str(resolve_folder(self.name, cache_dir=hub.cache_dir))
            trust = {"trust_remote_code": hub.trust_remote_code}
            self._seq2seq = bool(AutoConfig.from_pretrained(folder, **trust).is_encoder_decoder)
            kind: Any = AutoModelForSeq2SeqLM if self._seq2seq else AutoModelForCausalLM
            side = "right" if self._seq2seq else "left"
            self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side, **trust)
            self.device = choose_device()
            dtype = resolve_dtype(options.local_dtype, self.device)
            self.model = kind.from_pretrained(folder, dtype=dtype, **trust).to(self.device).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(f"--local_model {self.name}: no language model there ({reason})") from error
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def run(self, tasks: Iterable[Task], save: Save) -> Iterator[tuple[Task, str | None]]:
        """Answer every task, batch by batch; yields ``(task, None)`` when its answer is saved."""
        for batch in chunks(tasks, self.options.generation_batch_size):
            self.sent += len(batch)
            save(list(zip((task.key for task in batch), self._generate(batch), strict=True)))
            yield from ((task, None) for task in batch)

    @torch.inference_mode()
    def _generate(self, batch: list[Task]) -> list[Answer]:
        most, pad = self.writing.max_tokens, self.tokenizer.pad_token_id
        inputs = self._encode([task.prompt for task in batch])
        sampling: dict[str, Any] = {"do_sample": False}
        if self.writing.temperature > 0:
            torch.manual_seed(int(digest(self.seed, [task.key for task in batch])[:12], 16))
            sampling = {"do_sample": True, "temperature": self.writing.temperature}
        found = self.model.generate(**inputs, max_new_tokens=most, pad_token_id=pad, **sampling)
        # The decoder's start token stands first, and is the end token of some models.
        start = 1 if self._seq2seq else inputs["input_ids"].shape[1]
        ends = self.model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [ends])
        answers = []
        for row, mask in zip(found[:, start:].tolist(), inputs["attention_mask"].tolist(), strict=True):
            finish = "stop" if stops & set(row) or len(row) < most else "length"
            text = str(self.tokenizer.decode(row, skip_special_tokens=True))
            answers.append(Answer(text, finish, sum(mask), sum(token != pad for token in row)))
        return answers

    def _encode(self, prompts: list[str]) -> Any:
        chat = bool(getattr(self.tokenizer, "chat_template", None)) and not self._seq2seq
        if chat:
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore[assignment]
        encoded = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=self.options.longest_prompt, return_tensors="pt",
            return_token_type_ids=False, add_special_tokens=not chat,
        )  # fmt: skip
        return encoded.to(self.device)
