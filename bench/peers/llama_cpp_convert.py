"""A checkpoint without a tokenizer through llama.cpp's own converter, in an environment with torch and transformers.

python -m bench.peers.llama_cpp_convert SOURCES CHECKPOINT OUTPUT
"""

import sys
from pathlib import Path


def byte_vocabulary(model) -> None:
    """In the place of its set_vocab: a token for every byte, the image's three, and numbered ones up to the size."""
    from gguf import TokenType
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    size = model.hparams["vocab_size"]
    names = [*bytes_to_unicode().values(), *(f"[{i}]" for i in range(256, size))]
    kinds = [TokenType.NORMAL] * size
    top = model.hparams | model.hparams.get("text_config", {})
    for token in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        names[top[token]] = f"<|{token.removesuffix('_token_id').replace('image', 'image_pad')}|>"
        kinds[top[token]] = TokenType.CONTROL
    model.gguf_writer.add_tokenizer_model("gpt2")
    model.gguf_writer.add_tokenizer_pre("qwen2")
    model.gguf_writer.add_token_list(names)
    model.gguf_writer.add_token_types(kinds)
    model.gguf_writer.add_token_merges([f"{names[0]} {names[0]}"])  # it asks for one at least


def main() -> None:
    """Convert the text part, with query, key and value in one matrix, to a 16-bit file."""
    sources, checkpoint, output = sys.argv[1:]
    sys.path.insert(0, sources)
    partial = Path(output).with_suffix(".partial")
    sys.argv = ["", checkpoint, "--outfile", str(partial), "--outtype", "bf16", "--fuse-qkv"]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.set_vocab = byte_vocabulary
    convert_hf_to_gguf.main()
    partial.rename(output)


if __name__ == "__main__":
    main()
