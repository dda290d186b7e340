"""What several simulator tests use: the literal reference, and models small enough to make up."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

WORDS = ("<s>", "<unk>", "one", "two", "three", *(f"word{i}" for i in range(45)))


@pytest.fixture(scope="session")
def torch():
    """PyTorch, where transformers is there too."""
    why = "needs the capture extra: torch, transformers"
    pytest.importorskip("transformers", reason=why)
    return pytest.importorskip("torch", reason=why)


@pytest.fixture(scope="session")
def tiny_model(torch):
    """Maker of random models: 3 layers, 4 query and 2 KV heads of 8, 50 tokens."""
    import transformers

    def make(kind: str = "Llama", **config):
        torch.manual_seed(0)
        sizes = {
            "vocab_size": len(WORDS),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        made = getattr(transformers, f"{kind}Config")(**{**sizes, **config})
        return getattr(transformers, f"{kind}ForCausalLM")(made).eval()

    return make


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tmp_path_factory) -> Path:
    """Such a model in a folder ``tiny``, with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = tiny_model()
    for block in model.model.layers:
        block.self_attn.q_proj.weight.data *= 40  # so that there are tiles to skip
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="<unk>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return folder
