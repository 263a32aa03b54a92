"""Texts of requests as transformers has them: its tokenizer, the template rendered, the tokens of images in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from moevlm.export.checkpoint.files import optional_json
from moevlm.export.parity.oracle_images import oracle_images
from moevlm.export.parity.rank_tokenizer import RankTokenizer
from moevlm.runtime.core.errors import CheckpointError, reason
from moevlm.runtime.core.towers import Tower

IMAGE_ROWS, IMAGE_COLUMNS = 2, 3  # of visual tokens
# As mistral-common and transformers' own conversion call special tokens of a tekken.json.
_TEKKEN = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class TheirText:
    """transformers' tokenizer, or a reader of tiktoken.model, and the template that its processor renders with."""

    tokenizer: Any
    template: str

    @classmethod
    def load(cls, checkpoint: Path, splitting: str) -> "TheirText":
        """splitting: see `families.base.Family`. Raises CheckpointError."""
        # Without a class transformers takes one by the kind of model, whose own normalizer and splitting take the place
        # of those in tokenizer.json; what the file says counts then. So it does where the class is code of the
        # checkpoint, or may be mistral-common's, which reads a tekken.json instead.
        config = optional_json(checkpoint, "tokenizer_config.json")
        converted = not (checkpoint / "tokenizer.json").exists()
        own_code = isinstance(config.get("auto_map"), dict) and "AutoTokenizer" in config["auto_map"]
        own_file = own_code or (checkpoint / "tekken.json").exists()
        named = "tokenizer_class" in config and not converted and not own_file
        kind: Any = transformers.AutoTokenizer if named else transformers.PreTrainedTokenizerFast
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        if converted:
            options |= {name: token for name, token in _TEKKEN.items() if name not in config}
        try:
            if converted and (checkpoint / "tiktoken.model").exists():
                tokenizer: Any = RankTokenizer(checkpoint, splitting)
            else:
                tokenizer = kind.from_pretrained(checkpoint, **options)
            fields = transformers.ProcessorMixin.get_processor_dict(checkpoint, local_files_only=True)[0]
            template = fields.get("chat_template") or tokenizer.chat_template
            return cls(tokenizer, template["default"] if isinstance(template, dict) else template)
        except Exception as error:  # as for the model: it is not this project's code that refuses
            raise CheckpointError(f"transformers cannot load the tokenizer of {checkpoint}: {reason(error)}") from error

    def rendered(self, messages: Messages) -> str | None:
        """None for messages that the template refuses."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, add_generation_prompt=True, tokenize=False
            )
        except Exception:  # a template is code
            return None
        return str(text)

    def expanded(self, text: str, image_token: str, vision: Tower | None) -> str:
        """With the tokens of images, and what processors put around and between them; text alone as it is."""
        if vision is None:
            return text
        shape = (1, vision.queries) if vision.queries else (IMAGE_ROWS, IMAGE_COLUMNS)
        written = oracle_images(vision).written(self.tokenizer, image_token, *shape)
        return text.replace(image_token, written)

    def ids(self, text: str, as_it_is: bool = False) -> list[int]:
        """as_it_is: without a token that begins all texts."""
        bos = self.tokenizer.bos_token
        has_bos = bos is not None and text.startswith(bos)
        return list(self.tokenizer(text, add_special_tokens=not (has_bos or as_it_is))["input_ids"])
