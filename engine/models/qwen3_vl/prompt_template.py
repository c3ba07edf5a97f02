"""The prompt template of Qwen-Image-2.1 (diffusers pipeline_qwenimage21.py), which is tokenized as raw text."""

IMAGE_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
# its tokens are dropped from the embeddings
SYSTEM_TURN = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
PROMPT_TEMPLATE = SYSTEM_TURN + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def with_places(prompt: str, images: int) -> str:
    """A prompt that shows images before its text, as <image1>, <image2>, ...: so a person may name them, too. A prompt
    that is empty is one blank, as the model was trained."""
    labelled = (f"<image{i + 1}>{IMAGE_PLACE}" for i in range(images))
    return " ".join(labelled) + (prompt or " ")
