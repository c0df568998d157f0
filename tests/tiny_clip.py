"""A CLIP pair of transformers, tiny and random, as a folder."""

from torch_unet import randomise
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from liftplace_jax.encoders.tokenizer import train_tokenizer

PROMPTS = ["a red cat", "two blue dogs on a green field " * 4, "", "cat"]
LENGTH, SIZE = 8, 14  # of texts in tokens, of images in pixels


def processor(**changes):
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    return CLIPImageProcessorPil(**sizes | changes)


def write_clip(folder):
    """A folder of transformers' CLIPModel, tokenizer and processor, tiny and random."""
    tokenizer = train_tokenizer(folder, PROMPTS, 540, LENGTH)
    shared = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "projection_dim": 12,
    }
    text = shared | {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": LENGTH,
        "eos_token_id": tokenizer.vocab_size - 1,
        "bos_token_id": tokenizer.vocab_size - 2,
    }
    vision = shared | {"image_size": SIZE, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = CLIPModel(config).eval()
    for part in model.children():
        randomise(part)
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder
